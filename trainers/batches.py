"""From the micro-batch of the order to tensors on the device: latents, noise, noise levels, captions.

Shape suffixes: B batch, C channels, F latent frames, H and W latent height and width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .conditions import clip_conditions, clip_text, draws_first_frame, first_frame_probability
from .data.encoded import Encoded, EncodedItem
from .data.order import MicroBatch, Order
from .family import Conditions, Family, TextBatch, Variant
from .flow import draw_sample
from .job import Job


@dataclass(frozen=True)
class Batch:
    """One forward pass: clean latents and noise (B, C, F, H, W), noise levels (B,), captions, and what else is given."""

    clean_BCFHW: torch.Tensor
    noise_BCFHW: torch.Tensor
    sigma_B: torch.Tensor
    text: TextBatch
    conditions: Conditions


@dataclass(frozen=True)
class Samples:
    """The training clips of a job, and the batches of any step."""

    job: Job
    family: Family
    variant: Variant
    encoded: Encoded
    items: tuple[EncodedItem, ...]
    order: Order
    device: torch.device
    dtype: torch.dtype

    @classmethod
    def of(
        cls, job: Job, family: Family, variant: Variant, encoded: Encoded, processes: int, device: torch.device, dtype: torch.dtype
    ) -> Samples:
        items = tuple(item for item in encoded.items if not item.held_out)
        order = Order(
            [(item.num_frames, item.height, item.width) for item in items],
            [item.repeats for item in items],
            job.batch_size,
            job.accumulation * processes,
            job.seed,
        )
        return cls(job, family, variant, encoded, items, order, device, dtype)

    @property
    def total_steps(self) -> int:
        if self.job.steps is not None:
            return self.job.steps
        assert self.job.epochs is not None, "a job has steps or epochs"
        return self.order.steps(self.job.epochs)

    def batch(self, step: int, micro: MicroBatch, sigmas: tuple[float, float] = (0.0, 1.0)) -> Batch:
        """The tensors of one micro-batch, a function of (job, data, step); noise levels lie between the two of `sigmas`."""
        items = [self.items[clip] for clip in micro.clips]
        clean = torch.stack([self.encoded.latents_CFHW(item) for item in items])
        draws = [
            draw_sample(self.job.noise, self.job.caption_dropout, self.job.seed, step, micro.first + i, tuple(clean.shape[1:]), sigmas)  # type: ignore[arg-type]
            for i in range(len(items))
        ]
        texts = [clip_text(self.encoded, item, draw.drop_caption) for draw, item in zip(draws, items, strict=True)]
        clean = clean.to(self.device)
        return Batch(
            clean,
            torch.stack([draw.noise_CFHW for draw in draws]).to(self.device),
            torch.tensor([draw.sigma for draw in draws], dtype=torch.float32, device=self.device),
            self.family.collate_text(texts, self.device, self.dtype),
            self._conditions(step, micro, items, clean),
        )

    def _conditions(self, step: int, micro: MicroBatch, items: list[EncodedItem], clean_BCFHW: torch.Tensor) -> Conditions:
        probability = first_frame_probability(self.job, self.family.first_frame(self.variant))
        keep = [draws_first_frame(probability, self.job.seed, step, micro.first + i) for i in range(len(items))]
        return clip_conditions(self.job, self.family, self.variant, self.encoded, items, clean_BCFHW, keep)
