"""The loss on held-out clips, at noise and noise levels that never change: a curve that can be compared over a run.

Where clips are trained with their first frame for a share of the time, that share of the clips keeps it, spread evenly over
their list, and always the same ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .batches import Batch
from .conditions import clip_conditions, clip_text, first_frame_probability, spread_first_frames
from .data.encoded import Encoded, EncodedItem
from .experts import Expert
from .family import Family, Variant
from .flow import generator
from .job import Job
from .predict import batch_loss
from .sample import TransformerAt


@dataclass(frozen=True)
class HeldOut:
    """The held-out clips of a job."""

    job: Job
    family: Family
    variant: Variant
    encoded: Encoded
    items: tuple[EncodedItem, ...]
    sigmas: tuple[float, ...]

    @classmethod
    def of(cls, job: Job, family: Family, variant: Variant, encoded: Encoded, experts: Sequence[Expert]) -> HeldOut:
        """The noise levels are those of the job that one of the `experts` there are works at."""
        items = [item for item in encoded.items if item.held_out]
        sigmas = [sigma for sigma in job.held_out.sigmas if any(e.lowest_sigma <= sigma <= e.highest_sigma for e in experts)]
        return cls(job, family, variant, encoded, tuple(items[: job.held_out.max_clips]), tuple(sigmas))

    @torch.no_grad()
    def loss(self, transformer_at: TransformerAt, device: torch.device, dtype: torch.dtype) -> dict[str, float]:
        """{"held_out_loss": the mean, "held_out_loss_0.5": at sigma 0.5, ...}; empty without any.

        `transformer_at` gives the transformer for a noise level, in eval mode; it is asked from high to low.
        """
        if not (self.items and self.sigmas):
            return {}
        found = {sigma: self._loss_at(sigma, transformer_at(sigma), device, dtype) for sigma in sorted(set(self.sigmas), reverse=True)}
        by_sigma = {sigma: found[sigma] for sigma in self.sigmas}
        mean = sum(by_sigma.values()) / len(by_sigma)
        return {"held_out_loss": mean, **{f"held_out_loss_{sigma:g}": loss for sigma, loss in by_sigma.items()}}

    def _loss_at(self, sigma: float, transformer: torch.nn.Module, device: torch.device, dtype: torch.dtype) -> float:
        total = 0.0
        probability = first_frame_probability(self.job, self.family.first_frame(self.variant))
        for item, keep in zip(self.items, spread_first_frames(probability, len(self.items)), strict=True):
            clean = self.encoded.latents_CFHW(item)[None]
            noise = torch.randn(clean.shape, generator=generator(self.job.seed, "held_out", item.latents, sigma))
            text = self.family.collate_text([clip_text(self.encoded, item, without_caption=False)], device, dtype)
            clean = clean.to(device)
            conditions = clip_conditions(self.job, self.family, self.variant, self.encoded, [item], clean, [keep])
            batch = Batch(clean, noise.to(device), torch.full((1,), sigma, device=device), text, conditions)
            total += batch_loss(self.family, self.variant, transformer, batch).item()
        return total / len(self.items)
