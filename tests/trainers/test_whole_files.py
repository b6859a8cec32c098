"""Files that appear whole, and the patience that Windows needs."""

from __future__ import annotations

import sys
from pathlib import Path

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


def test_what_a_killed_writer_left_goes(tmp_path: Path):
    for name in (".a.safetensors.17.partial", "a.safetensors", "b.partial", ".hidden"):
        (tmp_path / name).touch()
    remove_partial_files(tmp_path)
    remove_partial_files(tmp_path / "none")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".hidden", "a.safetensors", "b.partial"]
