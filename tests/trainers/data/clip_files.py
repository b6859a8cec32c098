"""Real files for the tests: small videos and images whose frames tell their number."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np

CODECS = {".gif": ("gif", "rgb8"), ".webm": ("libvpx-vp9", "yuv420p")}


def numbered(index: int, height: int = 48, width: int = 64) -> np.ndarray:
    """A frame with its number in grey: value 4 * index + 8, uint8 (H, W, 3)."""
    return np.full((height, width, 3), 4 * index + 8, np.uint8)


def numbers(frames_FHWC: np.ndarray) -> list[int]:
    """The numbers of frames made by `numbered`."""
    return [round((float(frame.mean()) - 8) / 4) for frame in frames_FHWC]


def write_video(
    path: Path,
    frames: Sequence[np.ndarray] | int = 24,
    fps: float = 24,
    times_ms: Sequence[int] | None = None,
    rotation: int | None = None,
    aspect: Fraction | None = None,
    options: dict[str, str] | None = None,
    keyframes: int | None = None,
) -> Path:
    """Frames (or that many numbered ones) as a video in the container of the path's suffix."""
    frames = [numbered(index) for index in range(frames)] if isinstance(frames, int) else frames
    codec, pixel_format = CODECS.get(path.suffix.lower(), ("libx264", "yuv420p"))
    rate = Fraction(fps).limit_denominator(1001)
    with av.open(str(path), "w", options=options or {}) as container:
        stream = container.add_stream(codec, rate=rate, options={"g": str(keyframes)} if keyframes else {})
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = pixel_format
        stream.codec_context.time_base = Fraction(1, 1000) if times_ms else 1 / rate
        if aspect is not None:
            stream.codec_context.sample_aspect_ratio = aspect
        for index, array in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(array), format="rgb24").reformat(format=pixel_format)
            frame.pts = times_ms[index] if times_ms else index
            frame.time_base = stream.codec_context.time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    if rotation is not None:
        _rotate(path, rotation)
    return path


def _rotate(path: Path, degrees: int) -> None:
    """Set the matrix of an MP4's track header (ISO/IEC 14496-12, 8.3.2), counter-clockwise; PyAV before 17.1 cannot."""
    across, up = {90: (0, -1), -90: (0, 1), 180: (-1, 0)}[degrees]
    one = 1 << 16
    matrix = struct.pack(">9i", across * one, up * one, 0, -up * one, across * one, 0, 0, 0, 1 << 30)
    content = bytearray(path.read_bytes())
    start = content.index(b"tkhd") + 4 + 40
    content[start : start + len(matrix)] = matrix
    path.write_bytes(content)


def write_sound(path: Path) -> Path:
    """A file with a second of silence and no picture."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        for resampled in av.AudioResampler("fltp", "mono", 16000, 1024).resample(frame):
            container.mux(stream.encode(resampled))
        container.mux(stream.encode(None))
    return path


def write_image(path: Path, pixels: np.ndarray) -> Path:
    """RGB pixels (H, W, 3) as an image of the path's suffix."""
    done, content = cv2.imencode(path.suffix, pixels[..., ::-1])
    assert done
    path.write_bytes(content.tobytes())
    return path


def write_caption(clip: Path, text: str = "a caption") -> None:
    clip.with_suffix(".txt").write_text(text, "utf-8")


def cut(source: Path, target: Path, share: float) -> Path:
    """The first `share` of a file's bytes."""
    content = source.read_bytes()
    target.write_bytes(content[: int(len(content) * share)])
    return target
