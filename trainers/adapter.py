"""A LoRA in memory, independent of any file's spelling.

Legend: R rank, I input features, O output features.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch


def float32(value: float) -> float:
    """The float32 nearest to `value`."""
    return float(struct.unpack("<f", struct.pack("<f", value))[0])


@dataclass(frozen=True)
class LoraPair:
    """The two factors of one Linear's update: weight += (alpha / rank) * up_OR @ down_RI.

    `alpha` is rounded to float32, the precision in which LoRA files store it, so that it survives every form.
    """

    down_RI: torch.Tensor
    up_OR: torch.Tensor
    alpha: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "alpha", float32(self.alpha))

    @property
    def rank(self) -> int:
        return self.down_RI.shape[0]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @property
    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return tuple(self.down_RI.shape), tuple(self.up_OR.shape)


@dataclass(frozen=True)
class Adapter:
    """A LoRA: its pairs by diffusers module name ("blocks.0.attn1.to_q"), and what is known about it."""

    modules: Mapping[str, LoraPair]
    metadata: Mapping[str, str] = field(default_factory=dict)
