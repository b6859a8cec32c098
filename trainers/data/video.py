"""Reading clips: what a file holds, and the frames of a window of it at the rate that a model wants.

Files are read by PyAV (mp4, mov, webm, mkv, gif; png, jpg, webp and bmp as clips of one frame). Sizes and frames are as a
player shows them: rotation and mirroring by metadata, and pixels that are not square, are applied.

Shape suffixes: F frames, H and W pixels, C colours (RGB). Times are seconds since the first frame.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import av
import numpy as np
from av.sidedata.sidedata import Type as SideDataType
from av.stream import Disposition

from ..errors import DatasetError, Problem
from .pixels import orient, resize_crop

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream
    from numpy.typing import NDArray

VIDEO_SUFFIXES = frozenset({".mp4", ".m4v", ".mov", ".webm", ".mkv", ".gif"})
IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})

_DEMUXERS = "mov,matroska,gif,png_pipe,jpeg_pipe,webp_pipe,bmp_pipe"
"""Nothing else is opened: a playlist, whatever its name, could make FFmpeg open other files or the network."""

_INDEXED_SUFFIXES = frozenset({".mp4", ".m4v", ".mov"})
"""Their header says all that FFmpeg would find out of other containers by decoding: a 720p file opens in 4 ms, not 15."""

_EARLY = 0.45
"""A frame may be shown this share of a frame early. Containers round times (Matroska to 1 ms, GIF to 10 ms); without it a
24 fps file resampled to 24 fps would repeat and skip frames. Below one half, so that no usual ratio of rates is a tie."""

_REORDERED_FRAMES = 4
"""The last packet of a stream may be shown this many frames before its end (B-frames)."""

_LONGER_SOUND_SECONDS = 1.0
"""Where only the whole file's duration is known, the sound may be this much longer than the video."""

_TURNS = ((1, 0, 0, 1), (0, -1, 1, 0), (-1, 0, 0, -1), (0, 1, -1, 0))
"""Display matrices of quarter turns against the clock."""


@dataclass(frozen=True)
class VideoInfo:
    """What a file holds.

    `width` and `height` as shown, in pixels. `num_frames` and `fps` (the average) are the container's word; where it gives
    no count, they follow from its duration. An image has one frame, no rate and no duration (0.0).
    """

    kind: Literal["video", "image"]
    num_frames: int
    fps: float
    width: int
    height: int
    duration_seconds: float

    def num_frames_at(self, fps: float) -> int:
        """How many frames there are after resampling to `fps`: those whose time lies before the end."""
        if self.kind == "image":
            return 1
        return max(math.ceil(self.duration_seconds * fps - 0.05), 1)


def probe(path: Path) -> VideoInfo:
    """What a file holds, by its header, its first frame and its last packet.

    Raises DatasetError when it is empty, damaged, cut short, without video or a video of one frame; OSError when it cannot
    be read.
    """
    with _open(path) as (container, stream):
        first = _first_frame(container, stream)
        height, width = _shown_size(first, stream)
        if _is_image(container):
            return VideoInfo("image", 1, 0.0, width, height, 0.0)
        _check_more_than_one_frame(container, stream)
        duration, num_frames = _extent(container, stream)
        if not duration > 0:
            raise _unusable(f"it lasts {duration} seconds", "a video lasts longer than none")
        return VideoInfo("video", num_frames, num_frames / duration, width, height, duration)


def read_window(path: Path, start_seconds: float, num_frames: int, fps: float, size: tuple[int, int] | None = None) -> NDArray[np.uint8]:
    """`num_frames` frames from `start_seconds` on, resampled to `fps`: uint8 frames_FHWC, RGB.

    Frame k is the one that a player shows at `start_seconds + k / fps`. With `size` (height, width) every frame goes
    through `resize_crop` as it is decoded, so that memory holds the window at its final size only. Nothing before the key
    frame ahead of the window is decoded, and nothing after it. Of an image, every frame is the same.

    Raises DatasetError when the file ends before the window does or cannot be decoded; OSError when it cannot be read.
    """
    with _open(path) as (container, stream):
        stream.thread_type = "AUTO"
        wanted = [start_seconds + k / fps for k in range(num_frames)]
        rate = float(stream.average_rate or fps)
        early = _EARLY / max(rate, fps)
        frames: list[NDArray[np.uint8]] = []
        for frame, shown in _shown_at(_frames_from(container, stream, start_seconds + early), wanted, early, 1 / rate):
            pixels = _pixels(frame, stream)
            frames.extend([pixels if size is None else resize_crop(pixels, *size)] * shown)
        if _is_image(container) and frames:
            frames = frames[:1] * num_frames
        if len(frames) < num_frames:
            end = start_seconds + len(frames) / fps
            raise _unusable(f"it ends at {end:.2f} seconds", f"{num_frames / fps:.2f} seconds from {start_seconds:.2f} on were to be read")
        return np.stack(frames)


def _unusable(value: str, rule: str, remedy: str = "Export it again.") -> DatasetError:
    return DatasetError(Problem(value, rule, remedy))


class _Nameless:
    """An open file without its name: FFmpeg would read patterns (`%d`) and protocols (`http:`) out of it."""

    def __init__(self, file: Any) -> None:
        self.read, self.seek, self.tell = file.read, file.seek, file.tell


@contextmanager
def _open(path: Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    """The container and its video stream; FFmpeg's errors become DatasetErrors."""
    options = {"format_whitelist": _DEMUXERS}
    if path.suffix.lower() in _INDEXED_SUFFIXES:
        options["skip_frame"] = "all"  # while it opens, not afterwards
    with open(path, "rb") as file:
        if not file.read(1):
            raise _unusable("the file is empty (0 bytes)", "a clip needs frames", "Copy it again.")
        file.seek(0)
        try:
            with av.open(_Nameless(file), options=options) as container:
                opened = cast("InputContainer", container)
                _check_gif_is_whole(file, opened)
                yield opened, _video_stream(opened)
        except (av.FFmpegError, EOFError) as error:
            raise _unusable(f"it cannot be decoded ({_ffmpeg_message(error)})", "the file must be a whole video or image") from error


def _ffmpeg_message(error: Exception) -> str:
    return str(getattr(error, "strerror", "") or error or type(error).__name__).lower()


def _check_gif_is_whole(file: Any, container: InputContainer) -> None:
    """A GIF has no index and no length: only the mark at its end tells that nothing is missing."""
    if container.format.name != "gif":
        return
    position = file.tell()
    file.seek(-min(64, file.seek(0, 2)), 2)
    tail = file.read().rstrip(b"\0")
    file.seek(position)
    if not tail.endswith(b";"):
        raise _unusable("the file is cut short", "a GIF ends with its end mark", "Copy it again.")


def _video_stream(container: InputContainer) -> VideoStream:
    streams = [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]
    if not streams:
        kinds = ", ".join(sorted({stream.type for stream in container.streams})) or "nothing"
        raise _unusable(f"no video stream (it holds {kinds})", "a clip needs pictures", "Use a file with video.")
    stream = streams[0]
    if cast("Any", stream).codec_context is None:  # decoding would end the process in PyAV before 18.1
        raise _unusable("the video stream cannot be decoded (its kind is not told)", "the file must be a whole video or image")
    if _is_image(container):
        stream.codec_context.options = {"err_detect": "explode"}  # else FFmpeg fills what is missing with grey
    return stream


def _is_image(container: InputContainer) -> bool:
    return container.format.name.endswith("_pipe")


def _first_frame(container: InputContainer, stream: VideoStream) -> VideoFrame:
    for frame in container.decode(stream):
        return frame
    raise _unusable("not one frame can be decoded", "a clip needs frames")


def _check_more_than_one_frame(container: InputContainer, stream: VideoStream) -> None:
    count = stream.frames
    if not count:
        container.seek(0)
        count = sum(1 for _ in islice((packet for packet in container.demux(stream) if packet.size), 2))
    if count < 2:
        raise _unusable("one frame", "a video needs at least two", "Save it as an image (png) to train on a still.")


def _extent(container: InputContainer, stream: VideoStream) -> tuple[float, int]:
    """(duration in seconds, number of frames). Raises DatasetError when the file ends before they do."""
    rate = float(stream.average_rate or 0) or 25.0
    video_seconds = _stated_duration(stream)
    stated = video_seconds or (container.duration or 0) / av.time_base
    if not stated:  # streamed into the file: every packet is read, none decoded
        container.seek(0)
        return _packets_end(container, stream, rate)
    indexed = container.format.name.startswith("mov") and stream.frames > 0
    if not indexed:  # Matroska counts from zero, not from the first frame
        stated -= _start_seconds(stream)
    end = _last_packet_end(container, stream, stated, rate, indexed)
    slack = (_REORDERED_FRAMES if indexed else 0.5) / rate + 0.02
    if end < stated - (slack if video_seconds else max(slack, _LONGER_SOUND_SECONDS)):
        raise _unusable(f"the file is cut short: its end, at {stated:.2f} seconds, is missing", "a clip must be whole", "Copy it again.")
    duration = stated if indexed else end
    return duration, stream.frames or max(round(duration * rate), 2)


def _start_seconds(stream: VideoStream) -> float:
    return float((stream.start_time or 0) * stream.time_base) if stream.time_base else 0.0


def _stated_duration(stream: VideoStream) -> float | None:
    """Seconds of video by the header: the stream's field or Matroska's tag; None when there is neither."""
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    try:
        hours, minutes, seconds = stream.metadata.get("DURATION", "").split(":")
        return (int(hours) * 60 + int(minutes)) * 60 + float(seconds) or None
    except ValueError:
        return None


def _last_packet_end(container: InputContainer, stream: VideoStream, duration: float, rate: float, indexed: bool) -> float:
    """When the last packet that is there ends, in seconds. Where every frame is indexed only that one is read."""
    assert stream.time_base is not None
    start = stream.start_time or 0
    container.seek(start + int(duration / stream.time_base), stream=stream, any_frame=indexed)
    return _packets_end(container, stream, rate)[0]


def _packets_end(container: InputContainer, stream: VideoStream, rate: float) -> tuple[float, int]:
    """(end of the last whole packet in seconds, number of packets) from here to the end of the file."""
    assert stream.time_base is not None
    end, count, start = 0.0, 0, stream.start_time or 0
    for packet in container.demux(stream):
        if packet.size and packet.pts is not None and not packet.is_corrupt:
            length = float(packet.duration * stream.time_base) if packet.duration else 1 / rate
            end = max(end, float((packet.pts - start) * stream.time_base) + length)
            count += 1
    return end, count


def _frames_from(container: InputContainer, stream: VideoStream, seconds: float) -> Iterator[tuple[float, float, VideoFrame]]:
    """(time, length, frame) in order of time, from a frame that is shown at or before `seconds` on."""
    assert stream.time_base is not None
    start = stream.start_time or 0
    if seconds > 1 and not _is_image(container):
        container.seek(start + int(seconds / stream.time_base), stream=stream)
        decoded = _timed(container, stream, start)
        first = next(decoded, None)
        if first is not None and first[0] <= seconds:
            yield first
            yield from decoded
            return
        container.seek(0)  # the index led past the frame: read from the front
    yield from _timed(container, stream, start)


def _timed(container: InputContainer, stream: VideoStream, start: int) -> Iterator[tuple[float, float, VideoFrame]]:
    assert stream.time_base is not None
    for frame in container.decode(stream):
        pts = start if frame.pts is None else frame.pts
        yield float((pts - start) * stream.time_base), float((frame.duration or 0) * stream.time_base), frame


def _shown_at(
    frames: Iterator[tuple[float, float, VideoFrame]], wanted: list[float], early: float, interval: float
) -> Iterator[tuple[VideoFrame, int]]:
    """(frame, how many of the wanted times it is shown at), for the frames that are shown at all.

    A frame is shown from its time (less `early`) until the next one's; the last for its own length or `interval`.
    """
    done = 0
    shown: VideoFrame | None = None
    end = 0.0
    for time, length, frame in frames:
        until = done
        while until < len(wanted) and wanted[until] < time - early:
            until += 1
        if shown is not None and until > done:
            yield shown, until - done
            done = until
        if done == len(wanted):
            return
        shown, end = frame, time + max(length, interval)
    until = sum(time <= end + early for time in wanted)
    if shown is not None and until > done:
        yield shown, until - done


def _shown_size(frame: VideoFrame, stream: VideoStream) -> tuple[int, int]:
    """(height, width) in pixels as shown."""
    height, width = frame.height, _square_width(frame, stream)
    turned = _matrix(frame)[0] == 0
    return (width, height) if turned else (height, width)


def _square_width(frame: VideoFrame, stream: VideoStream) -> int:
    """The width that makes the frame's pixels square."""
    aspect = stream.sample_aspect_ratio
    return max(round(frame.width * aspect), 1) if aspect else frame.width


def _pixels(frame: VideoFrame, stream: VideoStream) -> NDArray[np.uint8]:
    """The frame as it is to be shown, frame_HWC."""
    if frame.is_corrupt:
        raise _unusable(f"the frame at {frame.time or 0:.2f} seconds is damaged", "every frame must be whole")
    stored_HWC = frame.to_ndarray(format="rgb24", width=_square_width(frame, stream), height=frame.height)
    return orient(np.asarray(stored_HWC, np.uint8), _matrix(frame))


def _matrix(frame: VideoFrame) -> tuple[int, int, int, int]:
    """How the picture is turned and mirrored for showing: the signs (a, b, c, d) of FFmpeg's display matrix."""
    try:
        side_data = cast(Any, frame.side_data).get(SideDataType.DISPLAYMATRIX)
    except ValueError:  # PyAV lists no side data at all when one kind is new to it, as a photo's EXIF block is
        return _TURNS[round(frame.rotation / 90) % 4]
    if side_data is None:
        return _TURNS[0]
    a, b, _, c, d = (int(value) for value in np.sign(np.frombuffer(bytes(side_data), np.int32)[:5]))
    return a, b, c, d
