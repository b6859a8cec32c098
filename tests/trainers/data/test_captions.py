from __future__ import annotations

from pathlib import Path

import pytest

from trainers.data.captions import MAX_CAPTION_BYTES, caption_path, read_caption, shown
from trainers.errors import DatasetError


@pytest.mark.parametrize(
    ("content", "caption"),
    [
        (b"a cat\n", "a cat"),
        (b"\xef\xbb\xbfa cat", "a cat"),
        ("  ein Bär, 動画 \r\nzwei\r\n\r\n".encode(), "ein Bär, 動画 \nzwei"),
        (b"(a cat:1.3)", "(a cat:1.3)"),
    ],
)
def test_a_file_is_one_caption(tmp_path: Path, content: bytes, caption: str):
    (tmp_path / "a.txt").write_bytes(content)
    assert read_caption(tmp_path / "a.txt") == caption


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "a.txt is empty"),
        (b" \r\n\t", "a.txt is empty"),
        (b"\xef\xbb\xbf", "a.txt is empty"),
        ("naïve".encode("latin-1"), r"not UTF-8 \(byte 2\)"),
        ("cat".encode("utf-16"), "not UTF-8"),
        (b"\0\0", "zero bytes"),
        (b"x" * (MAX_CAPTION_BYTES + 1), "larger than 64 KiB"),
    ],
)
def test_what_is_no_caption_is_refused(tmp_path: Path, content: bytes, message: str):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(DatasetError, match=message):
        read_caption(tmp_path / "a.txt")


def test_a_missing_caption_names_the_file_to_write(tmp_path: Path):
    with pytest.raises(DatasetError, match=r"no caption; .* Write one in clip.v2.txt"):
        read_caption(caption_path(tmp_path / "clip.v2.mp4"))
    (tmp_path / "a.txt").mkdir()
    with pytest.raises(DatasetError, match="cannot be read"):
        read_caption(tmp_path / "a.txt")


def test_names_fit_on_a_line():
    assert shown("ü 動画 [1].mp4") == "ü 動画 [1].mp4"
    assert shown("a\nb\x1b[31m") == "a\\nb\\x1b[31m"
    shown("\udcff").encode()
