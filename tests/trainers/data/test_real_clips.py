"""Reading and planning clips that no one here made."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from real_clips import write_real_clips

from trainers.data.buckets import Geometry, plan_windows
from trainers.data.clip_store import store_clip
from trainers.data.report import report
from trainers.data.scan import Dataset, scan_folder
from trainers.data.video import read_window
from trainers.family import LatentSpec

SPEC = LatentSpec(16, 4, 8, 16, 16.0, (0.0,) * 16, (1.0,) * 16)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = tmp_path_factory.mktemp("real")
    write_real_clips(folder)
    return scan_folder(folder)


def test_the_real_clips_are_what_their_players_show(dataset: Dataset):
    assert not dataset.rejected
    found = [(clip.name, clip.info.num_frames, clip.info.width, clip.info.height, round(clip.info.fps, 2)) for clip in dataset.clips]
    assert found == [
        ("bigbuckbunny.mp4", 132, 1280, 720, 25.0),
        ("bikes.mp4", 250, 640, 272, 25.0),
        ("carphone_pristine.mp4", 120, 193, 144, 29.97),  # 176 stored pixels of 128:117
    ]


def test_their_windows_are_decoded_at_sixteen_frames_a_second(dataset: Dataset):
    plan = plan_windows(dataset, Geometry(96, 64, 17, clip_mode="spread", clips_per_video=2), SPEC)
    assert [window.num_frames for window in plan.windows] == [17] * 6
    for window in plan.windows:
        size = window.height, window.width
        frames = read_window(Path(window.clip.path), window.start_seconds, window.num_frames, window.fps, size)
        assert frames.shape == (17, *size, 3)
        assert frames.std() > 10
        assert np.abs(np.diff(frames.astype(int), axis=0)).mean() > 0.5  # they move
    assert "96x64" in report(dataset, plan)


def test_a_window_in_their_middle_is_what_reading_from_the_start_gives(dataset: Dataset):
    for clip in dataset.clips:
        whole = read_window(Path(clip.path), 0.0, 60, 16.0, (32, 48))
        assert np.array_equal(read_window(Path(clip.path), 40 / 16, 17, 16.0, (32, 48)), whole[40:57])


def test_their_frames_are_stored_bit_for_bit(dataset: Dataset, tmp_path: Path):
    for clip in dataset.clips:
        frames = read_window(Path(clip.path), 1.0, 9, clip.info.fps)
        stored = store_clip(tmp_path, torch.from_numpy(frames) / 255, clip.info.fps)
        assert np.array_equal(read_window(stored, 0.0, 9, clip.info.fps), frames)
