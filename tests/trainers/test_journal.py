"""Lines that are torn, repeated, too many, or not JSON."""

from __future__ import annotations

import json
import math
import sys
import time

import pytest

from trainers import journal


def test_lines_come_back_in_order_and_from_an_offset(tmp_path):
    path = tmp_path / "a.jsonl"
    journal.append(path, {"n": 1, "text": "Ünïcode\nline"})
    first, offset = journal.read(path)
    journal.append(path, {"n": 2})
    second, end = journal.read(path, offset)
    assert first == [{"n": 1, "text": "Ünïcode\nline"}]
    assert second == [{"n": 2}]
    assert journal.read(path, end) == ([], end)
    assert end == path.stat().st_size


def test_a_missing_file_has_no_lines(tmp_path):
    assert journal.read(tmp_path / "none") == ([], 0)
    assert journal.read_tail(tmp_path / "none") == []


def test_lines_that_cannot_be_written_wait_for_the_next_one(tmp_path):
    """In their order, those of all files; but a writer that could never write says so at once."""
    gone, kept = tmp_path / "gone" / "a.jsonl", tmp_path / "kept.jsonl"
    lines = journal.Writer()
    with pytest.raises(FileNotFoundError):
        lines.append(gone, {"n": 0})
    assert lines.append(kept, {"n": 1}) == ""
    assert [lines.append(path, {"n": n}) for n, path in ((2, gone), (3, kept), (4, gone))] == ["", "", ""]
    assert journal.read(kept)[0] == [{"n": 1}]
    gone.parent.mkdir()
    assert "No such file" in lines.append(kept, {"n": 5})
    assert lines.append(kept, {"n": 6}) == ""
    assert journal.read(gone)[0] == [{"n": 2}, {"n": 4}]
    assert journal.read(kept)[0] == [{"n": n} for n in (1, 3, 5, 6)]


@pytest.mark.skipif(sys.platform == "win32", reason="files are limited in size by POSIX")
def test_a_line_of_which_only_a_part_fits_is_not_written(tmp_path):
    """The system writes what fits and says so by a number: the line counted as written, and readers skipped it."""
    import resource

    path = tmp_path / "a.jsonl"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
    try:
        with pytest.raises(OSError, match="No space left"):
            journal.append(path, {"a long line": 1})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    journal.append(path, {"n": 2})
    assert journal.read(path)[0] == [{"n": 2}]


@pytest.mark.parametrize("torn", [b'{"n": 2, "lo', b'{"n": "\xc3', b"{", b'{"n": 2}'])
def test_a_torn_last_line_is_no_line_until_it_is_whole(tmp_path, torn):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"n": 1}\n' + torn)
    records, offset = journal.read(path)
    assert records == [{"n": 1}]
    assert offset == len(b'{"n": 1}\n')
    path.write_bytes(b'{"n": 1}\n{"n": 2, "whole": true}\n')
    assert journal.read(path, offset)[0] == [{"n": 2, "whole": True}]


def test_the_next_writer_does_not_continue_a_torn_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"n": 1}\n{"n": 2, "lo')
    journal.append(path, {"n": 3})
    assert journal.read(path)[0] == [{"n": 1}, {"n": 3}]
    assert path.read_bytes().endswith(b'"lo\n{"n": 3}\n')


def test_numbers_that_json_lacks_are_null(tmp_path):
    path = tmp_path / "a.jsonl"
    journal.append(path, {"loss": math.nan, "list": [math.inf, 1.5], "deep": {"x": -math.inf}})
    assert json.loads(path.read_text()) == {"loss": None, "list": [None, 1.5], "deep": {"x": None}}


def test_the_tail_holds_whole_lines_only(tmp_path):
    path = tmp_path / "a.jsonl"
    for n in range(100):
        journal.append(path, {"n": n})
    with path.open("ab") as file:
        file.write(b'{"n": 100')
    tail = journal.read_tail(path, max_bytes=105)
    assert [record["n"] for record in tail] == list(range(100 - len(tail), 100))
    assert 5 <= len(tail) <= 10
    assert len(journal.read_tail(path, max_bytes=10**6)) == 100


def test_ten_thousand_lines_are_read_at_once_and_followed_for_nothing(tmp_path):
    path = tmp_path / "a.jsonl"
    line = json.dumps({"step": 12345, "loss": 0.1234, "grad_norm": 0.5, "lr": 1e-4, "sigma": 0.5, "seconds": 0.25}) + "\n"
    path.write_text(line * 20_000)
    start = time.process_time()
    records, offset = journal.read(path)
    whole_seconds = time.process_time() - start
    start = time.process_time()
    for _ in range(100):
        journal.read(path, offset)
        journal.read_tail(path)
    assert len(records) == 20_000
    assert whole_seconds < 2.0
    assert (time.process_time() - start) / 100 < whole_seconds / 10
