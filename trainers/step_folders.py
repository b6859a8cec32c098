"""Folders named after steps (`step-000500`), each of which appears whole or not at all.

A folder is written beside its place under a hidden name, brought to the disk and renamed. What a killed writer leaves
has one of three endings:

    .step-000500.<random>.tmp     half written: removed
    .step-000500.<random>.old     the previous step-000500, moved away for the new one: moved back if that never came
    .step-000500.<random>.trash   being removed: removed
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .whole_files import rename

_STEP = re.compile(r"step-(\d{6,})")
_LEFTOVER = re.compile(r"\.(step-\d{6,})\.[0-9a-f]+\.(tmp|old|trash)")


class StepFolders:
    """The step folders in `folder`. One process at a time may write; any may read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:06d}"

    def steps(self) -> list[int]:
        """The steps that have a folder, ascending."""
        matches = [_STEP.fullmatch(name) for name in _names(self.folder)]
        return sorted(int(match[1]) for match in matches if match)

    @contextmanager
    def writing(self, step: int) -> Iterator[Path]:
        """An empty folder to fill; on leaving it is `path(step)`, replacing an earlier one. On an error nothing changes."""
        self.tidy()  # what an earlier attempt could not remove would take the disk's space
        unfinished = self._beside(step, "tmp")
        unfinished.mkdir(parents=True)
        try:
            yield unfinished
            _flush_tree(unfinished)
            self._put(unfinished, step)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise

    def remove(self, step: int) -> None:
        """Remove a step's folder; no reader sees half of it. Raises OSError when it cannot be moved; it is whole then."""
        self._discard(self.path(step), step)

    def tidy(self) -> None:
        """Puts right what a killed writer left. Call it only while no other process writes."""
        for name in _names(self.folder):
            match = _LEFTOVER.fullmatch(name)
            if match and match[2] == "old" and not (self.folder / match[1]).exists():
                rename(self.folder / name, self.folder / match[1])
            elif match:
                shutil.rmtree(self.folder / name, ignore_errors=True)

    def _put(self, unfinished: Path, step: int) -> None:
        target = self.path(step)
        if not target.exists():
            rename(unfinished, target)
            flush_folder(self.folder)
            return
        old = self._beside(step, "old")
        rename(target, old)
        try:
            rename(unfinished, target)
        except BaseException:
            rename(old, target)
            raise
        flush_folder(self.folder)
        with suppress(OSError):  # what stays is removed by `tidy`
            self._discard(old, step)

    def _discard(self, folder: Path, step: int) -> None:
        trash = self._beside(step, "trash")
        rename(folder, trash, patience_seconds=2.0)  # one that is open in the Explorer is removed another time
        shutil.rmtree(trash, ignore_errors=True)

    def _beside(self, step: int, ending: str) -> Path:
        return self.folder / f".{self.path(step).name}.{secrets.token_hex(4)}.{ending}"


def flush_folder(folder: Path) -> None:
    """Bring a folder's list of names to the disk, where the system can (Windows does so by itself)."""
    if sys.platform == "win32":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _flush_tree(folder: Path) -> None:
    for parent, _, names in os.walk(folder):
        for name in names:
            with open(os.path.join(parent, name), "r+b") as file:
                os.fsync(file.fileno())
        flush_folder(Path(parent))


def _names(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except FileNotFoundError:
        return []
