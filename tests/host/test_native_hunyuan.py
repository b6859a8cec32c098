"""HunyuanVideo in ComfyUI and here: the same answers, without and with a LoRA by core's own loader, for every variant."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hunyuan_files import I2V_V1, I2V_V2, T2V, random_adapter, write_transformer
from installation import ComfyUI
from questions import ask, relative
from safetensors.torch import load_file, save_file

from trainers.checkpoint import Checkpoint
from trainers.families.hunyuan import FAMILY
from trainers.family import FIRST_FRAME, Conditions, TextRecord, detect
from trainers.flow import noised
from trainers.load import load_transformer
from trainers.lora_format import write_lora

TOLERANCE = 1e-4
SIGMA = torch.tensor([0.7])
CLASSES = {T2V: "HunyuanVideo", I2V_V1: "HunyuanVideoI2V", I2V_V2: "HunyuanVideo"}
TWO_HEADS = {"num_attention_heads": 2}
TRUE_WIDTH = {"num_attention_heads": 24, "num_layers": 1, "num_single_layers": 1}
Tensors = dict[str, torch.Tensor]


def questions(variant: str) -> Tensors:
    """A clean and a noisy clip with a given first frame, and a caption."""
    chance = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, 1, 16, 3, 6, 8, generator=chance)
    first = torch.randn(1, 16, 1, 6, 8, generator=chance)
    found = {"clean_BCFHW": clean, "noise_BCFHW": noise, "sigma": SIGMA[0]}
    found |= {"text_BLD": torch.randn(1, 7, 64, generator=chance), "cond/pooled_output": torch.randn(1, 768, generator=chance)}
    mask = torch.ones(1, 1, 3, 6, 8)
    mask[:, :, 0] = 0.0
    if variant == I2V_V1:
        found |= {"cond/concat_latent_image": first, "cond/concat_mask": mask}
    if variant == I2V_V2:
        found["clean_BCFHW"] = torch.cat([first, clean[:, :, 1:]], dim=2)
        found["noise_mask"] = mask
    return {name: tensor.clone() for name, tensor in found.items()}


def first_frame(variant: str, given: Tensors) -> Conditions:
    if variant == T2V:
        return Conditions()
    first = given["cond/concat_latent_image"] if variant == I2V_V1 else given["clean_BCFHW"][:, :, :1]
    return Conditions({FIRST_FRAME: first})


def ours(transformer: torch.nn.Module, variant: str, given: Tensors) -> torch.Tensor:
    """The velocity that is trained, of the clip beside another with a longer caption."""
    kind = next(known for known in FAMILY.variants if known.id == variant)
    noisy = noised(given["clean_BCFHW"], given["noise_BCFHW"], SIGMA)
    conditions = first_frame(variant, given)
    both = Conditions({name: tensor.repeat(2, 1, 1, 1, 1) for name, tensor in conditions.tensors.items()})
    inputs = FAMILY.prepare(kind, noisy.repeat(2, 1, 1, 1, 1), SIGMA.repeat(2), both)
    caption = TextRecord(given["text_BLD"][0], given["cond/pooled_output"][0])
    longer = TextRecord(torch.randn(11, 64), torch.randn(768))
    text = FAMILY.collate_text([caption, longer], torch.device("cpu"), torch.float32)
    with torch.no_grad():
        velocity = FAMILY.predict(transformer, inputs, text)
    return velocity[:1] if inputs.loss_mask is None else velocity[:1] * inputs.loss_mask[:1]


def denoise(variant: str, transformer: Path, folder: Path, name: str, lora: Path | None = None, **options: Any) -> dict[str, Any]:
    """The task for ComfyUI: one step of its sampler, with what its image-to-video node puts into the conditioning."""
    options = {"guidance": 6.0, **({"guiding_frame_index": 0} if variant == I2V_V2 else {}), **options}
    base = {"family": "hunyuan", "variant": variant, "transformer": str(transformer)}
    files = {"inputs": str(folder / "inputs"), "output": str(folder / name), "lora": str(lora) if lora else None}
    return {"task": "denoise", "base": base, **files, "options": options}


def theirs(folder: Path, name: str, given: Tensors) -> torch.Tensor:
    velocity = load_file(folder / name)["velocity"]
    return velocity * given["noise_mask"] if "noise_mask" in given else velocity


def load(path: Path, variant: str) -> torch.nn.Module:
    checkpoint = Checkpoint.open(path)
    return load_transformer(checkpoint, detect(checkpoint, variant), "cpu", torch.float32)


@pytest.mark.parametrize(
    ("variant", "changes", "dtype"),
    [
        (T2V, TWO_HEADS, torch.float32),
        (I2V_V1, TWO_HEADS, torch.float32),
        (I2V_V2, TWO_HEADS, torch.float32),
        pytest.param(I2V_V2, TRUE_WIDTH, torch.bfloat16, marks=pytest.mark.slow),
    ],
    ids=["T2V", "I2V v1", "I2V v2", "one layer of each kind at true width, v2"],
)
def test_they_agree_in_float32_without_and_with_a_lora(
    comfyui: ComfyUI, tmp_path: Path, variant: str, changes: dict[str, Any], dtype: torch.dtype
) -> None:
    given = questions(variant)
    save_file(given, tmp_path / "inputs")
    path = write_transformer(tmp_path, variant, dtype, **changes)
    transformer = load(path, variant)
    bare = ours(transformer, variant, given)
    adapter = random_adapter(transformer)
    write_lora(tmp_path / "lora.safetensors", adapter, FAMILY)
    write_lora(tmp_path / "kohya.safetensors", adapter, FAMILY, "kohya")
    patched = ours(transformer, variant, given)
    told = ask(
        comfyui,
        denoise(variant, path, tmp_path, "bare"),
        denoise(variant, path, tmp_path, "patched", tmp_path / "lora.safetensors"),
        *([denoise(variant, path, tmp_path, "kohya", tmp_path / "kohya.safetensors")] if changes == TWO_HEADS else []),
    )
    native, native_patched = theirs(tmp_path, "bare", given), theirs(tmp_path, "patched", given)
    figures = {"bare": relative(native, bare), "with LoRA": relative(native_patched, patched), "LoRA's effect": relative(patched, bare)}
    print(json.dumps(figures))
    assert told[0]["class"] == CLASSES[variant]
    assert figures["bare"] < TOLERANCE
    assert figures["with LoRA"] < TOLERANCE
    assert figures["LoRA's effect"] > 100 * TOLERANCE
    config = transformer.config
    assert told[1]["patched"] == 8 * config.num_layers + 2 * config.num_single_layers
    assert not [line for answer in told for line in answer["log"] if "not loaded" in line.lower()]
    if len(told) > 2:
        assert torch.equal(theirs(tmp_path, "kohya", given), native_patched)
