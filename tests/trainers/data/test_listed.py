from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

import pytest
from clip_files import cut, write_video

from trainers.data.listed import ListedClip, listed_dataset, merge
from trainers.data.scan import Clip, Dataset, Rejected
from trainers.data.video import VideoInfo
from trainers.errors import DatasetError, MissingPackage, Problem

INFO = VideoInfo("video", 24, 24.0, 64, 48, 1.0)


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("video") / "clip.mp4", 9)


def listed(*paths: Path) -> list[ListedClip]:
    return [ListedClip(f"video {number}", partial(Path, path)) for number, path in enumerate(paths, 1)]


def copies(video: Path, folder: Path, *names: str) -> list[Path]:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(video, folder / name)
    return [folder / name for name in names]


def test_each_clip_gets_its_caption_or_all_the_only_one(tmp_path: Path, video: Path):
    files = listed(*copies(video, tmp_path, "a.mp4", "b.mp4"))
    dataset = listed_dataset(files, [" one\r\nline \n", "two"], repeats=3)
    assert [(clip.name, clip.caption, clip.repeats) for clip in dataset.clips] == [("a.mp4", "one\nline", 3), ("b.mp4", "two", 3)]
    assert dataset.clips[0].path == str(tmp_path / "a.mp4")
    assert dataset.clips[0].info.num_frames == 9
    assert [clip.caption for clip in listed_dataset(files, ["both"]).clips] == ["both", "both"]


def test_all_that_is_wrong_with_the_lists_is_told_before_any_file_is_asked_for():
    def never() -> Path:
        raise AssertionError

    clips = [ListedClip("video 1", never)] * 5
    with pytest.raises(DatasetError) as caught:
        listed_dataset(clips, ["a", " ", ""], repeats=0, held_out=1)
    text = str(caught.value)
    assert len(caught.value.problems) == 4
    assert "3 captions for 5 clips; every clip has one, or one is for all. Give 5 captions in the order of the clips" in text
    assert "caption 2, 3 of 3 is empty; a caption says what is to be seen. Write what the clip shows." in text
    with pytest.raises(DatasetError, match=r"^the caption is empty"):
        listed_dataset(clips, [""])
    with pytest.raises(DatasetError, match="no clip is given"):
        listed_dataset([], ["a"])


def test_one_bad_clip_never_stops_the_rest(tmp_path: Path, video: Path):
    def fail() -> Path:
        raise ZeroDivisionError("division by zero")

    good = copies(video, tmp_path, "good.mp4")[0]
    seen: list[int] = []
    clips = [*listed(cut(video, tmp_path / "cut.mp4", 0.5), tmp_path / "none.mp4", good), ListedClip("images 1", fail)]
    dataset = listed_dataset(clips, ["a", "b", "c", "d"], progress=lambda done, total, what: seen.append(done))
    assert [(clip.name, clip.caption) for clip in dataset.clips] == [("good.mp4", "c")]
    assert [item.name for item in dataset.rejected] == ["video 1", "video 2", "images 1"]
    assert "cannot be decoded" in dataset.rejected[0].reason
    assert "ZeroDivisionError" in dataset.rejected[2].reason
    assert seen == [1, 2, 3, 4]
    with pytest.raises(DatasetError, match=r"No clip can be used: 2 problems:\n- video 1: it cannot be decoded"):
        listed_dataset(clips[:2], ["a"])


def test_what_every_clip_would_lack_is_told_at_once():
    def fail() -> Path:
        raise MissingPackage("pip install av")

    with pytest.raises(MissingPackage):
        listed_dataset([ListedClip("images 1", fail)], ["a"])


def test_names_are_distinct_and_the_same_clip_counts_twice(tmp_path: Path, video: Path):
    x, y, z = copies(video, tmp_path, "x/a.mp4", "y/a.mp4", "z/a.mp4")
    dataset = listed_dataset(listed(x, y, x, x, z), ["one", "two", "one", "three", "four"], repeats=2)
    assert [(clip.name, clip.caption, clip.repeats) for clip in dataset.clips] == [
        ("a.mp4", "one", 4),
        ("a.mp4 (2)", "two", 2),
        ("a.mp4 (3)", "three", 2),
        ("a.mp4 (4)", "four", 2),
    ]


def test_a_file_with_two_captions_is_held_out_whole(tmp_path: Path, video: Path):
    paths = copies(video, tmp_path, *(f"{index}.mp4" for index in range(4)))
    for seed in range(8):
        dataset = listed_dataset(listed(*paths, *paths), [f"caption {index}" for index in range(8)], held_out=0.3, seed=seed)
        held_out = {clip.path for clip in dataset.clips if clip.held_out}
        assert 1 <= len(held_out) <= 3
        assert not held_out & {clip.path for clip in dataset.clips if not clip.held_out}


def clip(path: str, caption: str = "a", repeats: int = 1, held_out: bool = False) -> Clip:
    return Clip(path, path.rsplit("/")[-1], caption, INFO, repeats, held_out)


def test_merging_multiplies_repeats_and_keeps_names_apart():
    bad = Rejected("bad.mp4", Problem("it is bad", "it must be good", "Mend it."))
    one = Dataset((clip("/x/1.mp4", repeats=2), clip("/x/2.mp4", held_out=True)), (bad,))
    two = Dataset((clip("/y/1.mp4"), clip("/y/3.mp4")), (bad, Rejected("song.mp3", bad.problem)))
    merged = merge([(one, 3), (two, 5), (one, 1)])
    assert [(item.name, item.path, item.repeats, item.held_out) for item in merged.clips] == [
        ("1.mp4", "/x/1.mp4", 8, False),
        ("2.mp4", "/x/2.mp4", 4, True),
        ("1.mp4 (2)", "/y/1.mp4", 5, False),
        ("3.mp4", "/y/3.mp4", 5, False),
    ]
    assert [item.name for item in merged.rejected] == ["bad.mp4", "song.mp3"]
    assert Dataset.from_json(merged.to_json()) == merged


def test_a_name_that_looks_made_distinct_stays_its_owner():
    one, two = Dataset((clip("/x/a"), clip("/x/a (2)"))), Dataset((clip("/y/a"),))
    assert [item.name for item in merge([(one, 1), (two, 1)]).clips] == ["a", "a (2)", "a (3)"]
    assert [item.name for item in merge([(two, 1), (one, 1)]).clips] == ["a", "a (3)", "a (2)"]


def test_what_one_data_set_holds_out_is_not_trained_on_through_another():
    one = Dataset((clip("/1", held_out=True), clip("/2")))
    two = Dataset((clip("/1", "another caption"), clip("/2", held_out=True), clip("/3")))
    assert [item.held_out for item in merge([(one, 1), (two, 1)]).clips] == [True, True, True, False]
    with pytest.raises(DatasetError, match="every clip is held out"):
        merge([(one, 1), (Dataset(two.clips[:2]), 1)])
    with pytest.raises(DatasetError, match="repeats is 0"):
        merge([(one, 0)])
