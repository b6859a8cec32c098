"""The frames of a control, brought to the size of a video that the model can make, and what was done to them in words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import comfy.utils
import torch

from ..trainers.errors import Problem


@dataclass(frozen=True)
class Grid:
    """Which videos a model makes: sides that are multiples of `step` pixels, `stride` n + 1 frames.

    A latent stands for `stride` frames (the first one: for one) and `spatial_stride` pixels.
    """

    step: int
    stride: int
    spatial_stride: int

    def size(self, latents_BCFHW: torch.Tensor) -> VideoSize:
        """The size of the video that latents stand for."""
        frames, height, width = latents_BCFHW.shape[2:]
        return VideoSize(width * self.spatial_stride, height * self.spatial_stride, (frames - 1) * self.stride + 1)

    def floor_frames(self, frames: int) -> int:
        """The largest allowed number of frames that is at most `frames`, which is 1 or more."""
        return (frames - 1) // self.stride * self.stride + 1


@dataclass(frozen=True)
class VideoSize:
    """Pixels and frames."""

    width: int
    height: int
    frames: int

    def __str__(self) -> str:
        return f"{self.width} x {self.height}, {self.frames} frame{'s' if self.frames > 1 else ''}"


def grid_of(model: Any, vae: Any) -> Grid:
    """The grid of a MODEL with its VAE."""
    stride, spatial_stride, _ = vae.downscale_index_formula
    patch = getattr(model.model.diffusion_model, "patch_size", (1, 1, 1))[-1]
    return Grid(spatial_stride * patch, stride, spatial_stride)


def size_of(frames_FHWC: torch.Tensor) -> VideoSize:
    frames, height, width = frames_FHWC.shape[:3]
    return VideoSize(width, height, frames)


def own_size(found: VideoSize, grid: Grid) -> VideoSize:
    """The largest allowed size that is at most the control's own. Raises ValueError for a control that is too small."""
    width, height = (side // grid.step * grid.step for side in (found.width, found.height))
    if not width or not height:
        rule = f"a video is at least {grid.step} x {grid.step} pixels"
        raise ValueError(str(Problem(f"the control is {found.width} x {found.height}", rule, "Use a larger control.")))
    return VideoSize(width, height, grid.floor_frames(found.frames))


def resized(frames_FHWC: torch.Tensor, size: VideoSize) -> torch.Tensor:
    """The first `size.frames` frames, scaled to cover the size and cropped around the middle; three channels."""
    frames_FCHW = frames_FHWC[: size.frames, :, :, :3].movedim(-1, 1)
    if tuple(frames_FCHW.shape[2:]) != (size.height, size.width):
        shrinks = frames_FCHW.shape[2] >= size.height and frames_FCHW.shape[3] >= size.width
        method = "area" if shrinks else "bilinear"
        frames_FCHW = comfy.utils.common_upscale(frames_FCHW, size.width, size.height, method, "center")
    return frames_FCHW.movedim(1, -1)


def told(found: VideoSize, used: VideoSize, grid: Grid) -> str:
    """What became of a control, for the report."""
    if found == used:
        return f"control: {found}"
    return f"control: {found} -> {used} (multiples of {grid.step} pixels, {grid.stride}n+1 frames)"
