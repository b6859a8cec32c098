"""From the micro-batch of the order to tensors: latents, noise, noise levels, captions. All are made on the CPU.

Shape suffixes: B batch, C channels, F latent frames, H and W latent height and width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from .conditions import clip_conditions, clip_text, draws_first_frame, first_frame_probability
from .data.encoded import Encoded, EncodedItem
from .data.order import MicroBatch, Order
from .family import Conditions, Family, TextBatch, Variant
from .flow import draw_sample
from .job import Job
from .offload.pinned import PinnedMemory


@dataclass(frozen=True)
class Batch:
    """One forward pass: clean latents and noise (B, C, F, H, W), noise levels (B,), captions, and what else is given."""

    clean_BCFHW: torch.Tensor
    noise_BCFHW: torch.Tensor
    sigma_B: torch.Tensor
    text: TextBatch
    conditions: Conditions

    def pinned(self, memory: PinnedMemory) -> Batch:
        """The same in pinned memory, in one piece each: so a GPU copies by itself, as far as the system allows it."""
        return self._each(lambda tensor: memory.pinned_tensor(tensor.contiguous()))

    def to(self, device: torch.device) -> Batch:
        """The same on a device. From pinned memory nothing waits: the copies are queued before what uses them."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        def maybe(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else change(tensor)

        text, given = self.text, self.conditions
        tensors = {kind: change(tensor) for kind, tensor in given.tensors.items()}
        return Batch(
            change(self.clean_BCFHW),
            change(self.noise_BCFHW),
            change(self.sigma_B),
            TextBatch(change(text.embeds_BLD), maybe(text.mask_BL), maybe(text.pooled_BD)),
            replace(given, tensors=tensors, first_frame_B=maybe(given.first_frame_B), fps_B=maybe(given.fps_B)),
        )


@dataclass(frozen=True)
class Samples:
    """The training clips of a job, and the batches of any step. `device` is where they will be used."""

    job: Job
    family: Family
    variant: Variant
    encoded: Encoded
    items: tuple[EncodedItem, ...]
    order: Order
    device: torch.device
    dtype: torch.dtype
    memory: PinnedMemory | None = None
    """What the training pins. None: batches are not pinned."""

    @classmethod
    def of(cls, job: Job, family: Family, variant: Variant, encoded: Encoded, device: torch.device, dtype: torch.dtype) -> Samples:
        items = tuple(item for item in encoded.items if not item.held_out)
        order = Order(
            [(item.num_frames, item.height, item.width) for item in items],
            [item.repeats for item in items],
            job.batch_size,
            job.accumulation,
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
        """The tensors of one micro-batch on the CPU, pinned for a CUDA device; noise levels lie between the two of `sigmas`.

        A function of (job, data, step) that touches no global generator, so that any thread may build it.
        """
        items = [self.items[clip] for clip in micro.clips]
        clean = torch.stack([self.encoded.latents_CFHW(item) for item in items])
        draws = [
            draw_sample(self.job.noise, self.job.caption_dropout, self.job.seed, step, micro.first + i, tuple(clean.shape[1:]), sigmas)  # type: ignore[arg-type]
            for i in range(len(items))
        ]
        texts = [clip_text(self.encoded, item, draw.drop_caption) for draw, item in zip(draws, items, strict=True)]
        batch = Batch(
            clean,
            torch.stack([draw.noise_CFHW for draw in draws]),
            torch.tensor([draw.sigma for draw in draws], dtype=torch.float32),
            self.family.collate_text(texts, torch.device("cpu"), self.dtype),
            self._conditions(step, micro, items, clean),
        )
        return batch.pinned(self.memory) if self.memory and self.device.type == "cuda" else batch

    def _conditions(self, step: int, micro: MicroBatch, items: list[EncodedItem], clean_BCFHW: torch.Tensor) -> Conditions:
        probability = first_frame_probability(self.job, self.family.first_frame(self.variant))
        keep = [draws_first_frame(probability, self.job.seed, step, micro.first + i) for i in range(len(items))]
        return clip_conditions(self.job, self.family, self.variant, self.encoded, items, clean_BCFHW, keep)
