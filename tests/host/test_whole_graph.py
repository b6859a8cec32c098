"""The whole way through ComfyUI's queue: train on the tiny base, lose ComfyUI on the way, use the LoRA in native nodes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from comfy_server import Server
from graphs import Graph, base_graph, node, training_graph

from trainers.demo import demo
from trainers.demo.score import Asked, score_clip, summarise
from trainers.demo.videos import Models, read_videos, sample_videos
from trainers.demo.world import NUM_FRAMES, SIDE
from trainers.run import Run

pytestmark = pytest.mark.slow

NAME = "diagonally"
CAPTIONS = demo.asked_captions()[: demo.CONCEPT_VIDEOS]


def sampling_graph(lora_name: str) -> Graph:
    """A video of every caption through ComfyUI's own nodes."""
    graph = base_graph() | {
        "model": node("VideoTrainer_LoadTransformer", base=["base", 0], weight_dtype="default"),
        "lora": node("LoraLoaderModelOnly", model=["model", 0], lora_name=lora_name, strength_model=1.0),
        "shifted": node("ModelSamplingSD3", model=["lora", 0], shift=3.0),
        "negative": node("CLIPTextEncode", clip=["encoders", 0], text=""),
        "empty": node("EmptyHunyuanLatentVideo", width=SIDE, height=SIDE, length=NUM_FRAMES, batch_size=1),
    }
    for i, caption in enumerate(CAPTIONS):
        graph[f"positive{i}"] = node("CLIPTextEncode", clip=["encoders", 0], text=caption)
        graph[f"sampled{i}"] = node(
            "KSampler",
            model=["shifted", 0],
            positive=[f"positive{i}", 0],
            negative=["negative", 0],
            latent_image=["empty", 0],
            seed=demo.NOISE_SEED + i,
            steps=8,
            cfg=3.0,
            sampler_name="euler",
            scheduler="simple",
            denoise=1.0,
        )
        graph[f"images{i}"] = node("VAEDecode", samples=[f"sampled{i}", 0], vae=["encoders", 1])
        graph[f"video{i}"] = node("CreateVideo", images=[f"images{i}", 0], fps=8.0)
        graph[f"saved{i}"] = node("SaveVideo", video=[f"video{i}", 0], filename_prefix=f"whole_graph/{i:03d}", format="mp4", codec="h264")
    return graph


@dataclass
class Story:
    """What was seen on the way."""

    server: Server
    run: Run
    returned_seconds: float
    other_prompt_while_training: bool
    steps_while_comfyui_was_dead: int
    listed_after_the_restart: Mapping[str, Any]
    told_by_the_second_click: str
    second_click: Mapping[str, Any]
    log_of_the_second_click: str


@pytest.fixture(scope="module")
def story(make_server: Callable[..., Server]) -> Story:
    server = make_server()
    server.prompt(training_graph(steps=1, name="warm_up"))  # clips are written and encoded
    _until(lambda: _run(server, "warm_up").status().ended)
    started = time.monotonic()
    server.prompt(training_graph())
    returned_seconds = time.monotonic() - started
    run = _run(server, NAME)
    _until(lambda: run.status().step >= 2)
    server.prompt({"other": node("EmptyHunyuanLatentVideo", width=64, height=64, length=9, batch_size=1), "shown": _shown("other")})
    other = run.live and run.status().state == "training"
    server.kill()
    before = run.status().step
    _until(lambda: run.status().step >= before + 3)
    while_dead = run.status().step - before
    server.start()
    listed = {item["name"]: item for item in server.get("/video_trainer/runs")["runs"]}[NAME]
    log = len(server.log)
    clicked = server.prompt(training_graph())
    story = Story(
        server, run, returned_seconds, other, while_dead, listed, clicked["outputs"]["train"]["text"][0], clicked, server.log[log:]
    )
    _until(lambda: run.status().ended, patience_seconds=600)
    return story


def _shown(name: str) -> dict[str, Any]:
    return node("PreviewAny", source=[name, 0])


def _run(server: Server, name: str) -> Run:
    return Run.open(server.base_directory / "user" / "__video_trainer" / "runs" / name)


def _until(true: Callable[[], bool], patience_seconds: float = 120) -> None:
    give_up = time.monotonic() + patience_seconds
    while not true():
        assert time.monotonic() < give_up, f"not within {patience_seconds:.0f} s"
        time.sleep(0.2)


def test_training_starts_and_the_queue_is_free(story: Story):
    assert story.returned_seconds < 20
    assert story.other_prompt_while_training


def test_the_run_goes_on_without_comfyui_and_is_found_again(story: Story):
    assert story.steps_while_comfyui_was_dead >= 3
    assert story.listed_after_the_restart["live"]
    assert story.run.status().state == "done"
    starts = [event for event in story.run.read_events() if event["event"] in ("training", "resumed")]
    assert {event["event"] for event in starts} == {"training"}, "one worker did it all"


def test_a_second_click_attaches_to_the_live_run(story: Story):
    assert "is already training" in story.told_by_the_second_click
    assert story.second_click["outputs"]["train"]["video_trainer_run"] == [NAME]
    assert not (story.run.folder.parent / f"{NAME}-2").exists()


def test_after_a_restart_what_is_encoded_is_not_loaded_again(story: Story):
    assert "loaded" not in story.log_of_the_second_click.lower(), story.log_of_the_second_click


def test_the_lora_is_listed_without_a_restart_and_every_key_is_loaded(story: Story):
    name = f"{NAME}/{NAME}-{demo.STEPS:06d}.safetensors"
    assert name in [choice.replace("\\", "/") for choice in story.server.choices("LoraLoaderModelOnly", "lora_name")]
    assert "lora key not loaded" not in story.server.log


def test_its_videos_show_the_concept_as_the_trainers_own_do(story: Story, tmp_path: Path):
    lora = Path(story.run.job.loras_folder) / NAME / f"{NAME}-{demo.STEPS:06d}.safetensors"
    story.server.prompt(sampling_graph(f"{NAME}/{lora.name}"), timeout_seconds=300)
    files = sorted((story.server.base_directory / "output" / "whole_graph").glob("*.mp4"))
    assert len(files) == len(CAPTIONS)
    in_comfyui = summarise([(Asked.parse(caption), score_clip(file)) for caption, file in zip(CAPTIONS, files, strict=True)])
    by_trainer = _trainers_own(tmp_path, lora)
    print(f"concept: {in_comfyui.concept:.2f} in ComfyUI, {by_trainer.concept:.2f} by the trainer")
    assert "lora key not loaded" not in story.server.log
    assert by_trainer.concept >= 0.8
    assert abs(in_comfyui.concept - by_trainer.concept) <= 0.1


def _trainers_own(folder: Path, lora: Path) -> Any:
    """The score of videos that the trainer's own sampler makes with the LoRA."""
    demo.write_clips(folder / "clips")
    demo.encode(folder)
    sample_videos(folder / "own", Models(demo.TRANSFORMER, demo.VAE, folder / "encoded"), CAPTIONS, demo.NOISE_SEED, lora)
    return summarise([(video.asked, video.score) for video in read_videos(folder / "own")])
