"""Writing frames as an mp4 that every browser plays."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..whole_files import written_beside


def write_video(path: Path, frames_FHWC: npt.NDArray[np.uint8], fps: float, crf: int = 14) -> None:
    """Writes RGB frames (F, H, W, 3; even sides) as H.264; `crf` 0 is lossless, 51 worst. Written beside, then renamed."""
    import av

    with written_beside(path) as partial, av.open(str(partial), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), options={"crf": str(crf), "threads": "1"})
        stream.height, stream.width, stream.pix_fmt = frames_FHWC.shape[1], frames_FHWC.shape[2], "yuv420p"
        for frame in frames_FHWC:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())
