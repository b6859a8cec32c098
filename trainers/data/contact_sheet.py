"""A picture of a data set: for each clip a row with its first, middle and last frame and what is known of it.

Shape suffixes: H and W pixels, C colours (RGB).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .captions import shown
from .lettering import Lettering, Picture
from .scan import NOT_ABOUT_THE_FILE, Clip
from .video import read_window

TILE_HEIGHT, TILE_WIDTH = 135, 240
TEXT_WIDTH = 470
GAP, MARGIN, HEAD = 8, 16, 40
ROW_HEIGHT = TILE_HEIGHT + 2 * GAP
WIDTH = 2 * MARGIN + 3 * (TILE_WIDTH + GAP) + GAP + TEXT_WIDTH
TEXT_X = WIDTH - MARGIN - TEXT_WIDTH

PAPER, BOX, LINE, ORANGE = (255, 255, 255), (240, 240, 240), (222, 222, 222), (214, 102, 28)
NAME = Lettering((30, 30, 30), 0.55, bold=True)
FACTS = Lettering((120, 120, 120), 0.46)
CAPTION = Lettering((50, 50, 50), 0.5)
HELD_OUT = Lettering(ORANGE, 0.46, bold=True)

_CAPTION_LINES, _LINE_HEIGHT = 4, 21


def contact_sheet(clips: Sequence[Clip], first_number: int = 1, total: int | None = None) -> Picture:
    """The rows of `clips`, which are number `first_number` and following of `total`: uint8 picture_HWC.

    A frame that cannot be read is said to be so in its place. Raises MissingPackage without OpenCV.
    """
    sheet: Picture = np.full((HEAD + len(clips) * ROW_HEIGHT + GAP, WIDTH, 3), PAPER, np.uint8)
    last = first_number + len(clips) - 1
    heading = f"clips {first_number} to {last} of {total or last}"
    FACTS.draw(sheet, heading, TEXT_X, 26)
    for column, title in enumerate(("first frame", "middle", "last")):
        FACTS.draw(sheet, title, _tile_x(column), 26)
    for index, clip in enumerate(clips):
        top = HEAD + index * ROW_HEIGHT
        sheet[top, MARGIN : WIDTH - MARGIN] = LINE
        _draw_frames(sheet, clip, top + GAP)
        _draw_text(sheet, clip, first_number + index, top + GAP)
    return sheet


def _tile_x(column: int) -> int:
    return MARGIN + column * (TILE_WIDTH + GAP)


def _draw_frames(sheet: Picture, clip: Clip, top: int) -> None:
    seconds = [0.0] if clip.kind == "image" else [share * (clip.info.num_frames - 1) / clip.info.fps for share in (0.0, 0.5, 1.0)]
    for column, start in enumerate(seconds):
        left = _tile_x(column)
        sheet[top : top + TILE_HEIGHT, left : left + TILE_WIDTH] = BOX
        frame = _frame(clip, start)
        if frame is None:
            FACTS.draw(sheet, "cannot be read", left + 66, top + TILE_HEIGHT // 2 + 4)
            continue
        height, width = frame.shape[:2]
        y, x = top + (TILE_HEIGHT - height) // 2, left + (TILE_WIDTH - width) // 2
        sheet[y : y + height, x : x + width] = frame


def _frame(clip: Clip, start_seconds: float) -> Picture | None:
    """The frame that is shown then, as large as fits a tile: frame_HWC, or None when it cannot be read."""
    scale = min(TILE_HEIGHT / clip.info.height, TILE_WIDTH / clip.info.width)
    size = max(round(clip.info.height * scale), 1), max(round(clip.info.width * scale), 1)
    try:
        frames_FHWC = read_window(Path(clip.path), start_seconds, 1, clip.info.fps or 1.0, size)
    except NOT_ABOUT_THE_FILE:
        raise
    except Exception:  # files change, and decoders fail in many ways: the other rows are still worth seeing
        return None
    picture: Picture = frames_FHWC[0]
    return picture


def _draw_text(sheet: Picture, clip: Clip, number: int, top: int) -> None:
    mark, lettering = ("held out", HELD_OUT) if clip.held_out else (f"{clip.repeats} times per epoch", FACTS)
    mark_width = lettering.width(mark)
    if clip.held_out or clip.repeats > 1:
        lettering.draw(sheet, mark, WIDTH - MARGIN - mark_width, top + 15)
    title = f"{number}  "
    name = NAME.end(shown(clip.name), TEXT_WIDTH - NAME.width(title) - mark_width - 2 * GAP)
    NAME.draw(sheet, title + name, TEXT_X, top + 15)
    FACTS.draw(sheet, _facts(clip), TEXT_X, top + 38)
    for line, text in enumerate(CAPTION.wrapped(clip.caption, TEXT_WIDTH, _CAPTION_LINES)):
        CAPTION.draw(sheet, text, TEXT_X, top + 65 + line * _LINE_HEIGHT)


def _facts(clip: Clip) -> str:
    """Size and length of a clip in one line."""
    info = clip.info
    if clip.kind == "image":
        return f"{info.width} x {info.height}   image"
    return f"{info.width} x {info.height}   {info.duration_seconds:.2f} s   {info.num_frames} frames   {info.fps:.4g} fps"
