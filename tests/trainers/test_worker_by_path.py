"""The worker trains under any Python that ComfyUI may run on, and from a folder of any name."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from by_path import PACK, train_by_path

ODD_NAME = "my packs/vidéo-trainer 1.0 — 日本"


@pytest.fixture
def oddly_named_pack(tmp_path: Path) -> Path:
    """A copy of the trainers (the worker follows links) where hyphens, a space, dots and other alphabets are in the path."""
    pack = tmp_path / ODD_NAME
    shutil.copytree(PACK / "trainers", pack / "trainers", ignore=shutil.ignore_patterns("demo", "__pycache__"))
    return pack


def _portable_python(folder: Path) -> Path:
    """A Python as in ComfyUI's Windows portable: a `._pth` file beside it lists all that it may import from.

    Python then ignores the environment, the working folder and the script's own folder (getpath.py does so on every system).
    """
    folder.mkdir()
    python = folder / "python"
    python.symlink_to(Path(sys.executable).resolve())
    allowed = _output([sys.executable, "-I", "-c", "import sys; print(*sys.path, sep='\\n')"])
    (folder / "python._pth").write_text(allowed, "utf-8")
    return python


def _output(command: list[str | Path]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_isolated_python_trains_from_a_folder_of_any_name(tmp_path, oddly_named_pack):
    run = train_by_path(tmp_path / "träning 1", sys.executable, "-I", pack=oddly_named_pack)
    assert "Traceback" not in (run.log_file.read_text("utf-8") if run.log_file.exists() else "")


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there, and its own portable Python is what counts")
@pytest.mark.slow
def test_a_portable_python_trains(tmp_path, oddly_named_pack):
    python = _portable_python(tmp_path / "python_embeded")
    flags = _output([python, "-c", "import sys; print(sys.flags.isolated, sys.flags.safe_path, sys.executable)"])
    assert flags.split() == ["1", "True", str(python)]
    by_name = subprocess.run(
        [python, "-m", "trainers"], cwd=PACK, env={"PYTHONPATH": str(PACK)}, capture_output=True, text=True, check=False
    )
    assert "No module named trainers" in by_name.stderr, "else this Python is not isolated"
    train_by_path(tmp_path / "training", python, pack=oddly_named_pack)
