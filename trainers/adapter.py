"""A LoRA in memory, independent of any file's spelling.

Legend: R rank, I input features, O output features.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch

Lengths = Literal["adapted", "base"]
"""What a row of the adapted weight is divided by before DoRA's magnitude is multiplied (see `dora`)."""


def float32(value: float) -> float:
    """The float32 nearest to `value`."""
    return float(struct.unpack("<f", struct.pack("<f", value))[0])


@dataclass(frozen=True)
class LoraPair:
    """The two factors of one Linear's update: weight += (alpha / rank) * up_OR @ down_RI.

    `alpha` is rounded to float32, the precision in which LoRA files store it, so that it survives every form. With a
    `magnitude` it is a DoRA: (O, 1), one number for each row of the weight, or (1, I) for each column.
    """

    down_RI: torch.Tensor
    up_OR: torch.Tensor
    alpha: float
    magnitude: torch.Tensor | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "alpha", float32(self.alpha))

    @property
    def rank(self) -> int:
        return self.down_RI.shape[0]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @property
    def by_rows(self) -> bool:
        """Whether the magnitudes, if there are any, are those of rows."""
        return self.magnitude is not None and tuple(self.magnitude.shape) == (self.up_OR.shape[0], 1)

    @property
    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return tuple(self.down_RI.shape), tuple(self.up_OR.shape)


@dataclass(frozen=True)
class Adapter:
    """A LoRA: its pairs by diffusers module name ("blocks.0.attn1.to_q"), and what is known about it.

    `lengths` is what the magnitudes of a DoRA mean.
    """

    modules: Mapping[str, LoraPair]
    metadata: Mapping[str, str] = field(default_factory=dict)
    lengths: Lengths = "adapted"

    @property
    def is_dora(self) -> bool:
        return any(pair.magnitude is not None for pair in self.modules.values())
