"""Train LoRA, Wait For Run and Apply LoRA in a running ComfyUI: what they say, and what they refuse."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from comfy_server import GraphError, Server
from graphs import base_graph, node, training_graph
from installation import ComfyUI

from trainers.demo import demo, world
from trainers.lora_format import read_lora, write_lora
from trainers.run import Run

QUICK = {"batch_size": 1, "rank": 2, "held_out_every": 0, "save_every": 5}


@pytest.fixture(scope="module")
def runs(server: Server) -> Callable[[str], Run]:
    return lambda name: Run.open(server.base_directory / "user" / "__video_trainer" / "runs" / name)


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three clips of their own, so that no other test has encoded them."""
    folder = tmp_path_factory.mktemp("clips")
    world.write_clips(folder, world.random_scenes(3, seed=77))
    return folder


def until(true: Callable[[], bool], patience_seconds: float = 120) -> None:
    give_up = time.monotonic() + patience_seconds
    while not true():
        assert time.monotonic() < give_up, f"not within {patience_seconds:.0f} s"
        time.sleep(0.1)


def waiting(graph: dict) -> dict:
    return graph | {"wait": node("VideoTrainer_WaitForRun", run=["train", 0])}


def test_settings_are_those_of_a_job(comfyui: ComfyUI):
    values = {"vram_gib": 11.5, "quantise": "fp8", "stream": "always", "attention": "flash", "compile": True}
    found = comfyui.call("settings_of_a_job.py", values=values)
    assert found["defaults"] == {}
    assert found["choices"] == {"optimizer.kind": ["adamw_kahan"]}, "which is for full fine-tuning, of the command line"
    memory = found["job"]["memory"]
    assert {name: memory[name] for name in ("vram_gib", "ram_gib", "quantise", "stream")} == {
        "vram_gib": 11.5,
        "ram_gib": None,
        "quantise": "fp8",
        "stream": "always",
    }
    assert found["job"]["speed"] == {"attention": "flash", "compile": True}
    assert found["job"]["method"] == "lora"


def test_wait_for_run_gives_the_lora_and_its_losses(server: Server, runs, clips: Path):
    graph = waiting(training_graph(str(clips), steps=10, name="waited", **QUICK))
    graph |= {"plot": node("PreviewImage", images=["wait", 3]), "file": node("PreviewAny", source=["wait", 2])}
    graph |= {
        "model": node("VideoTrainer_LoadTransformer", base=["base", 0], weight_dtype="default"),
        "loaded": node("LoraModelLoader", model=["model", 0], lora=["wait", 0], strength_model=1.0),
        "patched": node("VideoTrainer_ApplyLoRA", model=["model", 0], lora="none", strength=1.0, strength_low_noise=1.0, run=["wait", 4]),
        "shown": node("PreviewAny", source=["loaded", 0]),
        "also shown": node("PreviewAny", source=["patched", 0]),
    }
    outputs = server.prompt(graph)["outputs"]
    assert outputs["file"]["text"] == ["waited/waited-000010.safetensors"]
    assert outputs["plot"]["images"]
    assert "40 of 40 layers matched" in outputs["patched"]["text"][0]
    assert "lora key not loaded" not in server.log
    assert runs("waited").status().state == "done"

    again = server.prompt(graph)["outputs"]
    assert "was trained already" in again["train"]["text"][0]
    assert len(list((server.base_directory / "output" / "loras" / "waited").iterdir())) == 2
    assert not (runs("waited").folder.parent / "waited-2").exists()


def test_cancelling_the_wait_leaves_the_run_alone(server: Server, runs, clips: Path):
    waits = server.queue(waiting(training_graph(str(clips), steps=100_000, name="long", **QUICK)))
    folder = server.base_directory / "user" / "__video_trainer" / "runs" / "long"
    until(lambda: folder.is_dir() and runs("long").status().step >= 1)
    server.interrupt()
    with pytest.raises(GraphError, match="execution_interrupted"):
        server.wait(waits)
    step = runs("long").status().step
    until(lambda: runs("long").status().step > step)
    assert server.post("/video_trainer/runs/long/stop")["told"]
    until(lambda: not runs("long").live)
    assert runs("long").status().state == "stopped"
    told = server.prompt(training_graph(str(clips), steps=100_000, name="long", **QUICK))["outputs"]["train"]["text"][0]
    assert "goes on in the background" in told
    server.post("/video_trainer/runs/long/stop")
    until(lambda: not runs("long").live)


@pytest.mark.slow
def test_another_setting_is_another_run(server: Server, runs, clips: Path):
    server.prompt(waiting(training_graph(str(clips), steps=1, name="twice", **QUICK)))
    told = server.prompt(waiting(training_graph(str(clips), steps=2, name="twice", **QUICK)))["outputs"]["train"]["text"][0]
    assert told.startswith("twice-2: training starts")
    assert runs("twice").job.steps == 1
    assert runs("twice-2").job.steps == 2


@pytest.mark.slow
def test_comfyui_forgets_its_models_when_it_shall_give_up_its_ram(server: Server, runs, clips: Path):
    graph = training_graph(str(clips), steps=1, name="alone", **QUICK)
    for _ in range(2):  # the first one makes the folder of what is encoded
        server.prompt(graph)
    assert "encoded" in _cached(server.prompt(graph))
    graph["train"]["inputs"] |= {"name": "alone_in_ram", "comfyui_memory": "free the card and RAM"}
    assert "encoded" in _cached(server.prompt(graph))
    assert _cached(server.prompt(graph)) == []
    until(lambda: runs("alone_in_ram").status().state == "done")


@pytest.mark.slow
def test_a_failure_says_why_with_the_end_of_the_log(server: Server, runs, tmp_path: Path):
    world.write_clips(tmp_path, world.random_scenes(2, seed=78))
    server.prompt(waiting(training_graph(str(tmp_path), steps=1, name="whole", **QUICK)))
    latents = server.base_directory / "user" / "__video_trainer" / "encoded" / "cache" / "latents"
    newest = sorted(latents.rglob("*.safetensors"), key=lambda file: file.stat().st_mtime_ns)[-2:]
    for file in newest:
        file.write_bytes(b"no tensors")
    with pytest.raises(GraphError) as failure:
        server.prompt(waiting(training_graph(str(tmp_path), steps=3, name="broken", **QUICK)))
    said = str(failure.value)
    assert "broken failed" in said
    assert "is damaged" in said
    assert "worker.log" in said
    assert "Traceback" in said
    assert runs("broken").status().state == "failed"
    for file in newest:
        file.unlink()
    with pytest.raises(GraphError, match="Press Run again: what is missing is encoded again"):
        server.prompt(waiting(training_graph(str(tmp_path), steps=3, name="broken", **QUICK)))
    server.prompt(waiting(training_graph(str(tmp_path), steps=3, name="broken", **QUICK)))
    assert runs("broken").status().state == "done"


def test_what_is_wrong_with_the_settings_is_said_before_anything_is_encoded(server: Server, tmp_path: Path):
    world.write_clips(tmp_path, world.random_scenes(1, seed=79))
    log = len(server.log)
    for settings, told in (
        ({"name": "my kitten"}, "no spaces, and begins with a letter or digit. Use 'my-kitten'"),
        ({"device": "cuda:3"}, "cuda:3"),
        ({"extends": "nobody@7"}, "the run must be there"),
        ({"initial_lora": "nowhere.safetensors"}, "There is no LoRA 'nowhere.safetensors'"),
    ):
        with pytest.raises(GraphError, match=re.escape(told)):
            server.prompt(training_graph(str(tmp_path), **(QUICK | settings)))
    assert "VAE load device" not in server.log[log:]


@pytest.mark.slow
def test_a_run_may_start_from_a_lora_that_is_listed_or_anywhere(server: Server, runs, lora: Path, clips: Path):
    for name, chosen in (("from_list", "applied/applied-000001.safetensors"), ("from_path", str(lora))):
        server.prompt(waiting(training_graph(str(clips), steps=1, name=name, initial_lora=chosen, **QUICK)))
        assert runs(name).status().state == "done"
        assert Path(runs(name).job.start.initial_lora) == lora


@pytest.mark.slow
def test_data_that_were_deleted_are_encoded_again_by_the_same_run(server: Server, runs, clips: Path):
    graph = waiting(training_graph(str(clips), steps=1, name="before", **QUICK))
    server.prompt(graph)
    shutil.rmtree(server.base_directory / "user" / "__video_trainer" / "encoded")
    graph["train"]["inputs"]["name"] = "after"
    server.prompt(graph)
    assert runs("after").status().state == "done"


def applied(lora: str) -> dict:
    return base_graph() | {
        "model": node("VideoTrainer_LoadTransformer", base=["base", 0], weight_dtype="default"),
        "patched": node("VideoTrainer_ApplyLoRA", model=["model", 0], lora=lora, strength=0.5, strength_low_noise=1.0),
        "shown": node("PreviewAny", source=["patched", 0]),
    }


@pytest.fixture(scope="module")
def lora(server: Server, clips: Path) -> Path:
    server.prompt(waiting(training_graph(str(clips), steps=1, name="applied", **QUICK)))
    return server.base_directory / "output" / "loras" / "applied" / "applied-000001.safetensors"


def test_apply_lora_takes_a_file_or_the_newest_of_a_run(server: Server, lora: Path):
    assert "applied: newest" in server.choices("VideoTrainer_ApplyLoRA", "lora")
    for choice in ("applied: newest", "applied/applied-000001.safetensors"):
        told = server.prompt(applied(choice))["outputs"]["patched"]["text"][0]
        assert told == "applied-000001.safetensors: 40 of 40 layers matched, strength 0.5"


def test_of_a_pair_each_model_gets_the_lora_of_its_expert(server: Server, lora: Path):
    for expert in ("high", "low"):
        shutil.copy(lora, lora.with_name(f"pair-{expert}-000001.safetensors"))
    graph = applied("applied/pair-low-000001.safetensors")
    alone = server.prompt(graph)["outputs"]["patched"]["text"][0]
    graph["patched"]["inputs"]["model_low_noise"] = ["model", 0]
    both = server.prompt(graph)["outputs"]["patched"]["text"][0]
    assert alone == "pair-low-000001.safetensors: 40 of 40 layers matched, strength 0.5"
    assert both.splitlines() == [
        "pair-high-000001.safetensors: 40 of 40 layers matched, strength 0.5",
        "pair-low-000001.safetensors: 40 of 40 layers matched, strength 1",
    ]


def test_a_newer_file_of_the_run_is_seen_and_nothing_else_runs_again(server: Server, lora: Path):
    graph = applied("applied: newest")
    server.prompt(graph)
    assert "patched" in _cached(server.prompt(graph))
    newer = lora.with_name("applied-000002.safetensors")
    shutil.copy(lora, newer)
    try:
        ran = server.prompt(graph)
        assert "patched" not in _cached(ran)
        assert ran["outputs"]["patched"]["text"][0].startswith("applied-000002")
    finally:
        newer.unlink()


def _cached(entry: dict) -> list[str]:
    return next(message[1]["nodes"] for message in entry["status"]["messages"] if message[0] == "execution_cached")


def test_a_damaged_lora_is_named(server: Server, lora: Path):
    (lora.parents[1] / "torn.safetensors").write_bytes(lora.read_bytes()[:100])
    with pytest.raises(GraphError, match=r"torn\.safetensors cannot be read"):
        server.prompt(applied("torn.safetensors"))


def test_a_lora_of_another_model_is_refused(server: Server, lora: Path, tmp_path: Path):
    loras = server.base_directory / "output" / "loras"
    torch.manual_seed(0)
    other = {f"lora_unet_down_blocks_{i}_attn.lora_{end}.weight": torch.randn(4, 4) for i in range(3) for end in ("up", "down")}
    from safetensors.torch import save_file

    save_file(other, loras / "other.safetensors")
    with pytest.raises(GraphError, match="none of the 3 layers of other"):
        server.prompt(applied("other.safetensors"))

    adapter = read_lora(lora)
    from dataclasses import replace

    from trainers.family import families

    wide = {name: replace(pair, up_OR=torch.cat([pair.up_OR, pair.up_OR])) for name, pair in adapter.modules.items()}
    write_lora(loras / "wide.safetensors", replace(adapter, modules=wide), families()["wan"])
    with pytest.raises(GraphError, match="is for a model of another size"):
        server.prompt(applied("wide.safetensors"))
    assert demo.TRANSFORMER.is_file()
