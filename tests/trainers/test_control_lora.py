"""Which control LoRA a file is, by its header: keys in every spelling, metadata, names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from trainers.control_lora import CONTROL_KEY, recognise
from trainers.errors import LoraError

BLOCK = {"wan": "blocks.0.self_attn.q", "ltx": "transformer_blocks.0.attn1.to_q"}
CONV_DOWN, CONV_UP = torch.zeros(2, 32, 1, 2, 2), torch.zeros(8, 2, 1, 1, 1)


def write(path: Path, family: str, prefix: str = "diffusion_model.", *, control: bool = False, **metadata: str) -> Path:
    """A LoRA of one Linear, for Wan with `control` also of the grown patch embedding."""
    state = {f"{prefix}{BLOCK[family]}.lora_A.weight": torch.zeros(2, 8), f"{prefix}{BLOCK[family]}.lora_B.weight": torch.zeros(8, 2)}
    if control:
        embedding = f"{prefix}patch_embedding"
        state |= {f"{embedding}.lora_A.weight": CONV_DOWN.clone(), f"{embedding}.lora_B.weight": CONV_UP.clone()}
        state[f"{embedding}.reshape_weight"] = torch.tensor([8, 32, 1, 2, 2])
    save_file(state, path, metadata or None)
    return path


@pytest.mark.parametrize("prefix", ["diffusion_model.", "transformer.", "base_model.model.", ""])
def test_wan_is_known_by_its_grown_patch_embedding(tmp_path: Path, prefix: str):
    found = recognise(write(tmp_path / "a.safetensors", "wan", prefix, control=True))
    assert (found.family, found.kind, found.reason) == ("wan", "channels", "patch_embedding has 32 input channels")
    assert found.embedding is not None
    assert found.embedding.channels == 32
    assert found.embedding.keys == {f"{prefix}patch_embedding.{part}" for part in ("lora_A.weight", "lora_B.weight", "reshape_weight")}
    assert found.native[f"{prefix}blocks.0.self_attn.q.lora_A.weight"] == "diffusion_model.blocks.0.self_attn.q.lora_A.weight"


def test_kohya_s_names_stay_and_alpha_is_found(tmp_path: Path):
    down, up = {"lora_down.weight": torch.zeros(2, 8), "lora_up.weight": torch.zeros(8, 2)}, torch.tensor(4.0)
    state = {f"lora_unet_blocks_0_self_attn_q.{part}": tensor for part, tensor in down.items()}
    state |= {"lora_unet_patch_embedding.lora_down.weight": CONV_DOWN, "lora_unet_patch_embedding.lora_up.weight": CONV_UP}
    save_file({**state, "lora_unet_patch_embedding.alpha": up}, tmp_path / "a.safetensors")
    found = recognise(tmp_path / "a.safetensors")
    assert all(key == native for key, native in found.native.items())
    assert found.embedding is not None
    assert (found.embedding.alpha, found.embedding.shape) == ("lora_unet_patch_embedding.alpha", None)


@pytest.mark.parametrize(
    ("name", "metadata", "reason"),
    [
        ("ltxv-097-ic-lora-depth-control-comfyui", {}, "its name"),
        ("My_ICLoRA", {}, "its name"),
        ("depth", {"reference_downscale_factor": "1"}, "metadata reference_downscale_factor"),
        ("depth", {CONTROL_KEY: "reference"}, f"metadata {CONTROL_KEY}"),
        ("depth", {"modelspec.title": "Depth IC-LoRA"}, "modelspec.title"),
    ],
)
def test_an_ic_lora_is_known_by_metadata_or_name(tmp_path: Path, name: str, metadata: dict[str, str], reason: str):
    found = recognise(write(tmp_path / f"{name}.safetensors", "ltx", "transformer.", **metadata))
    assert (found.family, found.kind, found.reason, found.embedding) == ("ltx", "reference", reason, None)
    assert next(iter(found.native.values())).startswith("diffusion_model.transformer_blocks.0.")


def test_the_user_may_say_that_it_is_one(tmp_path: Path):
    path = write(tmp_path / "depth.safetensors", "ltx")
    with pytest.raises(LoraError, match=r"neither the name of depth\.safetensors.*Set kind to IC-LoRA if it is one"):
        recognise(path)
    assert recognise(path, as_reference=True).kind == "reference"


def test_files_without_a_control_or_of_another_family_are_refused(tmp_path: Path):
    with pytest.raises(LoraError, match=r"is a LoRA for Wan without a control.*Use Apply LoRA"):
        recognise(write(tmp_path / "style.safetensors", "wan"))
    with pytest.raises(LoraError, match="trained with references 3 times smaller than the video"):
        recognise(write(tmp_path / "ic-lora.safetensors", "ltx", reference_downscale_factor="3"))
    state = {f"diffusion_model.double_blocks.0.img_attn_qkv.lora_{side}.weight": torch.zeros(2, 2) for side in "AB"}
    save_file(state, tmp_path / "hunyuan.safetensors")
    with pytest.raises(LoraError, match=r"hunyuan\.safetensors holds double_blocks\.0\.img_attn_qkv.*Wan.*LTX-Video"):
        recognise(tmp_path / "hunyuan.safetensors")


def test_a_patch_embedding_that_cannot_be_taken_apart_is_refused(tmp_path: Path):
    path = tmp_path / "dora.safetensors"
    state = {
        "patch_embedding.lora_A.weight": CONV_DOWN,
        "patch_embedding.lora_B.weight": CONV_UP,
        "patch_embedding.dora_scale": torch.ones(8),
    }
    save_file(state, path)
    with pytest.raises(LoraError, match="and a DoRA scale"):
        recognise(path)
    path = tmp_path / "flat.safetensors"
    save_file({"patch_embedding.lora_A.weight": torch.zeros(2, 128), "patch_embedding.lora_B.weight": torch.zeros(8, 2)}, path)
    with pytest.raises(LoraError, match=r"patch_embedding has A \(2, 128\)"):
        recognise(path)
