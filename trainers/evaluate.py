"""The loss on held-out clips, at noise and noise levels that never change: a curve that can be compared over a run."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .batches import Batch
from .data.encoded import Encoded, EncodedItem
from .family import Family, Variant
from .flow import generator
from .job import Job
from .predict import batch_loss


@dataclass(frozen=True)
class HeldOut:
    """The held-out clips of a job."""

    job: Job
    family: Family
    variant: Variant
    encoded: Encoded
    items: tuple[EncodedItem, ...]

    @classmethod
    def of(cls, job: Job, family: Family, variant: Variant, encoded: Encoded) -> HeldOut:
        items = [item for item in encoded.items if item.held_out]
        return cls(job, family, variant, encoded, tuple(items[: job.held_out.max_clips]))

    @torch.no_grad()
    def loss(self, transformer: torch.nn.Module, device: torch.device, dtype: torch.dtype) -> dict[str, float]:
        """{"held_out_loss": the mean, "held_out_loss_0.5": at sigma 0.5, ...}; empty without held-out clips."""
        if not self.items:
            return {}
        was_training = transformer.training
        transformer.eval()
        by_sigma = {sigma: self._loss_at(sigma, transformer, device, dtype) for sigma in self.job.held_out.sigmas}
        transformer.train(was_training)
        mean = sum(by_sigma.values()) / len(by_sigma)
        return {"held_out_loss": mean, **{f"held_out_loss_{sigma:g}": loss for sigma, loss in by_sigma.items()}}

    def _loss_at(self, sigma: float, transformer: torch.nn.Module, device: torch.device, dtype: torch.dtype) -> float:
        total = 0.0
        for item in self.items:
            clean = self.encoded.latents_CFHW(item)[None]
            noise = torch.randn(clean.shape, generator=generator(self.job.seed, "held_out", item.latents, sigma))
            text = self.family.collate_text([self.encoded.text(item.text)], device, dtype)
            batch = Batch(clean.to(device), noise.to(device), torch.full((1,), sigma, device=device), text)
            total += batch_loss(self.family, self.variant, transformer, batch).item()
        return total / len(self.items)
