"""Clips that come as pixels, kept as lossless files that are named by their content.

Videos are H.264 in RGB without loss, stills are PNG: `read_window` gives back the very bytes, at exact times. Tried on 40
frames of 1280 x 720 (111 MB): FFV1 in Matroska takes 23 MB, but rounds times to milliseconds (24 frames a second came back
as 24.06); this preset 40 MB, read in 0.7 s; `veryfast` 26 MB, read in 3.3 s.

Shape suffixes: F frames, H and W pixels, C colours (RGB).
"""

from __future__ import annotations

import hashlib
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import av
import numpy as np
import torch

from ..errors import DatasetError, Problem
from ..whole_files import written_beside

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Pixels = NDArray[np.uint8]

_NAME_LENGTH = 20  # hexadecimal digits


def store_clip(folder: Path, images_FHWC: torch.Tensor, fps: float) -> Path:
    """The file of a clip in `folder`; written only when it is not there yet, whole or not at all.

    `images_FHWC` lies in 0..1 on any device, with 1, 3 or 4 channels (grey, RGB, RGB and opacity, which is dropped), and
    is rounded to 8 bits. One frame is a still (.png), more are a video (.mp4) of `fps` frames a second. Raises
    DatasetError for anything else.
    """
    pixels_FHWC = _eight_bits(images_FHWC)
    still = len(pixels_FHWC) == 1
    digest = hashlib.sha256(repr((pixels_FHWC.shape, None if still else fps)).encode())
    digest.update(pixels_FHWC.data)
    path = folder / f"{digest.hexdigest()[:_NAME_LENGTH]}{'.png' if still else '.mp4'}"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with written_beside(path) as partial:
            if still:
                partial.write_bytes(_png(pixels_FHWC[0]))
            else:
                _write_video(partial, pixels_FHWC, fps)
    return path


def _eight_bits(images_FHWC: torch.Tensor) -> Pixels:
    if images_FHWC.ndim != 4 or images_FHWC.shape[-1] not in (1, 3, 4) or 0 in images_FHWC.shape:
        shape = " x ".join(str(size) for size in images_FHWC.shape)
        raise DatasetError(Problem(f"it has the shape {shape}", "a clip is frames x height x width x 3", "Connect an IMAGE."))
    *sizes, channels = images_FHWC.shape
    pixels_FHWC: Pixels = np.empty((*sizes, 3), np.uint8)
    for index, image_HWC in enumerate(images_FHWC):  # one by one: a clip in float32 is large enough once
        values = image_HWC[..., : min(channels, 3)].detach().float()
        if not values.isfinite().all():
            raise DatasetError(Problem(f"frame {index} holds values that are no numbers", "pixels lie in 0..1", "Check what made it."))
        pixels_FHWC[index] = (values * 255).round().clamp(0, 255).to(torch.uint8).cpu().numpy()
    return pixels_FHWC


def _png(pixels_HWC: Pixels) -> bytes:
    encoder = av.CodecContext.create("png", "w")
    encoder.height, encoder.width = pixels_HWC.shape[:2]
    encoder.pix_fmt, encoder.time_base = "rgb24", Fraction(1)
    packets = [*encoder.encode(av.VideoFrame.from_ndarray(pixels_HWC, format="rgb24")), *encoder.encode(None)]
    return b"".join(bytes(packet) for packet in packets)


def _write_video(path: Path, pixels_FHWC: Pixels, fps: float) -> None:
    lossless = {"qp": "0", "preset": "ultrafast", "threads": "1"}
    with av.open(str(path), "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("libx264rgb", rate=Fraction(fps).limit_denominator(1001), options=lossless)
        stream.height, stream.width, stream.pix_fmt = pixels_FHWC.shape[1], pixels_FHWC.shape[2], "rgb24"
        for pixels_HWC in pixels_FHWC:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels_HWC, format="rgb24")))
        container.mux(stream.encode())
