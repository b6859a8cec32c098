from __future__ import annotations

from itertools import pairwise

import cv2
import numpy as np
import pytest

from trainers.data.lettering import Lettering, drawable

PLAIN = Lettering()
TEXTS = [
    "a red circle moving left " * 20,
    "averylongwordwithoutspaces" * 12,
    "大きなウサギが森の中で目を覚ます。" * 10,
    "two  words\nand more\tof them " * 9,
]


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: text[:12])
@pytest.mark.parametrize("width", [90, 300])
def test_wrapped_lines_fit_and_hold_the_whole_text(text: str, width: int):
    lines = PLAIN.wrapped(text, width, 1000)
    assert all(PLAIN.width(line) <= width for line in lines)
    assert "".join(lines).replace(" ", "") == "".join(text.split())
    for line, following in pairwise(lines):
        first = following.split(" ")[0]
        assert PLAIN.width(f"{line} {first}") > width or " " not in text, "a line is broken where a word would have fitted"


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: text[:12])
def test_what_is_beyond_the_last_line_is_cut_and_marked(text: str):
    whole = PLAIN.wrapped(text, 200, 1000)
    cut = PLAIN.wrapped(text, 200, 2)
    assert len(cut) == 2
    assert cut[0] == whole[0]
    assert cut[1].endswith("...")
    assert whole[1].startswith(cut[1].removesuffix("..."))
    assert PLAIN.width(cut[1]) <= 200
    assert PLAIN.wrapped(text, 200, len(whole)) == whole


def test_a_width_that_fits_no_letter_still_ends():
    assert PLAIN.wrapped("abc", 1, 10) == ["a", "b", "c"]
    assert PLAIN.wrapped(" \n", 100, 3) == []


def test_the_end_of_a_name_is_kept():
    name = "a folder/another folder/clip_0001.mp4"
    assert PLAIN.end(name, 1000) == name
    short = PLAIN.end(name, 120)
    assert short.startswith("...")
    assert name.endswith(short[3:])
    assert 80 < PLAIN.width(short) <= 120


def test_older_opencv_gets_ascii(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cv2, "__version__", "4.10.0")
    assert drawable("Mädchen, café: 猫が") == "Madchen, cafe: ??"
    monkeypatch.setattr(cv2, "__version__", "5.0.0")
    assert drawable("Mädchen, 猫") == "Mädchen, 猫"


def test_letters_are_drawn_where_they_are_measured():
    picture = np.full((40, 300, 3), 255, np.uint8)
    Lettering((255, 0, 0), bold=True).draw(picture, "held out", 20, 25)
    rows, columns = np.nonzero((picture != 255).any(-1))
    assert 18 <= columns.min() <= 24
    assert columns.max() <= 20 + Lettering(bold=True).width("held out") + 2
    assert 8 <= rows.min() < rows.max() <= 27
    assert picture[rows, columns, 0].min() > 200, "the colour is red, in RGB"
