"""The loss curve as a picture, drawn with OpenCV (a plotting library would be one more dependency to install)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Picture = npt.NDArray[np.uint8]

INK, GRID, RAW, SMOOTH, HELD_OUT = (60, 60, 60), (228, 228, 228), (176, 206, 240), (31, 105, 190), (214, 102, 28)
LEFT, RIGHT, TOP, BOTTOM = 80, 24, 48, 56


@dataclass(frozen=True)
class _Axes:
    """From data to pixels; `y` is linear between `low` and `high`."""

    width: int
    height: int
    first: float
    last: float
    low: float
    high: float

    def x(self, step: float) -> int:
        return round(LEFT + (step - self.first) / max(self.last - self.first, 1e-9) * (self.width - LEFT - RIGHT))

    def y(self, value: float) -> int:
        share = (value - self.low) / max(self.high - self.low, 1e-12)
        return round(self.height - BOTTOM - min(max(share, 0.0), 1.0) * (self.height - TOP - BOTTOM))


def loss_plot(metrics: Sequence[dict[str, Any]], title: str, width: int = 960, height: int = 480) -> Picture:
    """An RGB picture (H, W, 3) of the loss of each step, its running mean, and the held-out loss if there is one."""
    import cv2

    canvas: Picture = np.full((height, width, 3), 255, np.uint8)
    steps = [line["step"] for line in metrics]
    losses = [line["loss"] for line in metrics]
    held_out = [(line["step"], line["held_out_loss"]) for line in metrics if "held_out_loss" in line]
    cv2.putText(canvas, title, (LEFT, 30), cv2.FONT_HERSHEY_SIMPLEX, 0.7, INK, 1, cv2.LINE_AA)
    if not metrics:
        return canvas
    smooth = running_mean(losses)
    axes = _axes(width, height, steps, losses, smooth, [loss for _, loss in held_out])
    _draw_grid(canvas, axes)
    for step, loss in zip(steps, losses, strict=True):
        cv2.circle(canvas, (axes.x(step), axes.y(loss)), 2, RAW, -1, cv2.LINE_AA)
    _draw_line(canvas, axes, list(zip(steps, smooth, strict=True)), SMOOTH)
    _draw_line(canvas, axes, held_out, HELD_OUT)
    names = [("each step", RAW), ("running mean", SMOOTH), *([("held out", HELD_OUT)] if held_out else [])]
    for i, (name, colour) in enumerate(names):
        x = width - RIGHT - 150 * (len(names) - i)
        cv2.line(canvas, (x, 25), (x + 22, 25), colour, 3, cv2.LINE_AA)
        cv2.putText(canvas, name, (x + 30, 30), cv2.FONT_HERSHEY_SIMPLEX, 0.5, INK, 1, cv2.LINE_AA)
    return canvas


def running_mean(losses: Sequence[float], share: float = 0.05) -> list[float]:
    """Exponential mean over about `share` of the steps (at least 5), corrected at the beginning."""
    decay = 1.0 - 1.0 / max(share * len(losses), 5.0)
    mean, weight, smooth = 0.0, 0.0, []
    for loss in losses:
        mean, weight = decay * mean + (1 - decay) * loss, decay * weight + (1 - decay)
        smooth.append(mean / weight)
    return smooth


def _axes(
    width: int, height: int, steps: Sequence[int], losses: Sequence[float], smooth: Sequence[float], held_out: Sequence[float]
) -> _Axes:
    """The vertical range covers every mean and 98 % of the single losses, so that one outlier does not flatten it all."""
    finite = sorted(loss for loss in losses if math.isfinite(loss))
    top = max([finite[int(0.98 * (len(finite) - 1))] if finite else 1.0, *smooth, *held_out])
    bottom = min([*finite[:1], *smooth, *held_out])
    margin = 0.05 * max(top - bottom, 1e-6)
    return _Axes(width, height, steps[0], max(steps[-1], steps[0] + 1), max(bottom - margin, 0.0), top + margin)


def _draw_grid(canvas: Picture, axes: _Axes) -> None:
    import cv2

    for value in _ticks(axes.low, axes.high):
        y = axes.y(value)
        cv2.line(canvas, (LEFT, y), (axes.width - RIGHT, y), GRID, 1)
        cv2.putText(canvas, f"{value:.3g}", (14, y + 5), cv2.FONT_HERSHEY_SIMPLEX, 0.5, INK, 1, cv2.LINE_AA)
    for value in _ticks(axes.first, axes.last):
        x, label = axes.x(value), f"{value:g}"
        cv2.line(canvas, (x, TOP), (x, axes.height - BOTTOM), GRID, 1)
        cv2.putText(canvas, label, (x - 5 * len(label), axes.height - BOTTOM + 22), cv2.FONT_HERSHEY_SIMPLEX, 0.5, INK, 1, cv2.LINE_AA)
    cv2.putText(canvas, "step", (axes.width // 2, axes.height - 10), cv2.FONT_HERSHEY_SIMPLEX, 0.5, INK, 1, cv2.LINE_AA)


def _draw_line(canvas: Picture, axes: _Axes, points: Sequence[tuple[float, float]], colour: tuple[int, int, int]) -> None:
    import cv2

    pixels = np.array([(axes.x(step), axes.y(value)) for step, value in points], np.int32).reshape(-1, 1, 2)
    if len(pixels):
        cv2.polylines(canvas, [pixels], False, colour, 2, cv2.LINE_AA)


def _ticks(low: float, high: float, about: int = 6) -> list[float]:
    """Round numbers between `low` and `high`."""
    raw = max(high - low, 1e-9) / about
    power = 10 ** math.floor(math.log10(raw))
    unit = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw)
    return [round(i * unit, 10) for i in range(math.ceil(low / unit), math.floor(high / unit) + 1)]
