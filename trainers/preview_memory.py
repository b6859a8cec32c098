"""What the previews of a job take of its card, beforehand: their sampling and their decoding, run on the meta device.

Convolutions take memory for themselves on a card, which this does not show. A run tries, and goes on without a preview for which
there is no room, so a plan refuses no job for its previews.

Shape suffixes: C channels, F latent frames, H and W latent height and width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from .card_kernels import AMPERE, imitated
from .checkpoint import Checkpoint
from .family import FIRST_FRAME, IMAGE_EMBEDS, Detection, Family, LatentSpec, detect_vae
from .live_bytes import LiveBytes
from .machine import size_text
from .memory_plan import ROUNDING, WORKSPACE_BYTES, MemoryPlan
from .memory_trace import StepShape, Tracer
from .offload.placement import place
from .residency import MOST_CHUNKS
from .sample import Solver
from .tiles import sides_below

if TYPE_CHECKING:
    from .job import Job

_META = torch.device("meta")
_FRAMES_TRACED = 5
"""Latent frames of a decoded video that is traced; of those after them each takes what the last one took more."""

Size = tuple[int, int, int]
"""Frames, height and width in pixels."""


@dataclass(frozen=True)
class PreviewPlan:
    """What previews of `size` take of a card that has `free_bytes` for the run.

    `sampling_bytes` and `decoding_bytes` are the most that is allocated meanwhile, in the way that fits, or else in the way that
    takes least (then `sampled` or `decoded` is False): sampling with `fewer_blocks` on the card than training has; decoding `beside`
    the transformer's weights or without them, in tiles of `tile_pixels` (None: whole). `decoding_bytes` None: it could not be
    traced. `fitting` is a smaller size that fits, if these do not.
    """

    size: Size
    sampling_bytes: int
    sampled: bool
    fewer_blocks: bool
    decoding_bytes: int | None
    decoded: bool
    beside: bool
    tile_pixels: int | None
    fitting: Size | None = None

    @property
    def fits(self) -> bool:
        return self.sampled and self.decoded

    def __str__(self) -> str:
        """One sentence or two."""
        sampling, decoding = f"{size_text(self.sampling_bytes)} to sample", "what decoding takes is not known"
        if self.decoding_bytes is not None:
            decoding = f"{size_text(self.decoding_bytes)} to decode, buffers of convolutions not counted"
        if not self.fits:
            lacking = [*([sampling] if not self.sampled else []), *([decoding] if not self.decoded else [])]
            needed = f"it would take at the least {' and '.join(lacking)}, and a reserve"
            remedy = f"; {_text(self.fitting)} would fit" if self.fitting else ""
            return f"Previews of {_text(self.size)} do not fit: {needed}{remedy}. The run goes on without them."
        ways = [
            *(["fewer blocks stay on the card while they are sampled"] if self.fewer_blocks else []),
            *(["the transformer's weights leave the card while they are decoded"] if not self.beside else []),
            *([f"they are decoded in tiles of {self.tile_pixels} pixels"] if self.tile_pixels else []),
        ]
        return f"Previews of {_text(self.size)} fit ({sampling}; {decoding}){': ' if ways else ''}{', '.join(ways)}."

    def as_values(self) -> dict[str, Any]:
        """As plain values, for other programs."""
        size, fitting = (
            dict(zip(("frames", "height", "width"), size, strict=True)) if size else None for size in (self.size, self.fitting)
        )
        return {
            "size": size,
            "fits": self.fits,
            "sampling_fits": self.sampled,
            "decoding_fits": self.decoded,
            "sampling_bytes": self.sampling_bytes,
            "fewer_blocks": self.fewer_blocks,
            "decoding_bytes": self.decoding_bytes,
            "beside_weights": self.beside,
            "tile_pixels": self.tile_pixels,
            "fitting": fitting,
        }


def _text(size: Size) -> str:
    return f"{size[0]} frames of {size[2]}x{size[1]}"


def plan_previews(job: Job, detection: Detection, tracer: Tracer, clips: StepShape, plan: MemoryPlan) -> PreviewPlan | None:
    """What the job's previews take of the plan's card; None: it has none, or there is no card. `clips` is the largest batch."""
    spec = job.previews
    if not (spec.every_steps and spec.prompts) or job.base.vae is None or plan.machine.device != "cuda":
        return None
    planner = _Planner(job, detection, tracer, clips, plan, _Decoding.of(job.base.vae, detection))
    asked = planner.planned((spec.num_frames, spec.height, spec.width))
    if asked.fits:
        return asked
    return replace(asked, fitting=next((size for size in planner.smaller(asked.size) if planner.planned(size).fits), None))


@dataclass(frozen=True)
class _Planner:
    job: Job
    detection: Detection
    tracer: Tracer
    clips: StepShape
    plan: MemoryPlan
    decoding: _Decoding

    def planned(self, size: Size) -> PreviewPlan:
        sampling, sampled, fewer = self._sampled(self._shape(size))
        decoding, decoded, beside, side = self._decoded(size, beside=not fewer)
        return PreviewPlan(size, sampling, sampled, fewer, decoding, decoded, beside, side)

    def smaller(self, size: Size) -> Iterator[Size]:
        """Fewer frames, then smaller pictures too."""
        spec = self.detection.family.latent(self.detection.variant)
        frames, *sides = size
        for by in (1.0, 0.75, 0.5):
            height, width = (max(int(side * by) // spec.spatial_step, 1) * spec.spatial_step for side in sides)
            for share in (1.0, 0.5, 0.25, 0.0):
                if (by, share) != (1.0, 1.0):
                    yield spec.floor_num_frames(int(frames * share)), height, width

    def _shape(self, size: Size) -> StepShape:
        """A preview as the sampler sees it; its text is as long as the longest."""
        latents = self.detection.family.latent(self.detection.variant).shape(*size)
        extras = {
            kind: shape if kind == IMAGE_EMBEDS else (shape[0], 1 if kind == FIRST_FRAME else latents[1], *latents[2:])
            for kind, shape in self.clips.extras.items()
            if any(self.job.previews.images)
        }
        return replace(self.clips, latents_CFHW=latents, batch_size=1, extras=extras)

    def _sampled(self, shape: StepShape) -> tuple[int, bool, bool]:
        """Bytes, whether they fit, and whether fewer blocks than in training are on the card for it."""
        family, variant, price = self.detection.family, self.detection.variant, self.plan.price
        cfg = Solver.of(family, variant, 1, None, self.job.previews.cfg, 1).cfg
        stays = self._stays
        least = price.weights_bytes if stays else place(self.plan.model.blocks, 0).device_bytes + self.plan.model.beside
        chunks, needed = self.plan.arrangement.chunks, 0
        for weights, parts in ((price.weights_bytes, chunks), (least, chunks), (least, MOST_CHUNKS)):
            peak = self.tracer.sampling_bytes(shape, cfg, parts)
            needed = weights + price.trained_bytes + peak
            if self._fits(needed, peak):
                return needed, True, (weights, parts) != (price.weights_bytes, chunks) and not stays
        return needed, False, not stays

    def _decoded(self, size: Size, beside: bool) -> tuple[int | None, bool, bool, int | None]:
        """Bytes, whether they fit, whether beside the weights, and in which tiles."""
        price, needed, side = self.plan.price, 0, None
        stays = [True] if beside else []
        own = self.decoding.tile_pixels
        for with_weights, side in [*((stay, None) for stay in (*stays, False)), *((False, side) for side in sides_below(*size[1:], own))]:
            peak = self.decoding.peak(size, side)
            if peak is None:
                return None, True, True, None
            needed = price.trained_bytes + self.decoding.weights_bytes + peak + (price.weights_bytes if with_weights else 0)
            if self._fits(needed, peak):
                return needed, True, with_weights or self._stays, side
        return needed, False, self._stays, side

    @property
    def _stays(self) -> bool:
        """Whether all weights are trained: they are counted as such, and never leave the card."""
        return self.job.method == "full"

    def _fits(self, needed: int, peak: int) -> bool:
        return needed + WORKSPACE_BYTES + int(ROUNDING * peak) <= self.plan.machine.free_bytes


@dataclass(frozen=True)
class _Decoding:
    """A VAE without values, asked what decoding takes."""

    family: Family
    vae: torch.nn.Module
    spec: LatentSpec
    tile_pixels: int | None
    _known: dict[tuple[int, ...], int] = field(default_factory=dict)

    @classmethod
    def of(cls, path: str, detection: Detection) -> _Decoding:
        family, variant = detection.family, detection.variant
        found = detect_vae(Checkpoint.open(path, "vae"), family, variant)
        vae = found.family.build_vae(found).requires_grad_(False).eval()
        return cls(family, vae, family.latent(variant), found.vae.tile_pixels)

    @property
    def weights_bytes(self) -> int:
        return sum(map(_float32_bytes, (*self.vae.parameters(), *self.vae.buffers())))

    def peak(self, size: Size, side: int | None) -> int | None:
        """The most that decoding takes beside the VAE, in tiles of `side` pixels; None: it cannot be traced."""
        channels, frames, height, width = self.spec.shape(*size)
        edge = (side or self.tile_pixels or max(size[1:])) // self.spec.spatial_stride
        tile = channels, frames, min(height, max(edge, 1)), min(width, max(edge, 1))
        try:
            peak = self._extended(tile) if self.tile_pixels is None else self._traced(tile)
        except (RuntimeError, TypeError, ValueError):  # operators that know no meta tensors; none of those that are published has one
            return None
        joined = side is None and self.tile_pixels is not None
        return peak + (2 * 3 * size[0] * size[1] * size[2] * torch.float32.itemsize if joined else 0)

    def _extended(self, latents_CFHW: tuple[int, int, int, int]) -> int:
        """Of a few frames, and of the others as much as the last of these takes more."""
        channels, frames, *sides = latents_CFHW
        few = min(frames, _FRAMES_TRACED)
        peak = self._traced((channels, few, *sides))
        if frames == few:
            return peak
        return peak + (frames - few) * max(peak - self._traced((channels, few - 1, *sides)), 0)

    def _traced(self, latents_CFHW: tuple[int, ...]) -> int:
        if latents_CFHW not in self._known:
            self._known[latents_CFHW] = self._run(latents_CFHW)
        return self._known[latents_CFHW]

    def _run(self, latents_CFHW: tuple[int, ...]) -> int:
        counter = LiveBytes("meta", (*self.vae.parameters(), *self.vae.buffers()))
        with torch.no_grad(), counter, imitated(AMPERE, counter):
            self.family.decode_video(self.vae, torch.empty(1, *latents_CFHW, device=_META))
        return counter.peak


def _float32_bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * torch.float32.itemsize
