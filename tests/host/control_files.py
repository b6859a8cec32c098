"""Control LoRAs in the layouts that people exchange, with random values, tiny models for them, and what diffusers' models answer."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from control_answers import FPS, SIGMA
from safetensors.torch import save_file
from tiny import WAN, TinyShape, random_transformer, write_transformer

from trainers.checkpoint import Checkpoint
from trainers.demo import demo
from trainers.family import detect_vae
from trainers.load import load_vae

RANK = 4
EMBEDDING = "patch_embedding"

Pairs = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""{native module: (A, B)}."""


def chance(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pair(out: int, inputs: Sequence[int], seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A (rank, *inputs) and B of a layer, of a size that shows in the answer."""
    down = torch.randn(RANK, *inputs, generator=chance(seed)) / math.sqrt(math.prod(inputs))
    up = torch.randn(out, RANK, *(1 for _ in inputs[1:]), generator=chance(seed + 1000)) / math.sqrt(RANK)
    return down, up


def write_lora(path: Path, modules: Pairs, more: Mapping[str, torch.Tensor] | None = None, prefix: str = "diffusion_model.") -> Path:
    state = {f"{prefix}{name}": tensor for name, tensor in (more or {}).items()}
    for name, (down, up) in modules.items():
        state |= {f"{prefix}{name}.lora_A.weight": down, f"{prefix}{name}.lora_B.weight": up}
    save_file(state, path)
    return path


def _merge(model: torch.nn.Module, pairs: Pairs, strength: float, names: Mapping[str, str]) -> None:
    """Add the LoRA of Linears to a diffusers model; `names`: its modules by the native ones."""
    for native, (down, up) in pairs.items():
        model.get_submodule(names[native]).weight += strength * up @ down


# Wan


SHAPE = TinyShape(text_dim=4096)
WAN_SIZE = (9, 64, 48)
"""Frames, height and width of the controls."""


def wan_pairs(seed: int, channels: int = 0) -> Pairs:
    """Every Linear of the blocks; with `channels` also the patch embedding, of so many input channels."""
    width, ffn = SHAPE.width, SHAPE.ffn
    sizes = {f"{attention}.{part}": (width, width) for attention in ("self_attn", "cross_attn") for part in "qkvo"}
    sizes |= {"ffn.0": (ffn, width), "ffn.2": (width, ffn)}
    made = {}
    for block in range(SHAPE.layers):
        for name, (out, inputs) in sizes.items():
            made[f"blocks.{block}.{name}"] = pair(out, [inputs], seed + len(made))
    return made | ({EMBEDDING: pair(width, [channels, 1, 2, 2], seed + len(made))} if channels else {})


WAN_LORAS: Mapping[str, Pairs] = {
    "depth": wan_pairs(1, 32),
    "tile": {EMBEDDING: pair(SHAPE.width, [32, 1, 2, 2], 500)},
    "style": wan_pairs(2000, 16),
}
"""Two with a control; "style" is an ordinary one, which adapts the patch embedding too (as distilled LoRAs do), and its bias."""
STYLE_BIAS = 0.1 * torch.randn(SHAPE.width, generator=chance(8))


def write_wan(folder: Path) -> dict[str, Path]:
    """{what: file}: the transformer, inputs, and the LoRAs; "bare": the depth LoRA as it is trained, without prefix or shape."""
    grown = {f"{EMBEDDING}.reshape_weight": torch.tensor([SHAPE.width, 32, 1, 2, 2])}
    frames, height, width = WAN_SIZE
    inputs = {
        "noise": torch.randn(1, 16, (frames - 1) // 4 + 1, height // 8, width // 8, generator=chance(0)),
        "text": torch.nn.functional.pad(torch.randn(1, 7, 4096, generator=chance(1)), (0, 0, 0, 505)),
        "control": torch.rand(*WAN_SIZE, 3, generator=chance(2)),
        "other": torch.rand(*WAN_SIZE, 3, generator=chance(3)),
        "large": torch.rand(frames + 3, height + 15, width + 15, 3, generator=chance(4)),
    }
    save_file(inputs, folder / "wan_inputs")
    return {
        "inputs": folder / "wan_inputs",
        "transformer": write_transformer(folder / "wan2.1.safetensors", SHAPE),
        "depth": write_lora(folder / "depth.safetensors", WAN_LORAS["depth"], grown),
        "tile": write_lora(folder / "tile.safetensors", WAN_LORAS["tile"], grown),
        "style": write_lora(folder / "style.safetensors", WAN_LORAS["style"], {f"{EMBEDDING}.diff_b": STYLE_BIAS}),
        "bare": write_lora(folder / "bare.safetensors", WAN_LORAS["depth"], prefix=""),
    }


def control_latents(frames_FHWC: torch.Tensor) -> torch.Tensor:
    """(1, C, F, H, W), normalised, by diffusers' VAE."""
    checkpoint = Checkpoint.open(demo.VAE, "vae")
    vae = load_vae(checkpoint, detect_vae(checkpoint, WAN), "cpu")
    with torch.no_grad():
        return WAN.encode_video(vae, frames_FHWC.permute(3, 0, 1, 2)[None] * 2 - 1)


def wan_velocity(inputs: Mapping[str, torch.Tensor], loras: Mapping[str, float], *controls: str) -> torch.Tensor:
    """What diffusers' transformer answers, the LoRAs merged into it and the controls' latents behind the noisy ones."""
    latents = [SIGMA * inputs["noise"], *(control_latents(inputs[name]) for name in controls)]
    with torch.no_grad():
        model = _wan_with(loras, 16 * len(latents))
        return model(torch.cat(latents, 1), torch.tensor([1000 * SIGMA]), inputs["text"], return_dict=False)[0]


def _wan_with(loras: Mapping[str, float], channels: int) -> torch.nn.Module:
    """The tiny transformer with `channels` input channels; each control LoRA in turn has the next ones."""
    model = random_transformer(SHAPE)
    own, free = model.patch_embedding, 16
    model.patch_embedding = torch.nn.Conv3d(channels, SHAPE.width, own.kernel_size, own.stride)
    model.patch_embedding.weight.copy_(torch.nn.functional.pad(own.weight, (0, 0) * 3 + (0, channels - 16)))
    model.patch_embedding.bias.copy_(own.bias)
    for name, strength in loras.items():
        pairs = WAN_LORAS[name]
        linears = {native: pairs[native] for native in pairs if native != EMBEDDING}
        _merge(model, linears, strength, {native: WAN.keys.to_diffusers(native)[0].name for native in linears})
        down, up = pairs[EMBEDDING]
        delta = strength * (up.flatten(1) @ down.flatten(1)).reshape(SHAPE.width, *down.shape[1:])
        further = min(delta.shape[1] - 16, channels - free)
        model.patch_embedding.weight[:, :16] += delta[:, :16]
        model.patch_embedding.weight[:, free : free + further] += delta[:, 16 : 16 + further]
        free += further
        if name == "style":
            model.patch_embedding.bias += strength * STYLE_BIAS
    return model


# LTX-Video


LTX_WIDTH, LTX_LAYERS = 128, 2
LTX_NOISE = (1, 128, 3, 2, 3)
"""17 frames of 96 x 64 pixels."""
_LTX_NAMES = {"proj_in": "patchify_proj", "time_embed": "adaln_single", "norm_q": "q_norm", "norm_k": "k_norm"}


def ltx_pairs(seed: int) -> Pairs:
    """Every Linear of the blocks, as Lightricks' depth LoRA has them."""
    sizes = {
        f"{attention}.{part}": (LTX_WIDTH, LTX_WIDTH) for attention in ("attn1", "attn2") for part in ("to_q", "to_k", "to_v", "to_out.0")
    }
    sizes |= {"ff.net.0.proj": (4 * LTX_WIDTH, LTX_WIDTH), "ff.net.2": (LTX_WIDTH, 4 * LTX_WIDTH)}
    names = [f"transformer_blocks.{block}.{name}" for block in range(LTX_LAYERS) for name in sizes]
    return {name: pair(*_as_pair(sizes[name.split(".", 2)[2]]), seed + i) for i, name in enumerate(names)}


def _as_pair(size: tuple[int, int]) -> tuple[int, list[int]]:
    return size[0], [size[1]]


LTX_LORA = ltx_pairs(1)


def random_ltx() -> torch.nn.Module:
    """A small LTXVideoTransformer3DModel in float32 (heads are 32 in every LTX-Video)."""
    from diffusers import LTXVideoTransformer3DModel

    torch.manual_seed(0)
    sizes = {"num_attention_heads": 32, "attention_head_dim": LTX_WIDTH // 32, "cross_attention_dim": LTX_WIDTH, "num_layers": LTX_LAYERS}
    model = LTXVideoTransformer3DModel(**sizes)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval().requires_grad_(False)


def write_ltx(folder: Path) -> dict[str, Path]:
    """{what: file}: the transformer as Lightricks ships it, inputs, and the IC-LoRA in three forms and names."""
    state = {}
    for name, tensor in random_ltx().state_dict().items():
        native = ".".join(_LTX_NAMES.get(part, part) for part in name.split("."))
        state[f"model.diffusion_model.{native}"] = tensor
    config = json.dumps({"transformer": {"causal_temporal_positioning": True}})
    save_file(state, folder / "ltxv.safetensors", {"config": config})
    inputs = {
        "noise": torch.randn(LTX_NOISE, generator=chance(0)),
        "text": torch.randn(1, 9, 4096, generator=chance(1)),
        "mask": torch.tensor([[1] * 7 + [0] * 2]),
        "control": torch.rand(20, 70, 100, 3, generator=chance(2)),
        "short": torch.rand(11, 64, 96, 3, generator=chance(3)),
    }
    save_file(inputs, folder / "ltx_inputs")
    return {
        "inputs": folder / "ltx_inputs",
        "transformer": folder / "ltxv.safetensors",
        "comfyui": write_lora(folder / "ltxv-097-ic-lora-depth-control-comfyui.safetensors", LTX_LORA),
        "diffusers": write_lora(folder / "ltxv-097-ic-lora-depth-control-diffusers.safetensors", LTX_LORA, prefix="transformer."),
        "renamed": write_lora(folder / "my_depth.safetensors", LTX_LORA),
    }


def ltx_velocity(inputs: Mapping[str, torch.Tensor], strength: float, guide_BCFHW: torch.Tensor) -> torch.Tensor:
    """What diffusers' transformer answers for the video, with the reference's tokens, clean, before the video's."""
    noisy = SIGMA * inputs["noise"]
    parts = (guide_BCFHW, noisy)
    tokens = torch.cat([part.flatten(2).transpose(1, 2) for part in parts], 1)
    counts = [part[0, 0].numel() for part in parts]
    times = torch.cat([torch.zeros(1, counts[0]), torch.full((1, counts[1]), 1000 * SIGMA)], 1)
    places = torch.cat([_causal_places(part) for part in parts], 2)
    with torch.no_grad():
        model = random_ltx()
        _merge(model, LTX_LORA, strength, {name: name for name in LTX_LORA})
        answer = model(tokens, inputs["text"], times, inputs["mask"], video_coords=places, return_dict=False)[0]
    return answer[:, counts[0] :].transpose(1, 2).reshape(noisy.shape)


def _causal_places(latents_BCFHW: torch.Tensor) -> torch.Tensor:
    """(1, 3, N): seconds, and pixels down and right, of each token's start."""
    frames, height, width = (torch.arange(size).float() for size in latents_BCFHW.shape[2:])
    grid = torch.meshgrid((8 * frames - 7).clamp(min=0) / FPS, 32 * height, 32 * width, indexing="ij")
    return torch.stack(grid).flatten(1)[None]
