"""Videos from noise, with the model that is being trained: previews, and the demo's before and after.

Shape suffixes: B batch, C channels, F frames, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from .family import Conditions, Family, TextRecord, Variant
from .tiles import decode_in_tiles

TransformerAt = Callable[[float], torch.nn.Module]
"""What answers at a noise level: one and the same transformer, or one of two experts."""


@dataclass(frozen=True)
class Solver:
    """How noise becomes a video: Euler along `sigmas` (from 1 down to 0), with guidance `cfg` (1: none)."""

    sigmas: Sequence[float]
    cfg: float

    @classmethod
    def of(cls, family: Family, variant: Variant, steps: int | None, shift: float | None, cfg: float | None, tokens: int) -> Solver:
        """The family's own way, with what is given put in its place; `tokens` is what the transformer sees of the video."""
        default = family.sampling(variant)
        sigmas = default.schedule(steps or default.steps, shift if shift is not None else default.shift, tokens)
        return cls(sigmas, cfg if cfg is not None else default.cfg)


def preview_noise(seed: int, shape_CFHW: tuple[int, int, int, int]) -> torch.Tensor:
    """The noise of one preview: the same on every GPU (and, to 2e-6, on every CPU)."""
    return torch.randn(shape_CFHW, generator=torch.Generator("cpu").manual_seed(seed))


@torch.no_grad()
def sample_latents(
    family: Family,
    variant: Variant,
    transformer_at: TransformerAt,
    noise_BCFHW: torch.Tensor,
    prompts: Sequence[TextRecord],
    negative: TextRecord,
    solver: Solver,
    dtype: torch.dtype,
    progress: Callable[[int, int], None] | None = None,
    conditions: Conditions | None = None,
) -> torch.Tensor:
    """Clean latents (B, C, F, H, W) from noise, one prompt for each. Guidance: Ho & Salimans 2022, arXiv:2207.12598.

    `transformer_at` gives the transformer for a noise level. What `conditions` give (a first frame) is in the result as it was given.
    """
    device = noise_BCFHW.device
    text = family.collate_text(prompts, device, dtype)
    no_text = family.collate_text([negative] * len(prompts), device, dtype)
    latents = noise_BCFHW.float()
    steps = len(solver.sigmas) - 1
    for i in range(steps):
        sigma, next_sigma = solver.sigmas[i], solver.sigmas[i + 1]
        inputs = family.prepare(variant, latents, torch.full((len(prompts),), sigma, device=device), conditions or Conditions())
        transformer = transformer_at(sigma)
        velocity = family.predict(transformer, inputs, text).float()
        if solver.cfg != 1.0:
            without = family.predict(transformer, inputs, no_text).float()
            velocity = without + solver.cfg * (velocity - without)
        latents = latents + (next_sigma - sigma) * velocity
        if inputs.loss_mask is not None:
            latents = torch.where(inputs.loss_mask.bool(), latents, inputs.latents_BCFHW)
        if progress:
            progress(i + 1, steps)
    return latents


@torch.no_grad()
def decode_frames(family: Family, vae: torch.nn.Module, latents_BCFHW: torch.Tensor, tile: int | None = None) -> list[torch.Tensor]:
    """Each video as uint8 frames (F, H, W, C) on the CPU. `tile`: decoded in tiles of so many latents; None: whole."""
    videos = []
    for latents in latents_BCFHW:
        decoded = (
            decode_in_tiles(partial(family.decode_video, vae), latents[None], tile) if tile else family.decode_video(vae, latents[None])
        )
        pixels_CFHW = decoded[0].cpu().float().clamp(-1, 1)  # the device need not hold what is rounded
        frames_FHWC = ((pixels_CFHW + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 3, 0)
        videos.append(frames_FHWC)
    return videos
