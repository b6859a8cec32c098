"""Wan transformers of every variant with random weights, as native files; and what they are asked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from tiny import TinyShape

from trainers.checkpoint import Checkpoint
from trainers.families.wan import FAMILY
from trainers.family import FIRST_FRAME, FIRST_FRAME_CLIP, IMAGE_EMBEDS, Conditions, Detection, TextBatch, TextRecord, Variant, detect
from trainers.load import load_transformer, native_state
from trainers.stable_file import save_file

IMAGE_DIM = 1280
CHANNELS = {"wan2.1-t2v": (16, 16), "wan2.2-t2v": (16, 16), "wan2.2-i2v": (36, 16), "wan2.1-i2v": (36, 16), "wan2.2-ti2v": (48, 48)}
"""By variant: of what the transformer gets, and of what it gives."""
NAMES = {"wan2.2-t2v": "wan2.2_t2v_low_noise.safetensors", "wan2.2-i2v": "wan2.2_i2v_high_noise.safetensors"}
VARIANTS: Mapping[str, Variant] = {variant.id: variant for variant in FAMILY.variants}
SMALL = TinyShape(text_dim=4096)


def config_of(variant: str, shape: TinyShape = SMALL) -> dict[str, Any]:
    """Every argument of the variant's class, at this size."""
    in_channels, out_channels = CHANNELS[variant]
    config = shape.config | {"in_channels": in_channels, "out_channels": out_channels}
    return config | ({"image_dim": IMAGE_DIM, "added_kv_proj_dim": shape.width} if variant == "wan2.1-i2v" else {})


def write_variant(folder: Path, variant: str, shape: TinyShape = SMALL, dtype: torch.dtype = torch.float32) -> Path:
    """A native file with random weights that make every part count. Large tensors repeat four million numbers."""
    chance = torch.Generator().manual_seed(0)
    numbers = torch.randn(2**22, generator=chance)

    def weights(name: str, like: torch.Tensor) -> torch.Tensor:
        count = like.numel()
        flat = numbers[int(torch.randint(0, 2**21, (), generator=chance)) :]
        values = flat.repeat(-(-count // len(flat)))[:count].view(like.shape)
        is_norm = like.ndim == 1 and name.endswith(".weight")
        scale = 0.1 if like.ndim == 1 else prod(like.shape[1:]) ** -0.5
        return (values * scale + is_norm).to(dtype)

    state = {name: weights(name, like) for name, like in FAMILY.build(config_of(variant, shape)).state_dict().items()}
    path = folder / NAMES.get(variant, f"{variant}.safetensors")
    save_file(native_state(state, FAMILY.keys), path)
    return path


@dataclass(frozen=True)
class Question:
    """One clip: clean latents and noise (1, C, F, H, W), a noise level, text, and the tensors of its conditions."""

    variant: Variant
    clean_BCFHW: torch.Tensor
    noise_BCFHW: torch.Tensor
    text_BLD: torch.Tensor
    negative_BLD: torch.Tensor
    conditions: Conditions
    sigma: float = 0.7

    @classmethod
    def of(cls, variant: str, first_frame: bool = True, text_dim: int = 4096) -> Question:
        """With its first frame, if the variant can have one."""
        chance = torch.Generator().manual_seed(1)
        channels = FAMILY.latent(VARIANTS[variant]).channels
        clean, noise, clip = (torch.randn(1, channels, 3, 8, 6, generator=chance) for _ in range(3))
        embeds = torch.randn(1, 257, IMAGE_DIM, generator=chance)
        texts = [_text(torch.randn(length, text_dim, generator=chance)).embeds_BLD for length in (5, 9)]
        tensors = {FIRST_FRAME: clean[:, :, :1], FIRST_FRAME_CLIP: clip, IMAGE_EMBEDS: embeds}
        keeps = torch.tensor([True]) if first_frame and FAMILY.first_frame(VARIANTS[variant]) else None
        return cls(VARIANTS[variant], clean, noise, texts[0], texts[1], Conditions(tensors, keeps))

    @property
    def in_place(self) -> bool:
        return self.variant.id == "wan2.2-ti2v" and self.conditions.first_frame_B is not None

    def for_comfyui(self) -> dict[str, torch.Tensor]:
        """The same as files of `native_answers.py` have it: masks and conditioning as ComfyUI's own I2V nodes make them."""
        found = {"clean_BCFHW": self.clean_BCFHW, "noise_BCFHW": self.noise_BCFHW, "sigma": torch.tensor(self.sigma)}
        found |= {"text_BLD": self.text_BLD, "negative_BLD": self.negative_BLD}
        mask_BCFHW = torch.ones(1, 1, *self.clean_BCFHW.shape[2:])
        mask_BCFHW[:, :, 0] = 0
        if self.in_place:
            found["noise_mask"] = mask_BCFHW
        if FIRST_FRAME_CLIP in FAMILY.required(self.variant):
            found |= {"cond/concat_latent_image": self.conditions.tensors[FIRST_FRAME_CLIP], "cond/concat_mask": mask_BCFHW}
        if IMAGE_EMBEDS in FAMILY.required(self.variant):
            found["cond/image_embeds"] = self.conditions.tensors[IMAGE_EMBEDS]
        return {name: tensor.clone().contiguous() for name, tensor in found.items()}

    @torch.no_grad()
    def velocity(self, transformer: torch.nn.Module, noisy_BCFHW: torch.Tensor) -> torch.Tensor:
        """The family's answer."""
        inputs = FAMILY.prepare(self.variant, noisy_BCFHW, torch.tensor([self.sigma]), self.conditions)
        return FAMILY.predict(transformer, inputs, TextBatch(self.text_BLD))


def _text(embeds_LD: torch.Tensor) -> TextBatch:
    return FAMILY.collate_text([TextRecord(embeds_LD)], torch.device("cpu"), torch.float32)


def open_variant(path: Path) -> tuple[Detection, torch.nn.Module]:
    checkpoint = Checkpoint.open(path)
    detection = detect(checkpoint)
    return detection, load_transformer(checkpoint, detection, "cpu", torch.float32)
