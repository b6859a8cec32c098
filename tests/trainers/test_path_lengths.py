"""Paths of Windows are limited to 260 characters: a run whose files would be longer is refused before it starts."""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext
from pathlib import Path, PureWindowsPath
from types import SimpleNamespace
from typing import Any

import pytest
from tiny import tiny_job

from trainers import path_lengths, trainer
from trainers.errors import JobError
from trainers.job import Job, parse_job
from trainers.path_lengths import path_problem
from trainers.preflight import check, check_settings
from trainers.run import Run

PORTABLE = "C:\\ComfyUI_windows_portable\\ComfyUI"


@pytest.fixture(autouse=True)
def on_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(path_lengths, "sys", SimpleNamespace(platform="win32"))
    monkeypatch.setitem(sys.modules, "winreg", registry(0))


def registry(long_paths_enabled: int) -> Any:
    """Windows' registry as the module `winreg` reads it."""
    keys = {"SYSTEM\\CurrentControlSet\\Control\\FileSystem": {"LongPathsEnabled": (long_paths_enabled, 4)}}
    query = lambda key, name: keys[key][name]  # noqa: E731
    return SimpleNamespace(HKEY_LOCAL_MACHINE=None, OpenKey=lambda _, key: nullcontext(key), QueryValueEx=query)


def job(name: str, root: str = PORTABLE, **fields: Any) -> Job:
    values = {"name": name, "base": {"transformer": "wan.safetensors"}, "encoded": "encoded", "steps": 2000, "tensorboard": False}
    folders = {"runs_folder": f"{root}\\user\\__video_trainer\\runs", "loras_folder": f"{root}\\output\\loras"}
    return parse_job(values | folders | fields)


def test_a_usual_name_in_a_portable_comfyui_is_allowed() -> None:
    assert path_problem(job("a" * 60)) is None
    assert path_problem(job("a" * 60, root="C:\\Users\\somebody\\Documents\\ComfyUI", tensorboard=True)) is None


def test_a_name_of_100_characters_is_refused_with_the_longest_that_fits() -> None:
    """Its first LoRA could not be written, hours after the start, and after each resume again."""
    problem = str(path_problem(job("a" * 100)))
    assert f"{PORTABLE}\\output\\loras\\{'a' * 100}\\{'a' * 100}-002000.safetensors, a path of 269 characters" in problem
    assert "Windows allows 259" in problem
    assert "Use a name of at most 95 characters" in problem
    assert path_problem(job("a" * 95)) is None
    assert path_problem(job("a" * 96)) is not None


def test_an_expert_makes_a_longer_name() -> None:
    both = {"transformer": "high.safetensors", "transformer_low_noise": "low.safetensors"}
    assert path_problem(job("a" * 93, base=both)) is not None
    assert path_problem(job("a" * 92, base=both)) is None


def test_deep_folders_are_refused_for_any_name() -> None:
    assert "Use folders with shorter paths" in str(path_problem(job("a", root="C:\\" + "deep\\" * 50)))


def test_it_is_said_before_anything_is_encoded_and_before_anything_is_loaded(tmp_path: Path) -> None:
    long = tiny_job(tmp_path, name="a" * 100, loras_folder=str(tmp_path / ("b" * 60)))
    for look in (check_settings, check):
        with pytest.raises(JobError, match="Windows allows 259"):
            look(long)


def test_elsewhere_and_where_windows_was_set_up_for_it_long_paths_are_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(path_lengths, "sys", SimpleNamespace(platform="linux"))
    assert path_problem(job("a" * 100)) is None


def test_long_paths_are_allowed_where_windows_is_set_up_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "winreg", registry(1))
    assert path_problem(job("a" * 100)) is None


def test_a_run_writes_no_longer_path_than_was_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file and folder that a real run opens or renames, against those that are counted."""
    run = Run.create(tiny_job(tmp_path, name="n" * 30, steps=4, checkpoints={"every_steps": 1, "keep_last": 1}, tensorboard=True))
    seen: set[str] = set()
    recording = True

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if recording and event in ("open", "os.mkdir", "os.rename"):
            seen.update(str(path) for path in arguments[:2] if isinstance(path, str | Path))

    sys.addaudithook(hook)
    trainer.train(run)
    recording = False
    written = [path for path in seen if path.startswith((str(run.folder), str(tmp_path / "loras")))]
    assert any(".partial" in path for path in written)
    assert any(".trash" in path for path in written)
    counted = max(len(str(path)) for path, _ in path_lengths._longest_paths(run.job))
    assert max(len(PureWindowsPath(path).as_posix()) for path in written) <= counted, os.linesep.join(sorted(written))
