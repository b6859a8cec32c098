"""A tiny model of each family with random weights, in a file, and what it is asked: for trying a device, not for pictures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..batches import Batch
from ..family import Conditions, Detection, Family, TextRecord, Variant, families
from ..load import native_state
from ..stable_file import save_file

_TEXT_WIDTH, _POOLED_WIDTH, _TEXT_ROWS = 32, 16, 7

_CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "wan": {
        **{"num_attention_heads": 2, "attention_head_dim": 128, "num_layers": 3, "ffn_dim": 256, "text_dim": _TEXT_WIDTH},
        **{"freq_dim": 32, "patch_size": (1, 2, 2), "rope_max_seq_len": 1024, "in_channels": 16, "out_channels": 16},
    },
    "ltx": {
        **{"num_attention_heads": 4, "attention_head_dim": 64, "cross_attention_dim": 256, "num_layers": 3},
        **{"caption_channels": _TEXT_WIDTH, "causal_temporal_positioning": False},
    },
    "hunyuan": {
        **{"num_attention_heads": 2, "attention_head_dim": 128, "num_layers": 1, "num_single_layers": 2, "text_embed_dim": _TEXT_WIDTH},
        **{"pooled_projection_dim": _POOLED_WIDTH, "image_condition_type": None},
    },
    "mochi": {
        **{"num_attention_heads": 2, "attention_head_dim": 128, "num_layers": 3, "time_embed_dim": 32, "text_embed_dim": _TEXT_WIDTH},
        **{"pooled_projection_dim": 32, "in_channels": 12, "out_channels": 12},
    },
}
"""Where they differ from the defaults of diffusers' class."""

_SIDE_OF_PATCH: Mapping[str, int] = {"ltx": 1}
"""In latents; of the others it is two."""

SIDE, SIDE_ON_CPU = 16, 8
"""Patches of a frame. With the larger one a block's input is 1 MiB: what is smaller does not wait in host memory."""


@dataclass(frozen=True)
class TinyModel:
    """A family's first variant, which needs text alone."""

    family: Family
    variant: Variant
    config: Mapping[str, Any]

    @classmethod
    def of(cls, family_id: str) -> TinyModel:
        family = families()[family_id]
        return cls(family, family.variants[0], _CONFIGS[family_id])

    @property
    def detection(self) -> Detection:
        return Detection(self.family, (self.variant,), self.config)

    def write(self, path: Path) -> None:
        """Random weights that make every part count, as a native file."""
        chance = torch.Generator().manual_seed(0)
        state = {name: _weights(name, like, chance) for name, like in self.family.build(self.config).state_dict().items()}
        save_file(native_state(state, self.family.keys), path)

    def batch(self, step: int, side: int, dtype: torch.dtype) -> Batch:
        """Four frames of `side` x `side` tokens and a caption, on the CPU, for a model that computes in `dtype`."""
        chance, latent = torch.Generator().manual_seed(step), self.family.latent(self.variant)
        side *= _SIDE_OF_PATCH.get(self.family.id, 2)
        clean, noise = (torch.randn(1, latent.channels, 4, side, side, generator=chance) for _ in range(2))
        pooled = torch.randn(_POOLED_WIDTH, generator=chance) if self.family.id == "hunyuan" else None
        record = TextRecord(torch.randn(_TEXT_ROWS, _TEXT_WIDTH, generator=chance), pooled)
        text = self.family.collate_text([record], torch.device("cpu"), dtype)
        return Batch(clean, noise, torch.tensor([0.3 + 0.2 * step]), text, Conditions())


def _weights(name: str, like: torch.Tensor, chance: torch.Generator) -> torch.Tensor:
    values = torch.randn(like.shape, generator=chance)
    scale = like[0].numel() ** -0.5 if like.ndim > 1 else 0.1
    return values * scale + float("norm" in name and like.ndim == 1 and name.endswith("weight"))
