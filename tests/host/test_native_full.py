"""A model all of whose weights were trained is ComfyUI's: its own class takes every key, and answers as the trained one does."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_families
import torch
from installation import PACK, ComfyUI
from ltx_files import CAUSAL, random_ltx, write_ltx
from safetensors.torch import load_file, save_file
from tiny import WAN, TinyShape, tiny_job

from trainers.checkpoint import Checkpoint
from trainers.family import Conditions, TextRecord, detect, families
from trainers.job import Job, parse_job
from trainers.load import load_transformer
from trainers.run import Run
from trainers.trainer import train
from trainers.training import lora_path

LTX = families()["ltx"]
TOLERANCE = 1e-4
TEXT_DIM = 4096
"""ComfyUI's class of LTX-Video takes no other."""


def wan_job(folder: Path) -> Job:
    folder.mkdir()
    shape = TinyShape(layers=1, text_dim=TEXT_DIM)
    return tiny_job(folder, shape, method="full", lora={}, steps=2, optimizer={"learning_rate": 1e-3})


def ltx_job(folder: Path) -> Job:
    """Over an all-in-one file: what is beside the transformer stays behind."""
    folder.mkdir()
    variant, vae = LTX.variants[1], {"decoder.conv_in.conv.weight": torch.zeros(1)}
    base = write_ltx(folder / "base.safetensors", random_ltx(width=64, layers=1), CAUSAL, vae)
    values = {
        "name": "tiny",
        "method": "full",
        "base": {"transformer": str(base), "variant": variant.id},
        "encoded": str(tiny_families.write_encoded_of(folder / "encoded", LTX, variant)),
        "loras_folder": str(folder / "loras"),
        "runs_folder": str(folder / "runs"),
        "device": "cpu",
        "steps": 2,
        "tensorboard": False,
        "optimizer": {"learning_rate": 1e-3},
    }
    return parse_job(values)


def trained(job: Job) -> Path:
    run = Run.create(job)
    assert train(run) == "done"
    return lora_path(run, 2)


def question() -> dict[str, torch.Tensor]:
    chance = torch.Generator().manual_seed(0)
    text = WAN.collate_text([TextRecord(torch.randn(5, TEXT_DIM, generator=chance))], torch.device("cpu"), torch.float32)
    noisy = torch.randn(1, 16, 3, 8, 6, generator=chance)
    return {"noisy_BCFHW": noisy, "sigma_B": torch.tensor([0.7]), "text_BLD": text.embeds_BLD}


@torch.no_grad()
def our_velocity(path: Path, asked: dict[str, torch.Tensor]) -> torch.Tensor:
    checkpoint = Checkpoint.open(path)
    detection = detect(checkpoint)
    inputs = WAN.prepare(detection.variant, asked["noisy_BCFHW"], asked["sigma_B"], Conditions())
    text = WAN.collate_text([TextRecord(asked["text_BLD"][0])], torch.device("cpu"), torch.float32)
    return WAN.predict(load_transformer(checkpoint, detection, "cpu", torch.float32), inputs, text)


def test_comfyui_takes_every_key_and_answers_alike(comfyui: ComfyUI, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(tiny_families.TINY, "ltx", replace(tiny_families.TINY["ltx"], text_dim=TEXT_DIM))
    files = {"wan": trained(wan_job(tmp_path / "wan")), "ltx": trained(ltx_job(tmp_path / "ltx"))}
    bases = {
        name: {"family": name, "variant": Checkpoint.open(path).metadata["video_trainer.variant"], "transformer": str(path)}
        for name, path in files.items()
    }
    tasks: list[dict[str, Any]] = [
        {"task": "weights", "base": base, "output": str(tmp_path / f"{name} weights")} for name, base in bases.items()
    ]
    asked = question()
    save_file(asked, tmp_path / "question")
    answer = {"inputs": str(tmp_path / "question"), "output": str(tmp_path / "answer"), "weight_dtype": None, "lora": None}
    told = comfyui.call("native_answers.py", pack=str(PACK), tasks=[*tasks, {"task": "velocity", "base": bases["wan"]} | answer])
    for name, path in files.items():
        held, written = load_file(tmp_path / f"{name} weights"), load_file(path)
        assert held.keys() == {f"model.{key}" for key in written}, "nothing is missing, nothing was left over"
        assert all(torch.equal(held[f"model.{key}"].float(), tensor) for key, tensor in written.items())
    expected, found = our_velocity(files["wan"], asked), load_file(tmp_path / "answer")["velocity"]
    figure = float((found - expected).norm() / expected.norm())
    print(json.dumps({"velocity": figure, "log": told[-1]["log"]}))
    assert told[-1]["log"] == []
    assert figure < TOLERANCE
