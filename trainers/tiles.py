"""A video decoded in tiles that overlap, one after the other: the device holds one of them, the picture grows on the CPU.

Not the tiling of the VAE classes: they keep every tile on the device, and a family that decodes in its own way (Mochi) passes it by.

Shape suffixes: B batch, C channels, F frames, H height, W width; of latents or of pixels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

SIDES = (512, 256, 128)
"""Pixels of a tile's side, the largest first: at an edge there is less to look at, so what is decoded is a little different."""


def sides_below(height: int, width: int, own: int | None) -> tuple[int, ...]:
    """The tiles that take less than a video of this size decoded as its VAE does, in tiles of `own` pixels (None: whole)."""
    return tuple(side for side in SIDES if side < min(max(height, width), own or max(SIDES) + 1))


def decode_in_tiles(decode: Callable[[torch.Tensor], torch.Tensor], latents_BCFHW: torch.Tensor, side: int) -> torch.Tensor:
    """What `decode` makes of latents, in tiles of `side` latents: pixels (B, 3, F, H, W), on the CPU.

    Neighbours share a quarter of the side and fade into each other there. `decode` makes as many frames of every tile, and
    as many pixels of every latent.
    """
    height, width = latents_BCFHW.shape[-2:]
    video_BCFHW = total_HW = torch.zeros(())
    for top in _starts(height, side):
        for left in _starts(width, side):
            tile_BCFHW = latents_BCFHW[..., top : top + side, left : left + side]
            pixels_BCFHW = decode(tile_BCFHW).float().cpu()
            scale = pixels_BCFHW.shape[-1] // tile_BCFHW.shape[-1]
            if not total_HW.ndim:
                video_BCFHW = torch.zeros(*pixels_BCFHW.shape[:3], scale * height, scale * width)
                total_HW = torch.zeros(scale * height, scale * width)
            share_HW = _shares(top, side, height, scale)[:, None] * _shares(left, side, width, scale)
            rows, columns = (slice(scale * start, scale * (start + side)) for start in (top, left))
            video_BCFHW[..., rows, columns] += pixels_BCFHW * share_HW
            total_HW[rows, columns] += share_HW
    return video_BCFHW / total_HW


def _starts(length: int, side: int) -> list[int]:
    """Where tiles begin along an axis; the last one ends with it."""
    return [*range(0, length - side, side - _overlap(side)), max(length - side, 0)]


def _overlap(side: int) -> int:
    return max(side // 4, 1)


def _shares(start: int, side: int, length: int, scale: int) -> torch.Tensor:
    """How much each pixel of a tile counts along an axis: less and less towards an edge where another tile begins."""
    pixels, fade = scale * min(side, length), scale * _overlap(side)
    rising = ((torch.arange(pixels) + 0.5) / fade).clamp(max=1)
    inner_start, inner_end = start > 0, start + side < length
    return (rising if inner_start else torch.ones(pixels)) * (rising.flip(0) if inner_end else torch.ones(pixels))
