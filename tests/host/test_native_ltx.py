"""LTX-Video: ComfyUI's model, VAEs, text and scheduler, and the trainer's, answer alike."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import assert_near
from installation import ComfyUI
from ltx_files import CAUSAL, LTX, NOT_CAUSAL, VAE_HEADERS, native_vae, random_ltx, write_ltx
from questions import ask, relative
from safetensors.torch import load_file, save_file

from trainers.checkpoint import Checkpoint
from trainers.family import FIRST_FRAME, Conditions, TextRecord, Variant, detect, detect_vae
from trainers.flow import noised
from trainers.folder_encoder import EncoderFiles, FolderEncoder
from trainers.job import LoraSpec
from trainers.load import load_transformer, load_vae
from trainers.lora import adapter_state, inject, load_adapter_state, set_enabled
from trainers.lora_format import read_lora, write_lora

TOLERANCE = 1e-4
SPEC = LoraSpec(rank=4)
FPS = 30.0
LENGTH, ROWS = 5, 8
"""Rows of text that count, and with the padding that ComfyUI adds."""


@dataclass(frozen=True)
class Model:
    """A transformer's file, and how it may be called."""

    variant: str
    width: int
    layers: int
    header: dict[str, Any] | None
    causal: bool
    layout: str = "native"

    def path(self, folder: Path) -> Path:
        return folder / ("LTX-Video-0.9.5" if self.layout == "diffusers" else "ltx.safetensors")

    @property
    def is_large(self) -> bool:
        return self.width >= 2048


MODELS = {
    "2B 0.9, tiny": Model("ltxv-2b-0.9", 128, 2, NOT_CAUSAL, False),
    "2B 0.9.5, tiny": Model("ltxv-2b-0.9.5", 128, 2, CAUSAL, True),
    "2B distilled, tiny": Model("ltxv-2b-distilled", 192, 2, CAUSAL, True),
    "2B distilled without its header, tiny": Model("ltxv-2b-distilled", 128, 2, None, False),
    "2B 0.9.5, a tiny diffusers folder": Model("ltxv-2b-0.9.5", 128, 2, None, True, "diffusers"),
    "13B, tiny": Model("ltxv-13b", 256, 3, CAUSAL, True),
    "13B distilled, a tiny all-in-one": Model("ltxv-13b-distilled", 256, 2, CAUSAL, True, "all in one"),
    "one layer of 2B": Model("ltxv-2b-0.9", 2048, 1, NOT_CAUSAL, False),
    "one layer of 13B": Model("ltxv-13b", 4096, 1, CAUSAL, True),
}


def question(first_frame: bool) -> dict[str, torch.Tensor]:
    """One clip; with a first frame the mask that LTXVImgToVideo gives at strength 1."""
    chance = torch.Generator().manual_seed(0)
    mask = torch.zeros(1, ROWS, dtype=torch.long)
    mask[:, :LENGTH] = 1
    asked = {
        "clean_BCFHW": torch.randn(1, 128, 3, 2, 4, generator=chance),
        "noise_BCFHW": torch.randn(1, 128, 3, 2, 4, generator=chance),
        "text_BLD": torch.randn(1, ROWS, 4096, generator=chance),
        "sigma": torch.tensor(0.7),
        "cond/attention_mask": mask,
    }
    if first_frame:
        asked["noise_mask"] = torch.ones(1, 1, 3, 1, 1)
        asked["noise_mask"][:, :, 0] = 0
    return asked


def make(folder: Path, model: Model) -> None:
    """The transformer's file and a LoRA on all its targets, B not zero."""
    transformer = random_ltx(model.width, model.layers, model.causal)
    if model.layout == "diffusers":
        transformer.save_pretrained(model.path(folder) / "transformer")
    else:
        vae = {"decoder.x": torch.zeros(1)} if model.layout == "all in one" else {}
        write_ltx(model.path(folder), transformer, model.header, vae, torch.bfloat16 if model.is_large else torch.float32)
    with torch.no_grad():
        for parameter in inject(transformer, LTX, SPEC, seed=0):
            parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(parameter.numel()))
    write_lora(folder / "lora.safetensors", adapter_state(transformer, SPEC), LTX)


def asked_of(model: Model) -> list[tuple[bool, bool]]:
    """(with a first frame, with the LoRA) of each task; of a large model only the harder ones."""
    return [(first_frame, lora) for first_frame in (False, True) for lora in (False, True) if first_frame or not model.is_large]


def tasks_for(folder: Path, model: Model) -> list[dict[str, Any]]:
    base = {"family": "ltx", "variant": model.variant, "transformer": str(model.path(folder))}
    tasks = []
    for first_frame, lora in asked_of(model):
        save_file(question(first_frame), folder / f"question{first_frame:d}")
        files = {"inputs": str(folder / f"question{first_frame:d}"), "output": str(folder / f"answer{first_frame:d}{lora:d}")}
        used = str(folder / "lora.safetensors") if lora else None
        tasks.append({"task": "denoise", "base": base, "lora": used, "options": {"frame_rate": FPS}, **files})
    return tasks


Told = Mapping[str, tuple[Path, list[Any]]]


@pytest.fixture(scope="module")
def answers(comfyui: ComfyUI, tmp_path_factory: pytest.TempPathFactory) -> Told:
    """Of each model: its folder, with the tensors of the answers, and what was told beside them. All in one process."""
    tasks, folders = {}, {}
    for name, model in MODELS.items():
        folders[name] = tmp_path_factory.mktemp("ltx")
        make(folders[name], model)
        tasks[name] = tasks_for(folders[name], model)
    told = iter(ask(comfyui, *(task for of_one in tasks.values() for task in of_one)))
    return {name: (folder, [next(told) for _ in tasks[name]]) for name, folder in folders.items()}


@torch.no_grad()
def velocity(transformer: torch.nn.Module, variant: Variant, noisy: torch.Tensor, first_frame: bool) -> torch.Tensor:
    """The trainer's answer to `question(first_frame)`."""
    asked = question(first_frame)
    given = {FIRST_FRAME: asked["clean_BCFHW"][:, :, :1]}
    conditions = Conditions(given, torch.tensor([True]) if first_frame else None, torch.tensor([FPS]))
    inputs = LTX.prepare(variant, noisy, asked["sigma"].reshape(1), conditions)
    text = LTX.collate_text([TextRecord(asked["text_BLD"][0, :LENGTH])], torch.device("cpu"), torch.float32)
    return LTX.predict(transformer, inputs, text)


@pytest.mark.parametrize("name", MODELS)
def test_one_step_of_its_sampler_is_our_velocity(answers: Told, name: str) -> None:
    """Without and with a first frame and a LoRA by core's loader; where a first frame is given, at the frames after it."""
    (folder, told), model = answers[name], MODELS[name]
    checkpoint = Checkpoint.open(model.path(folder))
    detection = detect(checkpoint, model.variant)
    assert detection.config["causal_temporal_positioning"] == model.causal
    transformer = load_transformer(checkpoint, detection, "cpu", torch.float32)
    inject(transformer, LTX, SPEC, seed=0)
    adapter = read_lora(folder / "lora.safetensors", LTX)
    load_adapter_state(transformer, adapter)
    figures, velocities = {}, {}
    for (first_frame, lora), words in zip(asked_of(model), told, strict=True):
        set_enabled(transformer, lora)
        theirs = load_file(folder / f"answer{first_frame:d}{lora:d}")
        ours = velocity(transformer, detection.variant, theirs["noisy"], first_frame)
        named = f"{'first frame' if first_frame else 'text'}{', LoRA' if lora else ''}"
        velocities[named] = theirs["velocity"][:, :, first_frame:]
        figures[named] = relative(velocities[named], ours[:, :, first_frame:])
        assert (words["class"], words["patched"]) == ("LTXV", len(adapter.modules) * lora)
        assert not [line for line in words["log"] if "not loaded" in line.lower()]
    effect = relative(velocities["first frame, LoRA"], velocities["first frame"])
    print(json.dumps({name: figures | {"effect of the LoRA": effect}}))
    assert max(figures.values()) < TOLERANCE
    assert effect > 100 * TOLERANCE


def test_the_noising_is_comfyui_s(answers: Told) -> None:
    asked, seen = question(False), load_file(answers["13B, tiny"][0] / "answer00")["noisy"]
    expected = noised(asked["clean_BCFHW"], asked["noise_BCFHW"], asked["sigma"].reshape(1))
    assert_near(seen, expected)


def test_the_wrong_count_of_frames_would_be_seen(answers: Told) -> None:
    """The same weights with and without causal positions answer differently enough for the test above to tell."""
    named = ("2B 0.9, tiny", "2B 0.9.5, tiny")
    one, other = (load_file(answers[name][0] / "answer00")["velocity"] for name in named)
    assert relative(one, other) > 10 * TOLERANCE


# What a graph makes of clips, captions and steps


PROMPTS = ["a red fox, moving  gracefully (in the snow)", "", "a kitten " * 150]
STEPS, SIZE = 30, (97, 512, 768)


def write_t5(folder: Path, comfyui: ComfyUI) -> Path:
    """A tiny T5 in transformers' layout, with the tokenizer that ComfyUI has of T5; its weights fit fp16, as ComfyUI keeps them."""
    from transformers import T5Config, T5EncoderModel

    shutil.copytree(comfyui.root / "comfy" / "text_encoders" / "t5_tokenizer", folder / "tokenizer")
    torch.manual_seed(0)
    sizes = {"vocab_size": 32128, "d_model": 64, "num_layers": 2, "num_heads": 4, "d_kv": 16, "d_ff": 128}
    encoder = T5EncoderModel(T5Config(**sizes, feed_forward_proj="gated-gelu"))
    encoder.half().float().save_pretrained(folder / "text_encoder", max_shard_size="5MB")
    return folder


def variant_of(vae_id: str) -> str:
    vae = next(vae for vae in LTX.vaes if vae.id == vae_id)
    return next(variant.id for variant in LTX.variants if vae.fits(variant))


@pytest.fixture(scope="module")
def graph(comfyui: ComfyUI, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What was told by VAE, by the CLIP of a folder and by the schedulers, in one process; the tensors lie in "folder"."""
    folder, tasks = tmp_path_factory.mktemp("graph"), {}
    chance = torch.Generator().manual_seed(0)
    pixels = torch.rand(1, 3, 9, 64, 96, generator=chance) * 2 - 1
    save_file({"pixels_BCFHW": pixels, "latents_BCFHW": torch.randn(1, 128, 2, 2, 3, generator=chance)}, folder / "question")
    for vae_id, header in VAE_HEADERS.items():
        path = write_ltx(folder / f"{vae_id}.safetensors", random_ltx(), CAUSAL | {"vae": header}, native_vae(vae_id, torch.bfloat16))
        base = {"family": "ltx", "variant": variant_of(vae_id), "transformer": str(path), "vae": str(path)}
        files = {"inputs": str(folder / "question"), "output": str(folder / f"{vae_id} answer")}
        tasks[vae_id] = {"task": "vae_both_ways", "base": base, **files}
    base["text_encoders"] = [str(write_t5(folder / "t5", comfyui))]
    tasks["encode"] = {
        "task": "encode",
        "base": base,
        "pixels": str(folder / "question"),
        "prompts": PROMPTS,
        "output": str(folder / "encoded"),
    }
    scheduler = {"module": "comfy_extras.nodes_lt", "node": "LTXVScheduler", "latent": [1, *LTX.latent(LTX.variants[0]).shape(*SIZE)]}
    numbers = {"max_shift": 2.05, "base_shift": 0.95, "stretch": True, "terminal": 0.1}
    tasks["sigmas"] = {"task": "node_sigmas", **scheduler, "arguments": {"steps": STEPS, **numbers}}
    return dict(zip(tasks, ask(comfyui, *tasks.values()), strict=True)) | {"folder": folder}


@pytest.mark.parametrize("vae_id", VAE_HEADERS)
def test_the_vae_encodes_and_decodes_as_comfyui_s(graph: dict[str, Any], vae_id: str) -> None:
    folder, told = graph["folder"], graph[vae_id]
    checkpoint = Checkpoint.open(folder / f"{vae_id}.safetensors", "vae")
    detection = detect_vae(checkpoint, LTX)
    vae = load_vae(checkpoint, detection, "cpu")
    asked, theirs = load_file(folder / "question"), load_file(folder / f"{vae_id} answer")
    figures = {
        "latents": relative(theirs["latents"], LTX.encode_video(vae, asked["pixels_BCFHW"])),
        "pixels": relative(theirs["pixels"], LTX.decode_video(vae, asked["latents_BCFHW"])),
    }
    print(json.dumps({vae_id: figures}))
    assert (told["class"], told["dtype"], detection.vae.id) == ("VideoVAE", "torch.float32", vae_id)
    assert max(figures.values()) < TOLERANCE


def test_a_graph_encodes_clips_as_the_trainer_does(graph: dict[str, Any]) -> None:
    both = load_file(graph["folder"] / "encoded")["latents"], load_file(graph["folder"] / "ltx-0.9.5 answer")["latents"]
    assert graph["encode"]["vae_dtype"] == "torch.float32"
    assert torch.equal(*both), "the test above compares the second with the trainer's"


def test_a_graph_encodes_captions_as_a_diffusers_folder_does(graph: dict[str, Any]) -> None:
    """Every token of a prompt, with a mask over the padding, and nothing cut."""
    found, folder = load_file(graph["folder"] / "encoded"), graph["folder"] / "t5"
    files = EncoderFiles.find(folder, vae=graph["folder"] / "ltx-0.9.5.safetensors")
    records = FolderEncoder(LTX, LTX.variants[1], files, "cpu").encode_text(PROMPTS)
    for index, record in enumerate(records):
        assert found[f"text{index}"].shape == record.embeds_LD.shape
        assert relative(found[f"text{index}"], record.embeds_LD) < TOLERANCE
    assert len(found["node1"][0]) == 128, "ComfyUI pads with rows that the mask leaves out"
    assert len(found["text1"]) == 1
    assert len(found["text2"]) > 256


def test_the_schedule_is_the_one_of_the_graph(graph: dict[str, Any]) -> None:
    sampling = LTX.sampling(LTX.variants[1])
    ours = sampling.schedule(STEPS, sampling.shift, LTX.latent(LTX.variants[1]).tokens(*SIZE))
    assert len(ours) == len(graph["sigmas"]) == STEPS + 1
    assert max(abs(mine - theirs) for mine, theirs in zip(ours, graph["sigmas"], strict=True)) < 1e-6
