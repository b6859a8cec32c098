"""Tiny LTX-Video models with random weights, as modules and as files in the layouts that people have."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from trainers.family import Vae, VaeDetection, families
from trainers.load import native_state

LTX = families()["ltx"]
CAUSAL, NOT_CAUSAL = ({"transformer": {"causal_temporal_positioning": causal}} for causal in (True, False))
CONFIG = {
    "patch_size": 1,
    "patch_size_t": 1,
    "activation_fn": "gelu-approximate",
    "qk_norm": "rms_norm_across_heads",
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
    "attention_bias": True,
    "attention_out_bias": True,
    "in_channels": 128,
    "out_channels": 128,
    "num_attention_heads": 32,
    "caption_channels": 4096,
}
"""What all published models have in common."""


def random_ltx(width: int = 128, layers: int = 2, causal: bool = True, **changes: object) -> torch.nn.Module:
    """The transformer of a config in float32, with weights that make every part count."""
    sizes = {"attention_head_dim": width // 32, "cross_attention_dim": width, "num_layers": layers, "causal_temporal_positioning": causal}
    transformer = LTX.build(CONFIG | sizes | changes).to_empty(device="cpu")
    fill(transformer)
    return transformer.requires_grad_(False).eval()


@torch.no_grad()
def fill(module: torch.nn.Module, seed: int = 0) -> None:
    """Random weights that keep activations near 1: uniform, about 1 for scales of a norm."""
    numbers = torch.rand(1_000_003, generator=torch.Generator().manual_seed(seed)) * 2 - 1  # a prime: no two rows are alike
    for name, parameter in module.named_parameters():
        bound = 1.7 / parameter[0].numel() ** 0.5 if parameter.ndim > 1 else 0.1
        repeats = parameter.numel() // len(numbers) + 1
        numbers = numbers.roll(1)
        parameter.copy_(bound * numbers.repeat(repeats)[: parameter.numel()].view_as(parameter))
        if "norm" in name and name.endswith("weight"):
            parameter.add_(1.0)


def write_ltx(
    path: Path,
    transformer: torch.nn.Module,
    header: Mapping[str, Any] | None = None,
    vae: Mapping[str, torch.Tensor] = {},
    dtype: torch.dtype = torch.float32,
) -> Path:
    """A native file; with the tensors of a VAE an all-in-one checkpoint. `header` is the config in its metadata."""
    state = {name: tensor.to(dtype).contiguous() for name, tensor in native_state(transformer.state_dict(), LTX.keys).items()}
    if vae:
        state = {f"model.diffusion_model.{name}": tensor for name, tensor in state.items()}
        state |= {f"vae.{name}": tensor for name, tensor in vae.items()}
    save_file(state, path, {"config": json.dumps(header)} if header else None)
    return path


# The VAEs in ComfyUI's words, as a checkpoint's header has them: fewer layers and channels than the published ones.

_RES, _RES_TWICE = ["res_x", {"num_layers": 1}], ["res_x", {"num_layers": 2}]
_NOISY = ["res_x", {"num_layers": 2, "inject_noise": True}]
_UP, _NARROWING = ["compress_all", {"residual": True, "multiplier": 1}], ["compress_all", {"residual": True, "multiplier": 2}]
_STRIDED = [
    _RES,
    ["compress_all", {}],
    ["res_x_y", 1],
    _RES_TWICE,
    ["compress_all", {}],
    ["res_x_y", 1],
    _RES,
    ["compress_all", {}],
    _RES,
    _RES,
]
_FOLDED = [
    _RES,
    ["compress_space_res", {"multiplier": 2}],
    _RES_TWICE,
    ["compress_time_res", {"multiplier": 1}],
    _RES,
    *([["compress_all_res", {"multiplier": 1}], _RES] * 2),
]
_COMMON = {"dims": 3, "latent_channels": 128, "norm_layer": "pixel_norm", "patch_size": 4, "latent_log_var": "uniform"}
VAE_HEADERS = {
    "ltx-0.9": _COMMON | {"blocks": _STRIDED},
    "ltx-0.9.1": _COMMON
    | {"encoder_blocks": _STRIDED, "decoder_blocks": [_NOISY, _NARROWING, _RES, _UP, _NOISY, _UP, _RES], "timestep_conditioning": True},
    "ltx-0.9.5": _COMMON
    | {"encoder_blocks": _FOLDED, "decoder_blocks": [_RES, _UP, _RES, _UP, _RES_TWICE, _NARROWING, _RES], "timestep_conditioning": True},
}
_STRIDED_CONFIG = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": (1, 2, 1, 1, 1)}
VAE_CONFIGS: Mapping[str, dict[str, Any]] = {
    "ltx-0.9": _STRIDED_CONFIG | {"decoder_block_out_channels": (128, 256, 512, 512), "decoder_layers_per_block": (1, 2, 1, 1, 1)},
    "ltx-0.9.1": _STRIDED_CONFIG
    | {
        "decoder_block_out_channels": (256, 256, 256),
        "decoder_layers_per_block": (2, 1, 2, 1),
        "decoder_spatio_temporal_scaling": (True, True, True),
        "decoder_inject_noise": (True, False, True, False),
        "upsample_residual": (True, True, True),
        "upsample_factor": (2, 1, 1),
        "timestep_conditioning": True,
    },
    "ltx-0.9.5": {
        "block_out_channels": (128, 256, 256, 256, 256),
        "down_block_types": ("LTXVideo095DownBlock3D",) * 4,
        "downsample_type": ("spatial", "temporal", "spatiotemporal", "spatiotemporal"),
        "layers_per_block": (1, 2, 1, 1, 1),
        "spatio_temporal_scaling": (True,) * 4,
        "decoder_block_out_channels": (128, 128, 256),
        "decoder_layers_per_block": (1, 1, 2, 1),
        "decoder_spatio_temporal_scaling": (True, True, True),
        "decoder_inject_noise": (False, False, False, False),
        "upsample_residual": (True, True, True),
        "upsample_factor": (1, 1, 2),
        "timestep_conditioning": True,
    },
}


def vae_kind(vae_id: str) -> Vae:
    return next(vae for vae in LTX.vaes if vae.id == vae_id)


def random_vae(vae_id: str) -> torch.nn.Module:
    """A VAE of `VAE_CONFIGS`, with statistics of its own."""
    paddings = {"encoder_padding": "zeros", "decoder_padding": "reflect"}
    vae = LTX.build_vae(VaeDetection(LTX, vae_kind(vae_id), VAE_CONFIGS[vae_id] | paddings)).to_empty(device="cpu")
    fill(vae)
    chance = torch.Generator().manual_seed(1)
    vae.latents_mean.uniform_(-0.5, 0.5, generator=chance)
    vae.latents_std.uniform_(0.5, 1.5, generator=chance)
    if VAE_CONFIGS[vae_id].get("timestep_conditioning"):
        vae.decoder.timestep_scale_multiplier.data.fill_(1000.0)
    return vae.requires_grad_(False).eval()


def native_vae(vae_id: str, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """A random VAE under native names, with the statistics that nothing uses."""
    state = native_state(random_vae(vae_id).state_dict(), vae_kind(vae_id).keys)
    unused = ("mean-of-stds", "mean-of-stds_over_std-of-means", "channel")
    return {name: tensor.to(dtype).contiguous() for name, tensor in state.items()} | {
        f"per_channel_statistics.{n}": torch.ones(128) for n in unused
    }
