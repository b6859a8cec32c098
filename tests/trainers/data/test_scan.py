from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
from clip_files import cut, write_caption, write_image, write_sound, write_video

from trainers.data import scan
from trainers.data import video as video_module
from trainers.data.scan import Dataset, fingerprint, scan_folder
from trainers.data.video import VideoInfo
from trainers.errors import DatasetError, MissingPackage


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("video") / "clip.mp4", 24)


def put(video: Path, path: Path, caption: str | None = "a caption") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(video, path)
    if caption is not None:
        write_caption(path, caption)
    return path


def reasons(dataset: Dataset) -> dict[str, str]:
    return {item.name: item.reason for item in dataset.rejected}


def test_clips_are_found_in_sub_folders_in_the_order_of_names(tmp_path: Path, video: Path):
    for name in ("b.mp4", "a.mp4", "sub/z.mp4", "Sub/y.MP4"):
        put(video, tmp_path / name, f"about {name}")
    write_caption(write_image(tmp_path / "c.png", np.zeros((8, 8, 3), np.uint8)))
    put(video, tmp_path / ".hidden/a.mp4")
    put(video, tmp_path / "._a.mp4")
    seen: list[tuple[int, int, str]] = []
    dataset = scan_folder(tmp_path, progress=lambda *state: seen.append(state))
    assert [clip.name for clip in dataset.clips] == ["a.mp4", "b.mp4", "c.png", "Sub/y.MP4", "sub/z.mp4"]
    assert [clip.kind for clip in dataset.clips] == ["video", "video", "image", "video", "video"]
    assert dataset.clips[0].caption == "about a.mp4"
    assert dataset.clips[0].path == str(tmp_path / "a.mp4")
    assert not dataset.rejected
    assert seen[-1][:2] == (10, 10)


def test_every_file_that_is_not_used_has_its_reason(tmp_path: Path, video: Path):
    put(video, tmp_path / "good.mp4")
    put(video, tmp_path / "no caption.mp4", None)
    put(video, tmp_path / "empty caption.mp4", " \n")
    put(video, tmp_path / "latin.mp4").with_suffix(".txt").write_bytes(b"na\xefve")
    write_caption(cut(video, tmp_path / "cut.mp4", 0.5))
    write_caption(cut(video, tmp_path / "empty.mp4", 0))
    write_caption(write_sound(tmp_path / "sound.mp4"))
    write_caption(write_video(tmp_path / "one.mp4", 1))
    (tmp_path / "song.mp3").write_bytes(b"x")
    (tmp_path / "lonely.txt").write_text("a caption")
    os.mkfifo(tmp_path / "pipe.mp4")
    write_caption(tmp_path / "pipe.mp4")
    (tmp_path / "broken link.mp4").symlink_to(tmp_path / "nowhere.mp4")
    dataset = scan_folder(tmp_path)
    assert [clip.name for clip in dataset.clips] == ["good.mp4"]
    expected = {
        "no caption.mp4": "no caption",
        "empty caption.mp4": "is empty",
        "latin.mp4": "not UTF-8",
        "cut.mp4": "cannot be decoded",
        "empty.mp4": "is empty",
        "sound.mp4": "no video stream",
        "one.mp4": "one frame",
        "song.mp3": "no video or image",
        "lonely.txt": "without a clip",
        "pipe.mp4": "no plain file",
        "broken link.mp4": "cannot be read",
    }
    found = reasons(dataset)
    assert found.keys() == expected.keys()
    assert all(part in found[name] for name, part in expected.items())


@pytest.mark.parametrize("error", [ZeroDivisionError("division by zero"), MemoryError(), cv2.error("bad"), RuntimeError("a\nb")], ids=repr)
def test_one_bad_file_never_stops_the_rest(tmp_path: Path, video: Path, monkeypatch: pytest.MonkeyPatch, error: Exception):
    put(video, tmp_path / "bad.mp4")
    put(video, tmp_path / "good.mp4")

    with monkeypatch.context() as patch:
        patch.setattr(scan, "probe", _probe_that_raises(error, "bad.mp4"))
        dataset = scan_folder(tmp_path)
    assert [clip.name for clip in dataset.clips] == ["good.mp4"]
    assert reasons(dataset)["bad.mp4"].startswith(f"it cannot be read ({type(error).__name__}: ")
    assert "\n" not in reasons(dataset)["bad.mp4"]


def test_what_every_file_would_lack_is_told_at_once(tmp_path: Path, video: Path, monkeypatch: pytest.MonkeyPatch):
    put(video, tmp_path / "bad.mp4")
    put(video, tmp_path / "good.mp4")
    monkeypatch.setattr(scan, "probe", _probe_that_raises(MissingPackage("pip install av"), "bad.mp4"))
    with pytest.raises(MissingPackage):
        scan_folder(tmp_path)


def _probe_that_raises(error: Exception, name: str) -> Callable[[Path], VideoInfo]:
    def probe(path: Path) -> VideoInfo:
        if path.name == name:
            raise error
        return video_module.probe(path)

    return probe


ODD_NAMES = [
    "with space.mp4", "ünï 動画 🎬.mp4", "[b]*?.mp4", "-rf.mp4", "new\nline.mp4", "a%03d.mp4", "http:x.mp4", "two.dots.mp4",
    "'quote\".mp4", "\x1b[31mred.mp4", "x" * 251 + ".mp4", "back\\slash.mp4", "\u202ereversed.mp4",
]  # fmt: skip


def test_odd_names_work(tmp_path: Path, video: Path):
    for name in ODD_NAMES:
        put(video, tmp_path / "odd 文件" / name)
    dataset = scan_folder(tmp_path, held_out=0.2)
    assert sorted(clip.name for clip in dataset.clips) == sorted(f"odd 文件/{name}" for name in ODD_NAMES)
    assert Dataset.from_json(dataset.to_json()) == dataset


def test_a_name_that_is_not_unicode_is_refused_in_words_that_print(tmp_path: Path, video: Path):
    put(video, tmp_path / "good.mp4")
    put(video, Path(os.fsdecode(os.fsencode(tmp_path) + b"/bad\xff.mp4")), None)
    found = reasons(scan_folder(tmp_path))
    assert [reason.split(";")[0] for reason in found.values()] == ["the name is not Unicode"]
    assert "".join(found).encode("ascii")


def test_folders_like_clips_and_loops_of_links_are_harmless(tmp_path: Path, video: Path):
    put(video, tmp_path / "folder.mp4/a.mp4")
    (tmp_path / "folder.mp4/loop").symlink_to(tmp_path)
    (tmp_path / "self.mp4").symlink_to(tmp_path / "self.mp4")
    elsewhere = put(video, tmp_path.parent / f"{tmp_path.name} elsewhere/b.mp4").parent
    (tmp_path / "linked").symlink_to(elsewhere)
    dataset = scan_folder(tmp_path)
    assert [clip.name for clip in dataset.clips] == ["folder.mp4/a.mp4", "linked/b.mp4"]
    assert reasons(dataset).keys() == {"self.mp4"}


@pytest.fixture
def as_nobody() -> Iterator[Path]:
    """A folder of a user whom permissions bind, even when the tests run as root."""
    _import_all_that_is_needed()
    everybodys = "/tmp" if os.name == "posix" else None  # what tempfile has now may be a folder of pytest's, closed to others
    folder = Path(tempfile.mkdtemp(dir=everybodys))
    folder.chmod(0o777)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    yield folder
    os.seteuid(user)
    for path in folder.rglob("*"):
        path.chmod(0o700)
    shutil.rmtree(folder)


def _import_all_that_is_needed() -> None:
    """Python may lie where another user cannot read it: nothing can be imported then, and a codec that was missed once stays unknown."""
    with tempfile.TemporaryDirectory() as folder:
        clip = write_video(Path(folder, "clip.mp4"), 4)
        clip.with_suffix(".txt").write_text("a caption", "utf-8-sig")
        assert scan_folder(folder).clips[0].caption == "a caption"


def test_what_may_not_be_read_is_named(as_nobody: Path):
    for name in ("good.mp4", "secret.mp4", "secret caption.mp4"):
        write_caption(write_video(as_nobody / name, 4))
    (as_nobody / "secret.mp4").chmod(0)
    (as_nobody / "secret caption.txt").chmod(0)
    (as_nobody / "closed").mkdir(mode=0)
    dataset = scan_folder(as_nobody)
    assert [clip.name for clip in dataset.clips] == ["good.mp4"]
    assert reasons(dataset).keys() == {"secret.mp4", "secret caption.mp4", "closed"}
    assert all("ermission" in reason for reason in reasons(dataset).values())


def test_folder_names_repeat_and_multiply(tmp_path: Path, video: Path):
    for name in ("a.mp4", "3_x/b.mp4", "3_x/2_y/c.mp4", "2024_trip/d.mp4", "0_z/e.mp4", "x_3/f.mp4"):
        put(video, tmp_path / name)
    repeats = {clip.name: clip.repeats for clip in scan_folder(tmp_path, repeats=5).clips}
    assert repeats == {"a.mp4": 5, "3_x/b.mp4": 15, "3_x/2_y/c.mp4": 30, "2024_trip/d.mp4": 5, "0_z/e.mp4": 5, "x_3/f.mp4": 5}


def test_held_out_clips_are_a_function_of_name_and_seed(tmp_path: Path, video: Path):
    names = [f"{index:02}.mp4" for index in range(40)]
    for name in names[:30]:
        put(video, tmp_path / name)

    def held_out(share: float, seed: int = 0) -> set[str]:
        return {clip.name for clip in scan_folder(tmp_path, held_out=share, seed=seed).clips if clip.held_out}

    assert held_out(0.0) == set()
    some = held_out(0.3)
    assert 4 <= len(some) <= 14
    assert held_out(0.3) == some
    assert held_out(0.3, seed=1) != some
    assert some < held_out(0.6)
    assert len(held_out(1e-9)) == 1
    assert len(held_out(0.999999)) == 29
    for name in names[30:]:
        put(video, tmp_path / name)
    assert held_out(0.3) & set(names[:30]) == some


def test_a_single_clip_is_never_held_out(tmp_path: Path, video: Path):
    put(video, tmp_path / "a.mp4")
    assert not scan_folder(tmp_path, held_out=0.9).clips[0].held_out


def test_nothing_to_use_says_every_reason(tmp_path: Path, video: Path):
    with pytest.raises(DatasetError, match="holds no clip that can be used"):
        scan_folder(tmp_path)
    put(video, tmp_path / "a.mp4", None)
    put(video, tmp_path / "b; c. d.mp4", "")
    with pytest.raises(DatasetError) as caught:
        scan_folder(tmp_path)
    lines = str(caught.value).splitlines()
    assert lines[0] == "3 problems:"
    assert lines[2].startswith("- a.mp4: no caption; every clip")
    assert lines[3].startswith("- b; c. d.mp4: b; c. d.txt is empty; ")


def test_all_wrong_arguments_are_named_at_once(tmp_path: Path):
    with pytest.raises(DatasetError) as caught:
        scan_folder(tmp_path / "none", repeats=0, held_out=1.0)
    assert len(caught.value.problems) == 3


def test_the_fingerprint_sees_every_change_of_a_clip_or_caption_and_nothing_else(tmp_path: Path, video: Path):
    clip = put(video, tmp_path / "sub/a.mp4", "a cat")
    seen = [fingerprint(tmp_path)]
    assert fingerprint(tmp_path) == seen[0]
    put(video, tmp_path / ".hidden.mp4")
    scan_folder(tmp_path)
    assert fingerprint(tmp_path) == seen[0]
    changes: list[Callable[[], object]] = [
        lambda: put(video, tmp_path / "b.mp4", None),
        lambda: write_caption(tmp_path / "b.mp4", "a dog"),
        lambda: write_caption(clip, "a cat and more"),
        lambda: os.utime(clip, ns=(0, 1)),
        lambda: (tmp_path / "b.mp4").rename(tmp_path / "c.mp4"),
        lambda: (tmp_path / "broken.mp4").symlink_to(tmp_path / "nowhere"),
        lambda: clip.unlink(),
    ]
    for change in changes:
        change()
        assert fingerprint(tmp_path) not in seen
        seen.append(fingerprint(tmp_path))
