from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from clip_files import numbered, write_caption, write_image, write_video

from trainers.data import contact_sheet as module
from trainers.data.contact_sheet import GAP, HEAD, MARGIN, ROW_HEIGHT, TEXT_WIDTH, TEXT_X, TILE_HEIGHT, TILE_WIDTH, WIDTH, contact_sheet
from trainers.data.scan import Clip, scan_folder
from trainers.errors import MissingPackage


def tile(sheet: np.ndarray, row: int, column: int) -> np.ndarray:
    top, left = HEAD + row * ROW_HEIGHT + GAP, MARGIN + column * (TILE_WIDTH + GAP)
    return sheet[top : top + TILE_HEIGHT, left : left + TILE_WIDTH]


def text(sheet: np.ndarray, row: int) -> np.ndarray:
    top = HEAD + row * ROW_HEIGHT + GAP
    return sheet[top : top + TILE_HEIGHT, TEXT_X : TEXT_X + TEXT_WIDTH]


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> tuple[Clip, ...]:
    folder = tmp_path_factory.mktemp("clips")
    for name, height, width in (("a tall.mp4", 128, 64), ("b wide.mp4", 64, 256)):
        write_caption(write_video(folder / name, [numbered(index, height, width) for index in range(49)]))
    write_caption(write_image(folder / "c still.png", np.full((90, 160, 3), (200, 30, 30), np.uint8)))
    return scan_folder(folder).clips


def test_a_row_shows_the_first_the_middle_and_the_last_frame_whole(clips: tuple[Clip, ...]):
    sheet = contact_sheet(clips)
    assert sheet.dtype == np.uint8
    assert sheet.shape == (HEAD + 3 * ROW_HEIGHT + GAP, WIDTH, 3)
    for column, index in enumerate((0, 24, 48)):
        assert tile(sheet, 0, column)[TILE_HEIGHT // 2, TILE_WIDTH // 2].mean() == pytest.approx(4 * index + 8, abs=2)
    shown = [(tile(sheet, row, 1) != 240).any(-1) for row in (0, 1)]
    assert [int(mask.any(0).sum()) for mask in shown] == [TILE_HEIGHT // 2 + 1, TILE_WIDTH]  # 1:2 is 67.5 pixels wide
    assert [int(mask.any(1).sum()) for mask in shown] == [TILE_HEIGHT, TILE_WIDTH // 4]


def test_an_image_is_one_tile(clips: tuple[Clip, ...]):
    sheet = contact_sheet(clips)
    assert tile(sheet, 2, 0)[60, 120].tolist() == [200, 30, 30]
    assert (tile(sheet, 2, 1) == 255).all()
    assert (tile(sheet, 2, 2) == 255).all()


def test_text_never_leaves_its_place(clips: tuple[Clip, ...]):
    long = replace(clips[0], name="folder/" * 40 + "walk.mp4", caption="word " * 2000, repeats=1000)
    long = replace(long, info=replace(long.info, num_frames=1_000_000, duration_seconds=50_000.0, width=15360, height=8640))
    sheet = contact_sheet([long, replace(long, held_out=True, caption="猫" * 900)], first_number=100_000, total=200_000)
    used = (sheet != 255).any(-1)
    used[HEAD : HEAD + 2 * ROW_HEIGHT : ROW_HEIGHT] = False  # the lines between the rows
    for row in range(2):
        top = HEAD + row * ROW_HEIGHT
        assert used[top + GAP : top + GAP + TILE_HEIGHT + 4, TEXT_X : TEXT_X + TEXT_WIDTH].any()
        assert not used[top + GAP + TILE_HEIGHT + 4 : top + ROW_HEIGHT].any(), "text ends above the next row"
    assert not used[:, TEXT_X - GAP : TEXT_X - 2].any()
    assert not used[:, TEXT_X + TEXT_WIDTH + 2 :].any()


def test_held_out_and_repeats_are_marked(clips: tuple[Clip, ...]):
    plain, repeated, held_out = (text(contact_sheet([clip]), 0) for clip in marked(clips[0]))
    assert (plain[:20, 300:] == 255).all()
    assert (repeated[:20, 300:] != 255).any()
    coloured = held_out[:20, 300:].astype(int)
    assert (coloured[..., 0] - coloured[..., 2]).max() > 120, "in orange"


def marked(clip: Clip) -> list[Clip]:
    return [clip, replace(clip, repeats=3), replace(clip, repeats=3, held_out=True)]


def test_a_clip_that_is_gone_says_so_and_the_others_are_shown(clips: tuple[Clip, ...], tmp_path: Path):
    gone = replace(clips[1], path=str(tmp_path / "gone.mp4"))
    sheet = contact_sheet([gone, clips[0]])
    assert (tile(sheet, 0, 0) != 240).any()
    assert tile(sheet, 0, 0)[:40].tolist() == np.full((40, TILE_WIDTH, 3), 240).tolist()
    assert tile(sheet, 1, 2)[60, 120].mean() == pytest.approx(200, abs=2)


def test_what_every_clip_would_lack_is_told_at_once(clips: tuple[Clip, ...], monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object) -> None:
        raise MissingPackage("pip install opencv-python-headless")

    with monkeypatch.context() as patch:
        patch.setattr(module, "read_window", fail)
        with pytest.raises(MissingPackage):
            contact_sheet(clips)
