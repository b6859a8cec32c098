"""A tiny model of each family with random weights, in a file, and what it is asked: for trying a device, not for pictures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from ..batches import Batch
from ..family import Conditions, Detection, Family, TextRecord, Variant
from ..load import native_state
from ..stable_file import save_file

_TEXT_ROWS = 7

SIDE, SIDE_ON_CPU = 16, 8
"""Patches of a frame. With the larger one a block's input is 1 MiB: what is smaller does not wait in host memory."""


@dataclass(frozen=True)
class TinyModel:
    """A family's first variant, which needs text alone."""

    family: Family

    @property
    def variant(self) -> Variant:
        return self.family.variants[0]

    @property
    def detection(self) -> Detection:
        return Detection(self.family, (self.variant,), self.family.trial.config)

    def write(self, path: Path) -> None:
        """Random weights that make every part count, as a native file."""
        chance = torch.Generator().manual_seed(0)
        state = {name: _weights(name, like, chance) for name, like in self.family.build(self.detection.config).state_dict().items()}
        save_file(native_state(state, self.family.keys), path)

    def batch(self, step: int, side: int, dtype: torch.dtype) -> Batch:
        """Four frames of `side` x `side` tokens and a caption, on the CPU, for a model that computes in `dtype`."""
        chance, latent, trial = torch.Generator().manual_seed(step), self.family.latent(self.variant), self.family.trial
        side *= trial.patch_side
        clean, noise = (torch.randn(1, latent.channels, 4, side, side, generator=chance) for _ in range(2))
        pooled = torch.randn(trial.pooled_width, generator=chance) if trial.pooled_width else None
        record = TextRecord(torch.randn(_TEXT_ROWS, self.family.text_width(trial.config), generator=chance), pooled)
        text = self.family.collate_text([record], torch.device("cpu"), dtype)
        return Batch(clean, noise, torch.tensor([0.3 + 0.2 * step]), text, Conditions())


def _weights(name: str, like: torch.Tensor, chance: torch.Generator) -> torch.Tensor:
    values = torch.randn(like.shape, generator=chance)
    scale = like[0].numel() ** -0.5 if like.ndim > 1 else 0.1
    return values * scale + float("norm" in name and like.ndim == 1 and name.endswith("weight"))
