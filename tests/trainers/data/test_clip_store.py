from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from trainers.data import clip_store
from trainers.data.clip_store import store_clip
from trainers.data.video import probe, read_window
from trainers.errors import DatasetError


def noise(frames: int, height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    """Every one of the 256 levels, nothing that compresses."""
    return np.random.default_rng(seed).integers(0, 256, (frames, height, width, channels), np.uint8)


def image(pixels: np.ndarray) -> torch.Tensor:
    """As ComfyUI's nodes hand it on: float32 in 0..1, made in inference mode."""
    with torch.inference_mode():
        return torch.from_numpy(pixels).float() / 255


@pytest.mark.parametrize("fps", [8, 12.5, 16, 23.976, 24, 29.97, 30, 60, 120])
def test_a_stored_video_is_read_back_bit_for_bit_at_its_own_rate(tmp_path: Path, fps: float):
    pixels = noise(21, 33, 47)
    path = store_clip(tmp_path, image(pixels), fps)
    info = probe(path)
    assert (info.kind, info.num_frames, info.width, info.height) == ("video", 21, 47, 33)
    assert info.fps == pytest.approx(fps, rel=1e-4)
    assert info.num_frames_at(fps) == 21
    assert np.array_equal(read_window(path, 0.0, 21, fps), pixels)
    assert np.array_equal(read_window(path, 8 / fps, 13, fps), pixels[8:])


def test_a_stored_still_is_read_back_bit_for_bit(tmp_path: Path):
    pixels = noise(1, 33, 47)
    path = store_clip(tmp_path, image(pixels), 16)
    assert path.suffix == ".png"
    assert probe(path).kind == "image"
    assert np.array_equal(read_window(path, 0.0, 1, 16), pixels)


def test_a_clip_is_written_once_and_named_by_its_content(tmp_path: Path):
    pixels = noise(5, 16, 16)
    path = store_clip(tmp_path, image(pixels), 16)
    written = path.stat().st_mtime_ns
    assert store_clip(tmp_path, image(pixels.copy()), 16) == path
    assert path.stat().st_mtime_ns == written
    changed = pixels.copy()
    changed[4, 15, 15, 2] ^= 1
    others = [store_clip(tmp_path, image(changed), 16), store_clip(tmp_path, image(pixels), 24)]
    others += [store_clip(tmp_path, image(pixels.reshape(5, 8, 32, 3)), 16), store_clip(tmp_path, image(pixels[:4]), 16)]
    assert len({path, *others}) == 5
    assert store_clip(tmp_path, image(pixels[:1]), 16) == store_clip(tmp_path, image(pixels[:1]), 24), "a still has no rate"
    assert sorted(tmp_path.iterdir()) == sorted({path, *others, store_clip(tmp_path, image(pixels[:1]), 16)})


def test_the_same_clip_is_the_same_bytes_anywhere(tmp_path: Path):
    pixels = image(noise(9, 16, 24))
    first, second = (store_clip(tmp_path / name, pixels, 23.976) for name in ("one", "two"))
    assert first.read_bytes() == second.read_bytes()


def test_grey_and_opacity_become_rgb(tmp_path: Path):
    grey, opaque = noise(1, 8, 8, 1), noise(1, 8, 8, 4)
    assert np.array_equal(read_window(store_clip(tmp_path, image(grey), 16), 0, 1, 16), grey.repeat(3, -1))
    assert np.array_equal(read_window(store_clip(tmp_path, image(opaque), 16), 0, 1, 16), opaque[..., :3])


def test_what_lies_outside_is_clipped_and_half_precision_rounded(tmp_path: Path):
    values = torch.tensor([-0.5, 0.2, 1.5], dtype=torch.float16).reshape(1, 1, 1, 3)
    assert read_window(store_clip(tmp_path, values, 16), 0, 1, 16).tolist() == [[[[0, 51, 255]]]]


@pytest.mark.parametrize(
    ("images", "value"),
    [
        (torch.zeros(4, 4, 3), "shape 4 x 4 x 3"),
        (torch.zeros(0, 3, 0, 0), "shape 0 x 3 x 0 x 0"),
        (torch.zeros(2, 3, 8, 8), "shape 2 x 3 x 8 x 8"),
        (torch.full((2, 4, 4, 3), torch.nan), "frame 0 holds values"),
    ],
)
def test_what_is_no_clip_is_refused_and_nothing_is_written(tmp_path: Path, images: torch.Tensor, value: str):
    with pytest.raises(DatasetError, match=value):
        store_clip(tmp_path, images, 16)
    assert not list(tmp_path.iterdir())


def test_a_writer_that_fails_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(path: Path, *_: object) -> None:
        path.write_bytes(b"half")
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(clip_store, "_write_video", fail)
        with pytest.raises(OSError, match="no space"):
            store_clip(tmp_path, image(noise(5, 8, 8)), 16)
    assert not list(tmp_path.iterdir())
    assert probe(store_clip(tmp_path, image(noise(5, 8, 8)), 16)).num_frames == 5
