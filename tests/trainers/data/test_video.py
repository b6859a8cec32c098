from __future__ import annotations

import socket
import tracemalloc
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from clip_files import cut, numbered, numbers, write_image, write_sound, write_video

from trainers.data import video
from trainers.data.pixels import orient, resize_crop
from trainers.data.video import VideoInfo, probe, read_window
from trainers.errors import DatasetError, MissingPackage

CONTAINERS = ("mp4", "mov", "mkv", "webm", "gif", "m4v")


@pytest.mark.parametrize("suffix", CONTAINERS)
def test_probe_tells_what_every_container_holds(tmp_path: Path, suffix: str):
    fps = 25 if suffix == "gif" else 24  # a GIF counts hundredths of a second
    info = probe(write_video(tmp_path / f"clip.{suffix}", 48, fps))
    assert (info.kind, info.num_frames, info.width, info.height) == ("video", 48, 64, 48)
    assert info.duration_seconds == pytest.approx(48 / fps, abs=0.002)
    assert info.fps == pytest.approx(fps, rel=0.002)


@pytest.mark.parametrize("suffix", CONTAINERS)
@pytest.mark.parametrize("fps", [16, 8, 24, 30])
def test_resampling_takes_the_frame_that_is_shown(tmp_path: Path, suffix: str, fps: int):
    path = write_video(tmp_path / f"clip.{suffix}", 48, 24)
    info = probe(path)
    count = info.num_frames_at(fps)
    assert count == 2 * fps
    early = 0.45 * 24 / max(24, fps)
    expected = [int(k * 24 / fps + early) for k in range(count)]
    found = numbers(read_window(path, 0.0, count, fps))
    if suffix == "gif":  # it stores hundredths of a second, an eighth of a frame off
        assert np.abs(np.array(found) - expected).max() <= 1
    else:
        assert found == expected


def test_the_files_own_rate_gives_every_frame_once(tmp_path: Path):
    for suffix in ("mkv", "mp4"):
        for fps in (30000 / 1001, 25, 16):
            path = write_video(tmp_path / f"clip.{suffix}", 50, fps)
            assert numbers(read_window(path, 0.0, 50, fps)) == list(range(50))


def test_frames_of_uneven_length_are_shown_by_their_times(tmp_path: Path):
    path = write_video(tmp_path / "clip.mkv", 5, 24, times_ms=[0, 40, 1000, 1040, 2000])
    assert numbers(read_window(path, 0.0, 9, 4)) == [0, 1, 1, 1, 2, 3, 3, 3, 4]


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "webm"])
def test_time_counts_from_the_first_frame_however_late_it_starts(tmp_path: Path, suffix: str):
    path = write_video(tmp_path / f"clip.{suffix}", 20, 10, times_ms=[5000 + 100 * index for index in range(20)])
    assert probe(path).duration_seconds == pytest.approx(2.0, abs=0.002)
    assert numbers(read_window(path, 0.0, 20, 10)) == list(range(20))
    assert numbers(read_window(path, 1.4, 5, 10)) == [14, 15, 16, 17, 18]


@pytest.mark.parametrize("movflags", ["frag_keyframe+empty_moov", "cmaf"])
def test_an_mp4_in_fragments_is_whole_or_refused(tmp_path: Path, movflags: str):
    path = write_video(tmp_path / "clip.mp4", 48, 24, options={"movflags": movflags}, keyframes=12)
    assert probe(path).num_frames == 48
    assert numbers(read_all(path)) == list(range(48))
    for share in (0.5, 0.8, 0.95):
        with pytest.raises(DatasetError):
            read_all(cut(path, tmp_path / "cut.mp4", share))


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "webm"])
@pytest.mark.parametrize("keyframes", [7, 250])
def test_a_window_is_the_same_whether_reached_by_seeking_or_from_the_start(tmp_path: Path, suffix: str, keyframes: int):
    path = write_video(tmp_path / f"clip.{suffix}", 60, 12, keyframes=keyframes)
    whole = read_window(path, 0.0, 60, 12)
    for start in range(0, 50, 7):
        assert np.array_equal(read_window(path, start / 12, 9, 12), whole[start : start + 9])


def test_only_the_window_is_held_in_memory(tmp_path: Path):
    frames = [numbered(index % 60, 240, 320) for index in range(400)]
    path = write_video(tmp_path / "clip.mp4", frames, 20)
    tracemalloc.start()
    window = read_window(path, 0.0, 9, 0.5, size=(16, 32))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert window.shape == (9, 16, 32, 3)
    assert peak < 8 * 240 * 320 * 3  # of 400 frames


def test_a_window_past_the_end_is_refused(tmp_path: Path):
    path = write_video(tmp_path / "clip.mp4", 24, 24)
    with pytest.raises(DatasetError, match="it ends at 1"):
        read_window(path, 0.0, 18, 16)
    with pytest.raises(DatasetError, match="it ends at"):
        read_window(path, 5.0, 5, 16)


@pytest.mark.parametrize(("rotation", "turns"), [(90, 1), (-90, -1), (180, 2)])
def test_rotation_in_the_metadata_is_applied(tmp_path: Path, rotation: int, turns: int):
    frame = np.zeros((32, 64, 3), np.uint8)
    frame[:16, :32] = 255
    path = write_video(tmp_path / "clip.mp4", [frame] * 4, 8, rotation=rotation)
    expected = np.rot90(frame, turns)
    info = probe(path)
    assert (info.height, info.width) == expected.shape[:2]
    shown = read_window(path, 0.0, 2, 8)
    assert shown.shape[1:] == expected.shape
    assert np.abs(shown[0].astype(int) - expected).mean() < 4


def test_all_eight_orientations():
    frame = np.arange(6, dtype=np.uint8).reshape(2, 3, 1)
    for matrix in [(a, 0, 0, d) for a in (1, -1) for d in (1, -1)] + [(0, b, c, 0) for b in (1, -1) for c in (1, -1)]:
        a, b, c, d = matrix
        points = {(a * x + c * y, b * x + d * y): int(frame[y, x, 0]) for y in range(2) for x in range(3)}
        left, top = min(x for x, _ in points), min(y for _, y in points)
        shown = orient(frame, matrix)
        assert all(shown[y - top, x - left, 0] == value for (x, y), value in points.items())


def test_pixels_that_are_not_square_are_shown_square(tmp_path: Path):
    path = write_video(tmp_path / "clip.mp4", 8, 8, aspect=Fraction(3, 2))
    assert probe(path).width == 96
    assert read_window(path, 0.0, 2, 8).shape == (2, 48, 96, 3)


@pytest.mark.parametrize("suffix", ["png", "jpg", "jpeg", "webp", "bmp"])
def test_an_image_is_one_frame(tmp_path: Path, suffix: str):
    pixels = np.zeros((20, 30, 3), np.uint8)
    pixels[:, 15:] = (200, 100, 50)
    path = write_image(tmp_path / f"odd %03d.{suffix}", pixels)
    assert probe(path) == VideoInfo("image", 1, 0.0, 30, 20, 0.0)
    frames = read_window(path, 0.0, 1, 16)
    assert frames.shape == (1, 20, 30, 3)
    assert np.abs(frames[0, :, 20:].astype(int) - (200, 100, 50)).max() <= 6


@pytest.mark.parametrize(("tag", "size"), [(1, (30, 20)), (3, (30, 20)), (6, (20, 30)), (8, (20, 30))])
def test_a_photo_is_turned_as_its_exif_says(tmp_path: Path, tag: int, size: tuple[int, int]):
    pixels = np.zeros((20, 30, 3), np.uint8)
    pixels[:5] = 255  # the top of the stored picture
    plain = write_image(tmp_path / "plain.jpg", pixels).read_bytes()
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0" + bytes([tag]) + b"\0\0\0\0\0\0"
    path = tmp_path / "photo.jpg"
    path.write_bytes(plain[:2] + b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif + plain[2:])
    info = probe(path)
    assert (info.width, info.height) == size
    shown = read_window(path, 0.0, 1, 16)[0].astype(int)
    expected = {1: shown[:5], 3: shown[-5:], 6: shown[:, -5:], 8: shown[:, :5]}[tag]
    assert expected.min() > 200
    assert shown.mean() < 80


@pytest.fixture(scope="module")
def noisy_files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A file of 48 incompressible frames in every container, MP4 with its index first and last."""
    folder = tmp_path_factory.mktemp("noisy")
    noise = [np.random.default_rng(index).integers(0, 255, (48, 64, 3), dtype=np.uint8) for index in range(48)]
    files = [write_video(folder / f"clip.{suffix}", noise, 24) for suffix in CONTAINERS]
    return [*files, write_video(folder / "fast.mp4", noise, 24, options={"movflags": "faststart"})]


def read_all(path: Path) -> np.ndarray:
    return read_window(path, 0.0, probe(path).num_frames_at(24), 24)


@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.9, 0.98])
def test_a_file_cut_short_is_refused_by_its_header(tmp_path: Path, noisy_files: list[Path], share: float):
    for source in noisy_files:
        with pytest.raises(DatasetError, match=r"cut short|can be decoded|cannot be decoded"):
            probe(cut(source, tmp_path / source.name, share))


def test_a_file_that_lacks_its_last_bytes_is_refused_or_still_has_every_frame(tmp_path: Path, noisy_files: list[Path]):
    refused = 0
    for source in noisy_files:
        for share in (0.99, 0.999, 0.9999):
            try:
                found = read_all(cut(source, tmp_path / source.name, share))
            except DatasetError:
                refused += 1
            else:
                assert np.array_equal(found, read_all(source))
    assert refused >= 7


def test_an_image_cut_short_is_refused(tmp_path: Path):
    noise = np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)
    for suffix in ("png", "jpg", "webp", "bmp"):
        source = write_image(tmp_path / f"clip.{suffix}", noise)
        with pytest.raises(DatasetError, match="cannot be decoded"):
            probe(cut(source, tmp_path / f"cut.{suffix}", 0.6))


def test_a_damaged_middle_gives_whole_frames_or_a_reason(tmp_path: Path, noisy_files: list[Path]):
    reasons = []
    for source in noisy_files:
        content = bytearray(source.read_bytes())
        content[len(content) // 3 : len(content) // 2] = bytes(len(content) // 2 - len(content) // 3)
        (tmp_path / source.name).write_bytes(content)
        try:
            count = len(read_all(tmp_path / source.name))
            assert count == 48 or source.suffix == ".gif"  # zeros end a GIF
        except DatasetError as error:
            reasons.append(str(error))
    assert all("again" in reason for reason in reasons)
    assert len(reasons) >= 3


def test_a_video_streamed_into_a_file_has_the_duration_of_its_packets(tmp_path: Path):
    path = write_video(tmp_path / "clip.webm", 48, 24, options={"live": "1"})
    with av.open(str(path)) as container:
        assert not container.duration
    assert probe(path).num_frames == 48
    assert probe(path).duration_seconds == pytest.approx(2.0, abs=0.002)
    assert len(read_all(path)) == 48


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan")])
def test_a_video_without_duration_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float):
    monkeypatch.setattr(video, "_extent", lambda container, stream: (seconds, 4))
    with pytest.raises(DatasetError, match="lasts longer than none"):
        probe(write_video(tmp_path / "a.mp4", 4))


def test_what_is_no_clip_is_refused(tmp_path: Path):
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("not a video")
    cases = {
        "empty.mp4": "empty",
        "text.mp4": "cannot be decoded",
        write_sound(tmp_path / "sound.mp4").name: "no video stream",
        write_video(tmp_path / "one.mp4", 1).name: "one frame",
        write_video(tmp_path / "one.mkv", 1).name: "one frame",
        write_video(tmp_path / "one.gif", 1).name: "one frame",
    }
    for name, message in cases.items():
        with pytest.raises(DatasetError, match=message):
            probe(tmp_path / name)


def test_a_playlist_opens_neither_files_nor_the_network(tmp_path: Path):
    write_video(tmp_path / "real.mp4", 4)
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        port = server.getsockname()[1]
        (tmp_path / "list.mp4").write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nhttp://127.0.0.1:{port}/a.ts\n#EXT-X-ENDLIST\n")
        (tmp_path / "concat.mp4").write_text("ffconcat version 1.0\nfile real.mp4\n")
        for name in ("list.mp4", "concat.mp4"):
            with pytest.raises(DatasetError, match="cannot be decoded"):
                probe(tmp_path / name)
        with pytest.raises(TimeoutError):
            server.accept()


def test_a_name_is_never_a_pattern_or_a_protocol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for name in ("-x.mp4", "http:x.mp4", "a%03d.mp4", "new\nline.mp4", "[b].mp4", "ü 動画.mp4", "*.mp4"):
        write_video(tmp_path / "source.mp4", 4).rename(tmp_path / name)
        assert probe(Path(name)).num_frames == 4


def test_cover_and_crop_keep_the_middle():
    frame = np.zeros((10, 40, 3), np.uint8)
    frame[:, 15:25] = 255
    assert resize_crop(frame, 10, 10).min() == 255
    assert resize_crop(np.stack([frame] * 3), 20, 20).shape == (3, 20, 20, 3)
    assert resize_crop(frame.transpose(1, 0, 2), 10, 10).min() == 255
    assert resize_crop(frame, 10, 40) is frame


def test_shrinking_averages_instead_of_picking():
    checks = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)[..., None].repeat(3, 2)
    assert np.abs(resize_crop(checks, 16, 16).astype(int) - 127).max() <= 2


def test_without_opencv_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(__import__("sys").modules, "cv2", None)
    with pytest.raises(MissingPackage, match="opencv-python-headless"):
        resize_crop(np.zeros((4, 4, 3), np.uint8), 2, 2)
