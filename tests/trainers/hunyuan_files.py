"""Small HunyuanVideo models with random weights, as files in each naming."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from trainers.adapter import Adapter
from trainers.families.hunyuan import FAMILY, KEYS, LORA_KEYS
from trainers.job import LoraSpec
from trainers.keytable import KeyTable, SwapHalves
from trainers.load import native_state
from trainers.lora import adapter_state, inject
from trainers.stable_file import save_file

T2V, I2V_V1, I2V_V2 = (variant.id for variant in FAMILY.variants)
SHAPE: dict[str, Any] = {
    "num_attention_heads": 1,
    "attention_head_dim": 128,
    "num_layers": 2,
    "num_single_layers": 2,
    "num_refiner_layers": 2,
    "text_embed_dim": 64,
    "pooled_projection_dim": 768,
}
IMAGE: Mapping[str, dict[str, Any]] = {
    T2V: {},
    I2V_V1: {"in_channels": 33, "guidance_embeds": False, "image_condition_type": "latent_concat"},
    I2V_V2: {"image_condition_type": "token_replace"},
}
FILE_NAMES = {T2V: "hunyuan_video_t2v.safetensors", I2V_V1: "hunyuan_i2v.safetensors", I2V_V2: "hunyuan_v2_i2v.safetensors"}
LORA = LoraSpec(rank=4)


def cheap_noise(shape: torch.Size, seed: int, scale: float = 1.0, mean: float = 0.0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Normal numbers that repeat after a million: drawing a full-width model's takes seconds, and so does each pass over them."""
    numbers = torch.randn(min(shape.numel(), 2**20 + 7), generator=torch.Generator().manual_seed(seed))
    numbers = (mean + scale * numbers).to(dtype)
    return numbers.repeat(-(-shape.numel() // len(numbers)))[: shape.numel()].reshape(shape)


def _empty_transformer(variant: str, **changes: Any) -> torch.nn.Module:
    from diffusers import HunyuanVideoTransformer3DModel

    with torch.device("meta"):
        return HunyuanVideoTransformer3DModel(**SHAPE | IMAGE[variant] | changes)


@torch.no_grad()
def random_transformer(variant: str = T2V, seed: int = 0, **changes: Any) -> torch.nn.Module:
    """A HunyuanVideoTransformer3DModel in float32 with weights that make every part count; cheap at any width."""
    model = _empty_transformer(variant, **changes)
    model.load_state_dict(_random_state(model, seed, torch.float32), assign=True)
    return model.eval().requires_grad_(False)


def _random_state(model: torch.nn.Module, seed: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Weights for a model on the meta device."""
    state = {}
    for index, (name, like) in enumerate(model.state_dict().items()):
        norm = ".norm" in name and like.ndim == 1 and name.endswith("weight")
        scale = 0.1 if like.ndim == 1 else like[0].numel() ** -0.5
        state[name] = cheap_noise(like.shape, seed + index, scale, float(norm), dtype)
    return state


def original_state(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A diffusers state dict under the names of the original files."""
    first = [row for row in KEYS.rows if not isinstance(row, SwapHalves) and row not in LORA_KEYS.rows]
    return native_state(state, KeyTable(tuple(row for row in KEYS.rows if row not in first)))


def write_transformer(folder: Path, variant: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """The random transformer as ComfyUI's repackaged files have it, prefix included."""
    model = _empty_transformer(variant, **changes)
    state = native_state(_random_state(model, 0, dtype), KEYS)
    path = folder / FILE_NAMES[variant]
    save_file({f"model.model.{name}": tensor for name, tensor in state.items()}, path)
    return path


@torch.no_grad()
def random_adapter(transformer: torch.nn.Module) -> Adapter:
    """A LoRA that changes the answer, injected into the transformer."""
    generator = torch.Generator().manual_seed(1)
    for parameter in inject(transformer, FAMILY, LORA, seed=0):
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return adapter_state(transformer, LORA)


@torch.no_grad()
def random_vae() -> torch.nn.Module:
    """An AutoencoderKLHunyuanVideo at its real width (ComfyUI knows no other), whose pixels are mostly within -1..1."""
    from diffusers import AutoencoderKLHunyuanVideo

    with torch.device("meta"):
        vae = AutoencoderKLHunyuanVideo()
    vae = vae.to_empty(device="cpu")
    for index, (name, parameter) in enumerate(vae.named_parameters()):
        parameter.copy_(cheap_noise(parameter.shape, index) / max(parameter[0].numel(), 1) ** 0.5)
        if "norm" in name:
            parameter.mul_(0.1).add_(1.0 if name.endswith("weight") else 0.0)
    vae.decoder.conv_out.conv.weight.mul_(0.5)
    return vae.eval().requires_grad_(False)
