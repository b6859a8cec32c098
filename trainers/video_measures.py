"""What can be measured of a video by itself: flicker, consistency along its motion, sharpness. No model is needed.

All are of luminance or colours as shares of the full range, after shrinking the frames so that their shorter side has at
most 256 pixels: figures of one scene at two sizes are near each other, and 81 frames of 832x480 take about two seconds on
one core. They compare videos of the same prompt and noise; of a still or empty picture the first two are perfect.

Shape suffixes: F frames, H height, W width, C channels (3, RGB).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Frames = npt.NDArray[np.uint8]
Plane = npt.NDArray[np.float32]

SHORT_SIDE = 256
"""Pixels of the shorter side that is measured; a smaller video is measured as it is."""
MOST_PAIRS = 32
"""Pairs of neighbouring frames whose flow is computed, spread evenly over the video: most of the time goes there."""
SMALLEST_SIDE = 12
"""Pixels below which the flow cannot be computed."""


def measure(frames_FHWC: Frames) -> dict[str, float]:
    """{"flicker", "consistency", "sharpness"} of RGB frames; what a video is too short or too small for is left out."""
    small = shrink(frames_FHWC)
    luminance = luminance_of(small)
    measures = {"sharpness": sharpness(luminance)}
    if len(small) >= 3:
        measures["flicker"] = flicker(luminance)
    if len(small) >= 2 and min(small.shape[1:3]) >= SMALLEST_SIDE:
        measures["consistency"] = consistency(small)
    return measures


def shrink(frames_FHWC: Frames) -> Frames:
    """The frames with a shorter side of at most `SHORT_SIDE`, each pixel the mean of those it covers."""
    import cv2

    height, width = frames_FHWC.shape[1:3]
    scale = SHORT_SIDE / min(height, width)
    if scale >= 1:
        return frames_FHWC
    size = round(width * scale), round(height * scale)
    return np.stack([cv2.resize(np.ascontiguousarray(frame), size, interpolation=cv2.INTER_AREA) for frame in frames_FHWC])


def luminance_of(frames_FHWC: Frames) -> Plane:
    """Luma (F, H, W) in 0..1 (ITU-R BT.601)."""
    import cv2

    return np.stack([cv2.cvtColor(frame.astype(np.float32) / 255, cv2.COLOR_RGB2GRAY) for frame in frames_FHWC])


def flicker(luminance_FHW: Plane) -> float:
    """How far the brightness of whole frames jumps: 0 steady, 1 black and white in turn.

    The mean absolute distance of each frame's mean luminance from the middle of its two neighbours', so that a fade is no
    flicker. VBench (Huang et al. 2023, arXiv:2311.17982) takes the mean absolute difference of neighbouring frames, which is
    flicker in still scenes only; the mean over the frame is hardly moved by motion. Three frames are needed.
    """
    brightness = luminance_FHW.mean((1, 2), dtype=np.float64)
    return float(np.abs(brightness[1:-1] - (brightness[:-2] + brightness[2:]) / 2).mean())


def sharpness(luminance_FHW: Plane) -> float:
    """Variance of the Laplacian, mean over the frames, for luma of 0..255; 0 is flat, more is sharper.

    The kernel is [[0, 1, 0], [1, -4, 1], [0, 1, 0]] (Pech-Pacheco et al. 2000, "Diatom autofocusing in brightfield
    microscopy"), in units of 1/256 of the shorter side: the scene at half the size has about the same figure. Noise is
    sharp too.
    """
    import cv2

    variances = [float(cv2.Laplacian(plane * 255, cv2.CV_32F, ksize=1).var(dtype=np.float64)) for plane in luminance_FHW]
    return float(np.mean(variances) * (min(luminance_FHW.shape[1:]) / SHORT_SIDE) ** 4)


def consistency(frames_FHWC: Frames) -> float:
    """How far each frame is the one before it, moved: 1 perfect, 0 nothing can be followed.

    Mean over pairs of `followed * (1 - sqrt(warping_error))` (see `warp_pair`); `MOST_PAIRS` of a longer video. Both sides
    of at least `SMALLEST_SIDE` pixels are needed, and two frames.
    """
    import cv2

    flow = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    pairs = len(frames_FHWC) - 1
    starts = np.linspace(0, pairs - 1, min(pairs, MOST_PAIRS)).round().astype(int)
    results = [warp_pair(frames_FHWC[start], frames_FHWC[start + 1], flow) for start in starts]
    return float(np.mean([followed * (1 - error**0.5) for error, followed in results]))


def warp_pair(first_HWC: Frames, second_HWC: Frames, flow: Any) -> tuple[float, float]:
    """(warping error, share of pixels followed) of two frames; `flow` is an OpenCV dense optical flow.

    The warping error (Lai et al. 2018, arXiv:1808.00449) is the mean squared difference, in 0..1, of the first frame and the
    second one warped onto it, over the pixels that are followed: those whose motion there and back ends where it began
    (Sundaram et al. 2010: |w + w'|^2 <= 0.01 (|w|^2 + |w'|^2) + 0.5), inside the picture. 0 when there are none.
    """
    import cv2

    first, second = (np.ascontiguousarray(frame) for frame in (first_HWC, second_HWC))
    gray_first, gray_second = (cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in (first, second))
    there_HWC = flow.calc(gray_first, gray_second, None)
    rows, columns = np.indices(gray_first.shape, dtype=np.float32)
    x, y = columns + there_HWC[..., 0], rows + there_HWC[..., 1]
    warped = cv2.remap(second, x, y, cv2.INTER_LINEAR)
    back_HWC = cv2.remap(flow.calc(gray_second, gray_first, None), x, y, cv2.INTER_LINEAR)
    missed = _squares(there_HWC + back_HWC) > 0.01 * (_squares(there_HWC) + _squares(back_HWC)) + 0.5
    height, width = gray_first.shape
    followed = ~missed & (x >= 0) & (y >= 0) & (x <= width - 1) & (y <= height - 1)
    difference = (first[followed].astype(np.float32) - warped[followed]) / 255
    return float((difference**2).mean()) if difference.size else 0.0, float(followed.mean())


def _squares(vectors_HWC: Plane) -> Plane:
    squares: Plane = (vectors_HWC**2).sum(-1)
    return squares
