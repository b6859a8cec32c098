"""Which windows of which clips are encoded, and at which size: buckets of width x height x frames by the family's rules."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Literal

from ..errors import DatasetError, Problem
from ..family import LatentSpec
from .captions import shown
from .scan import Clip, Dataset, Rejected

MAX_ASPECT = 3.0
"""Longer or taller clips are cropped to this ratio of sides (or to the asked one, when that is longer)."""

MIN_AREA_SHARE = 0.25
"""A token bound may shrink a clip to this share of the asked area; beyond, the clip is refused."""


@dataclass(frozen=True)
class Geometry:
    """How clips become windows. Problems of the numbers are found by `plan_windows` before any file is opened."""

    width: int = 832
    """Pixels; with `bucketing`, width x height is the area that every clip gets, at most."""
    height: int = 480
    """Pixels."""
    num_frames: int = 81
    """Frames of a window. A video too short for them gets the longest allowed length that it fills."""
    fps: float | None = None
    """Frames per second after resampling; None: the model's own."""
    bucketing: bool = True
    """Keep each clip's shape (its own width and height at the same area); otherwise crop all to width x height."""
    max_tokens: int | None = None
    """Most tokens of one window in the transformer; larger ones shrink."""
    clip_mode: Literal["first", "spread", "all"] = "first"
    """The first window of a video, windows spread evenly over it, or one after the other until its end."""
    clips_per_video: int | None = None
    """Most windows of one video with "spread" and "all"; None: as many as fit side by side."""


@dataclass(frozen=True)
class Window:
    """A part of a clip, with its size in pixels after scaling and cropping."""

    clip: Clip
    start_seconds: float
    num_frames: int
    height: int
    width: int
    fps: float


@dataclass(frozen=True)
class Plan:
    """The windows that will be encoded, and the clips that give none."""

    windows: tuple[Window, ...]
    rejected: tuple[Rejected, ...]


def plan_windows(dataset: Dataset, geometry: Geometry, spec: LatentSpec) -> Plan:
    """The windows of every clip, in the clips' order. Opens no file.

    Raises DatasetError with all that is wrong with the geometry, or when no clip gives a window.
    """
    if problems := geometry_problems(geometry, spec):
        raise DatasetError(problems, subject="The geometry")
    windows: list[Window] = []
    rejected: list[Rejected] = []
    for clip in dataset.clips:
        try:
            windows.extend(_windows(clip, geometry, spec))
        except DatasetError as error:
            rejected.append(Rejected(shown(clip.name), error.problems[0]))
    if not windows:
        raise DatasetError(list(dict.fromkeys(item.problem for item in rejected))[:20], subject="No clip gives a window")
    return Plan(tuple(windows), tuple(rejected))


def geometry_problems(geometry: Geometry, spec: LatentSpec) -> list[Problem]:
    """Everything that is wrong with the numbers; empty when nothing is."""
    found = spec.problems(geometry.num_frames, geometry.height, geometry.width)
    bounds = {"max_tokens": geometry.max_tokens, "clips_per_video": geometry.clips_per_video}
    for name, value in bounds.items():
        if value is not None and value < 1:
            found.append(Problem(f"{name} is {value}", "it is a count from 1", "Leave it out for no bound."))
    if geometry.fps is not None and not 1 <= geometry.fps <= 240:
        found.append(Problem(f"fps is {geometry.fps}", "it lies between 1 and 240", f"Leave it out for the model's {spec.fps:g}."))
    if geometry.clip_mode not in ("first", "spread", "all"):
        found.append(Problem(f"clip_mode is {geometry.clip_mode!r}", "it is first, spread or all", "Use first."))
    return found


def _windows(clip: Clip, geometry: Geometry, spec: LatentSpec) -> Iterator[Window]:
    fps = geometry.fps or spec.fps
    num_frames = _num_frames(clip, geometry, spec, fps)
    height, width = _size(clip.info.width / clip.info.height, num_frames, geometry, spec)
    assert not spec.problems(num_frames, height, width), "a planned window breaks the model's rules"
    for start in _starts(clip, num_frames, geometry, fps):
        yield Window(clip, start, num_frames, height, width, fps)


def _num_frames(clip: Clip, geometry: Geometry, spec: LatentSpec, fps: float) -> int:
    """The asked length, or the longest allowed one that the video fills; 1 for images."""
    if clip.kind == "image":
        return 1
    there = clip.info.num_frames_at(fps)
    num_frames = min(geometry.num_frames, spec.floor_num_frames(there))
    if num_frames == 1 < geometry.num_frames:
        shortest = spec.temporal_stride + 1
        value = f"{clip.info.duration_seconds:.2f} seconds are {there} frames at {fps:g} per second"
        raise DatasetError(Problem(value, f"the shortest video has {shortest}", "Use a longer clip, or an image for a still."))
    return num_frames


def _starts(clip: Clip, num_frames: int, geometry: Geometry, fps: float) -> list[float]:
    """Where the windows of a video start, in seconds (rounded to microseconds, so that keys are stable)."""
    if clip.kind == "image" or geometry.clip_mode == "first":
        return [0.0]
    there = clip.info.num_frames_at(fps)
    count = min(there // num_frames, geometry.clips_per_video or there)
    step = (there - num_frames) / max(count - 1, 1) if geometry.clip_mode == "spread" else num_frames
    return [round(int(step * index) / fps, 6) for index in range(count)]


def _size(aspect: float, num_frames: int, geometry: Geometry, spec: LatentSpec) -> tuple[int, int]:
    """(height, width) in pixels for a clip of `aspect` (width / height), within the area and the token bound."""
    step = spec.spatial_step
    rows, columns = geometry.height // step, geometry.width // step
    cells = rows * columns
    if geometry.max_tokens is not None:
        cells = min(cells, geometry.max_tokens // spec.tokens(num_frames, step, step))
    if cells < rows * columns * MIN_AREA_SHARE:
        raise DatasetError(_too_many_tokens(num_frames, geometry, spec))
    if not geometry.bucketing:
        aspect = columns / rows
    if cells == rows * columns and not geometry.bucketing:
        return geometry.height, geometry.width
    longest = max(MAX_ASPECT, columns / rows, rows / columns)
    height, width = _best_shape(aspect, cells, longest)
    return height * step, width * step


@cache
def _best_shape(aspect: float, cells: int, longest: float) -> tuple[int, int]:
    """(rows, columns) of at most `cells` cells, neither side more than `longest` times the other, for a clip of `aspect`.

    The best uses most of the cells and crops least: the product of both shares is largest; of two, what crops less.
    """

    def shares(shape: tuple[int, int]) -> tuple[float, float, int]:
        ratio = shape[1] / shape[0] / aspect
        kept = min(ratio, 1 / ratio)
        return round(kept * shape[0] * shape[1] / cells, 6), kept, shape[1]

    sides = [(side, cells // side - less) for side in range(1, math.isqrt(math.ceil(cells * longest)) + 1) for less in (0, 1)]
    shapes = [shape for a, b in sides if b > 0 and max(a, b) <= longest * min(a, b) for shape in ((a, b), (b, a))]
    return max(shapes, key=shares)


def _too_many_tokens(num_frames: int, geometry: Geometry, spec: LatentSpec) -> Problem:
    tokens = spec.tokens(num_frames, geometry.height, geometry.width)
    value = f"{num_frames} frames of {geometry.width} x {geometry.height} are {tokens} tokens"
    rule = f"max_tokens is {geometry.max_tokens}, less than {MIN_AREA_SHARE:.0%} of that"
    return Problem(value, rule, "Ask for fewer frames or a smaller size, or raise max_tokens.")
