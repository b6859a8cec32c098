"""Checkpoint folders against `kill -9` at every instant that matters, and at random ones."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from trainers import step_folders
from trainers.step_folders import StepFolders

ROOT = Path(__file__).parents[2]
WRITER = """
import itertools, os, signal, sys
from pathlib import Path
from trainers import step_folders

folders = step_folders.StepFolders(Path(sys.argv[1]))
dies_at = int(sys.argv[2])
moves = itertools.count()
real_rename = step_folders.rename

def rename(source, target, **patience):
    if next(moves) == dies_at:
        os.kill(os.getpid(), signal.SIGKILL)
    real_rename(source, target)

step_folders.rename = rename
print("started", flush=True)
for turn in itertools.count(1):
    with folders.writing(500 if dies_at >= 0 else 500 + turn % 3) as folder:
        for name in ("adapter", "optimizer"):
            (folder / name).write_text(str(turn) * 50_000)
"""


def _write(folder: Path, turn: int | None = 0) -> None:
    (folder / "adapter").write_text(str(turn) * 50_000)
    (folder / "optimizer").write_bytes(b"%d" % turn * 50_000)


def _assert_whole(folder: Path) -> None:
    adapter, optimizer = (folder / "adapter").read_text(), (folder / "optimizer").read_text()
    assert adapter == optimizer
    assert len(adapter) >= 50_000


def _hidden(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def test_a_folder_appears_whole(tmp_path):
    folders = StepFolders(tmp_path / "checkpoints")
    assert folders.steps() == []
    with folders.writing(500) as folder:
        _write(folder)
        assert folders.steps() == []
    with folders.writing(1_000_000) as folder:
        _write(folder)
    assert folders.steps() == [500, 1_000_000]
    assert folders.path(500).name == "step-000500"
    _assert_whole(folders.path(500))
    assert _hidden(folders.folder) == []


def test_an_error_while_writing_changes_nothing(tmp_path):
    folders = StepFolders(tmp_path)
    with folders.writing(5) as folder:
        _write(folder, 1)
    with pytest.raises(TypeError), folders.writing(5) as folder:
        _write(folder, None)  # fails in the second file
    assert folders.path(5).joinpath("adapter").read_text().startswith("1")
    assert [path.name for path in tmp_path.iterdir()] == ["step-000005"]


def test_an_existing_folder_is_replaced(tmp_path):
    folders = StepFolders(tmp_path)
    for turn in (1, 2):
        with folders.writing(5) as folder:
            _write(folder, turn)
    assert folders.path(5).joinpath("adapter").read_text().startswith("2")
    assert _hidden(tmp_path) == []


def test_an_old_folder_that_cannot_be_removed_does_not_spoil_the_new_one(tmp_path, monkeypatch):
    folders = StepFolders(tmp_path)

    def held(source: Path, target: Path, **patience: float) -> None:
        if target.name.endswith(".trash"):
            raise PermissionError("open in the Explorer")
        source.rename(target)

    with monkeypatch.context() as patch:
        patch.setattr(step_folders, "rename", held)
        for turn in (1, 2):
            with folders.writing(5) as folder:
                _write(folder, turn)
    assert folders.path(5).joinpath("adapter").read_text().startswith("2")
    folders.tidy()
    assert _hidden(tmp_path) == []


def test_a_new_folder_that_cannot_be_renamed_leaves_the_old_one(tmp_path, monkeypatch):
    """It was moved away for the new one, and stayed away until the next worker: a resume began at the checkpoint before."""
    folders = StepFolders(tmp_path)
    with folders.writing(5) as folder:
        _write(folder, 1)

    def held(source: Path, target: Path, **patience: float) -> None:
        if source.name.endswith(".tmp"):
            raise PermissionError("read by a scanner")
        source.rename(target)

    with monkeypatch.context() as patch:
        patch.setattr(step_folders, "rename", held)
        with pytest.raises(PermissionError), folders.writing(5) as folder:
            _write(folder, 2)
    assert folders.path(5).joinpath("adapter").read_text().startswith("1")
    assert _hidden(tmp_path) == []


def test_what_could_not_be_removed_goes_with_the_next_folder(tmp_path):
    (tmp_path / ".step-000005.0123abcd.tmp").mkdir()
    with StepFolders(tmp_path).writing(10) as folder:
        _write(folder)
    assert os.listdir(tmp_path) == ["step-000010"]


def test_removed_folders_are_gone(tmp_path):
    folders = StepFolders(tmp_path)
    for step in (1, 2):
        with folders.writing(step) as folder:
            _write(folder)
    folders.remove(1)
    assert folders.steps() == [2]
    assert _hidden(tmp_path) == []


# The moves of a writer: 0 the first folder into place; then, per turn, the old one away, the new one in, the old one to the trash.
@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL on Windows")
@pytest.mark.parametrize("dies_at", range(5))
def test_killed_before_each_move(tmp_path, dies_at):
    process = subprocess.run([sys.executable, "-c", WRITER, str(tmp_path), str(dies_at)], cwd=ROOT, check=False, capture_output=True)
    assert process.returncode == -signal.SIGKILL
    folders = StepFolders(tmp_path)
    folders.tidy()
    assert folders.steps() == ([] if dies_at == 0 else [500])
    for step in folders.steps():
        _assert_whole(folders.path(step))
    assert _hidden(tmp_path) == []


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL on Windows")
def test_killed_at_random_moments(tmp_path):
    folders, known = StepFolders(tmp_path), set()
    moments = random.Random(0)
    for _ in range(12):
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), "-1"], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert process.stdout
        process.stdout.readline()
        time.sleep(moments.uniform(0, 0.05))
        process.kill()
        process.communicate()
        folders.tidy()
        assert _hidden(tmp_path) == []
        assert known <= set(folders.steps()), "a finished checkpoint was lost"
        known = set(folders.steps())
        for step in known:
            _assert_whole(folders.path(step))
    assert known
