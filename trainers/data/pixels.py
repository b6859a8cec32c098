"""Pictures as arrays: turning, scaling and cropping."""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

from ..errors import MissingPackage

if TYPE_CHECKING:
    from numpy.typing import NDArray


def orient(frame_HWC: NDArray[np.uint8], matrix: tuple[int, int, int, int]) -> NDArray[np.uint8]:
    """The picture as it is to be shown. `matrix` (a, b, c, d) moves a pixel from (x, y) to (ax + cy, bx + dy).

    Any of the eight turns and mirrorings, as containers and EXIF state them; another matrix (a slanted picture) is read as
    the nearest of them that keeps the axes.
    """
    a, b, c, d = matrix
    if a == 0:
        frame_HWC = frame_HWC.transpose(1, 0, 2)
        a, d = c, b
    return np.ascontiguousarray(frame_HWC[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1])


def resize_crop(frames: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """Frames (..., H, W, C) scaled to cover `height` x `width` pixels, and cropped to it around the centre.

    Shrinking averages areas, enlarging is bicubic. Raises MissingPackage without OpenCV.
    """
    *lead, old_height, old_width, channels = frames.shape
    if (old_height, old_width) == (height, width):
        return frames
    flat = frames.reshape(-1, old_height, old_width, channels)
    return np.stack([_resize_crop(frame, height, width) for frame in flat]).reshape(*lead, height, width, channels)


def _resize_crop(frame_HWC: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    cv2 = opencv()
    old_height, old_width = frame_HWC.shape[:2]
    scale = max(height / old_height, width / old_width)
    new_height, new_width = max(round(old_height * scale), height), max(round(old_width * scale), width)
    method = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    resized = cv2.resize(frame_HWC, (new_width, new_height), interpolation=method)
    top, left = (new_height - height) // 2, (new_width - width) // 2
    return np.asarray(resized[top : top + height, left : left + width], np.uint8)


def opencv() -> ModuleType:
    """The module cv2, imported when it is needed. Raises MissingPackage with what to install."""
    try:
        import cv2
    except ImportError as error:  # also when the system lacks a library that the non-headless build needs
        raise MissingPackage(
            f"OpenCV cannot be imported ({error}); it scales and draws pictures. "
            "Run `pip install --force-reinstall --no-deps opencv-python-headless`, which needs no libGL."
        ) from error
    module: ModuleType = cv2
    return module
