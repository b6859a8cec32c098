"""Files that appear whole, and the patience that Windows needs."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from trainers import whole_files
from trainers.whole_files import remove_partial_files, rename, replace, written_beside


def test_an_error_while_writing_changes_nothing(tmp_path: Path):
    def write_and_fail(path: Path) -> None:
        path.write_text("new")
        raise ZeroDivisionError

    (tmp_path / "a").write_text("old")
    with pytest.raises(ZeroDivisionError), written_beside(tmp_path / "a") as partial:
        write_and_fail(partial)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a", "old")]
    with written_beside(tmp_path / "a") as partial:
        partial.write_text("new")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a", "new")]


@pytest.mark.parametrize(("move", "name"), [(rename, "os.rename"), (replace, "os.replace")])
@pytest.mark.parametrize("platform", ["win32", "linux"])
def test_on_windows_a_file_may_be_held_for_a_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, move, name, platform):
    (tmp_path / "a").write_text("content")
    real, held = getattr(whole_files.os, name.split(".")[1]), iter([True, True])

    def is_held(source: Path, target: Path) -> None:
        if next(held, False):
            raise PermissionError("held")
        real(source, target)

    monkeypatch.setattr(name, is_held)
    monkeypatch.setattr(sys, "platform", platform)
    if platform == "win32":
        move(tmp_path / "a", tmp_path / "b")
        assert (tmp_path / "b").read_text() == "content"
    else:
        with pytest.raises(PermissionError):
            move(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("scans_seconds", [45, 75])
def test_on_windows_a_large_file_may_be_held_for_a_minute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scans_seconds: int):
    """Two seconds were not enough for a scanner that reads an optimizer of hundreds of MB: the run ended."""
    (tmp_path / "a").write_text("content")
    now, tries, real = [0.0], [], os.rename

    def is_held(source: Path, target: Path) -> None:
        tries.append(now[0])
        if now[0] < scans_seconds:
            raise PermissionError("held")
        real(source, target)

    clock = SimpleNamespace(monotonic=lambda: now[0], sleep=lambda seconds: now.__setitem__(0, now[0] + seconds))
    monkeypatch.setattr(os, "rename", is_held)
    monkeypatch.setattr(whole_files, "time", clock)
    monkeypatch.setattr(whole_files, "sys", SimpleNamespace(platform="win32"))
    if scans_seconds < 60:
        rename(tmp_path / "a", tmp_path / "b")
        assert (tmp_path / "b").exists()
    else:
        with pytest.raises(PermissionError):
            rename(tmp_path / "a", tmp_path / "b")
        assert 55 <= tries[-1] <= 60, "a stated end"
    assert len(tries) < 50, "pauses grow"


def test_two_files_of_one_folder_can_be_written_at_once(tmp_path: Path):
    with written_beside(tmp_path / "a") as first, written_beside(tmp_path / "b") as second:
        first.write_text("a")
        second.write_text("b")
    assert [(path.name, path.read_text()) for path in sorted(tmp_path.iterdir())] == [("a", "a"), ("b", "b")]


def test_what_a_killed_writer_left_goes(tmp_path: Path):
    for name in (".a.safetensors.17.partial", ".0123abcd.partial", "a.safetensors", "b.partial", ".hidden"):
        (tmp_path / name).touch()
    remove_partial_files(tmp_path)
    remove_partial_files(tmp_path / "none")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".hidden", "a.safetensors", "b.partial"]
