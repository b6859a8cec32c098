"""LTX-Video: ComfyUI's model, VAEs, text and scheduler, and the trainer's, answer alike."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from installation import PACK, ComfyUI
from ltx_files import CAUSAL, LTX, NOT_CAUSAL, VAE_HEADERS, native_vae, random_ltx, write_ltx
from safetensors.torch import load_file, save_file

from trainers.checkpoint import Checkpoint
from trainers.family import FIRST_FRAME, Conditions, TextRecord, Variant, detect, detect_vae
from trainers.flow import noised
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


MODELS = {
    "2B 0.9, tiny": Model("ltxv-2b-0.9", 128, 2, NOT_CAUSAL, False),
    "2B 0.9.5, tiny": Model("ltxv-2b-0.9.5", 128, 2, CAUSAL, True),
    "2B distilled, tiny": Model("ltxv-2b-distilled", 192, 2, CAUSAL, True),
    "2B distilled without its header, tiny": Model("ltxv-2b-distilled", 128, 2, None, False),
    "13B, tiny": Model("ltxv-13b", 256, 3, CAUSAL, True),
    "13B distilled, tiny": Model("ltxv-13b-distilled", 256, 2, CAUSAL, True),
    "one layer of 2B": Model("ltxv-2b-0.9", 2048, 1, NOT_CAUSAL, False),
    "one layer of 13B": Model("ltxv-13b", 4096, 1, CAUSAL, True),
}


def ask(comfyui: ComfyUI, tasks: list[dict[str, Any]]) -> list[Any]:
    return comfyui.call("native_answers.py", pack=str(PACK), tasks=tasks)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


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
    write_ltx(folder / "ltx.safetensors", transformer, model.header)
    with torch.no_grad():
        for parameter in inject(transformer, LTX, SPEC, seed=0):
            parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(parameter.numel()))
    write_lora(folder / "lora.safetensors", adapter_state(transformer, SPEC), LTX)


def asked_of(model: Model) -> list[tuple[bool, bool]]:
    """(with a first frame, with the LoRA) of each task; of a large model only the harder ones."""
    return [(first_frame, lora) for first_frame in (False, True) for lora in (False, True) if first_frame or model.layers > 1]


def tasks_for(folder: Path, model: Model) -> list[dict[str, Any]]:
    base = {"family": "ltx", "variant": model.variant, "transformer": str(folder / "ltx.safetensors")}
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
    told = iter(ask(comfyui, [task for of_one in tasks.values() for task in of_one]))
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
    checkpoint = Checkpoint.open(folder / "ltx.safetensors")
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
    torch.testing.assert_close(seen, expected, rtol=0, atol=1e-5)


def test_the_wrong_count_of_frames_would_be_seen(answers: Told) -> None:
    """The same weights with and without causal positions answer differently enough for the test above to tell."""
    named = ("2B 0.9, tiny", "2B 0.9.5, tiny")
    one, other = (load_file(answers[name][0] / "answer00")["velocity"] for name in named)
    assert relative(one, other) > 10 * TOLERANCE


@pytest.fixture(scope="module")
def vaes(comfyui: ComfyUI, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    """Of each VAE, in an all-in-one checkpoint: its folder, and what was told."""
    folders, tasks = {}, []
    for vae_id, header in VAE_HEADERS.items():
        folder = folders[vae_id] = tmp_path_factory.mktemp("vae")
        write_ltx(folder / "ltx.safetensors", random_ltx(), CAUSAL | {"vae": header}, native_vae(vae_id, torch.bfloat16))
        chance = torch.Generator().manual_seed(0)
        asked = {
            "pixels_BCFHW": torch.rand(1, 3, 9, 64, 96, generator=chance) * 2 - 1,
            "latents_BCFHW": torch.randn(1, 128, 2, 2, 3, generator=chance),
        }
        save_file(asked, folder / "question")
        variant = next(variant.id for variant in LTX.variants if next(vae for vae in LTX.vaes if vae.id == vae_id).fits(variant))
        base = {"variant": variant, "vae": str(folder / "ltx.safetensors")}
        tasks.append({"task": "vae_both_ways", "base": base, "inputs": str(folder / "question"), "output": str(folder / "answer")})
    return dict(zip(folders, zip(folders.values(), ask(comfyui, tasks), strict=True), strict=True))


@pytest.mark.parametrize("vae_id", VAE_HEADERS)
def test_the_vae_encodes_and_decodes_as_comfyui_s(vaes: dict[str, tuple[Path, Any]], vae_id: str) -> None:
    folder, told = vaes[vae_id]
    checkpoint = Checkpoint.open(folder / "ltx.safetensors", "vae")
    detection = detect_vae(checkpoint, LTX)
    vae = load_vae(checkpoint, detection, "cpu")
    asked, theirs = load_file(folder / "question"), load_file(folder / "answer")
    figures = {
        "latents": relative(theirs["latents"], LTX.encode_video(vae, asked["pixels_BCFHW"])),
        "pixels": relative(theirs["pixels"], LTX.decode_video(vae, asked["latents_BCFHW"])),
    }
    print(json.dumps({vae_id: figures}))
    assert (told["class"], told["dtype"], detection.vae.id) == ("VideoVAE", "torch.float32", vae_id)
    assert max(figures.values()) < TOLERANCE
