"""Files and folders that get their name once they are whole, and never before.

They are written beside their place under a hidden name, `.<random>.partial`, brought to the disk and renamed. That name is
short: Windows allows 260 characters for a path, and a run's name is in its folder and in its LoRA files already.
"""

from __future__ import annotations

import filecmp
import os
import secrets
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PATIENCE_SECONDS = 60.0
"""How long a rename waits on Windows for whoever has the file open."""

_ENDING = ".partial"
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.05, 2.0


@contextmanager
def written_beside(path: Path, *, overwrite: bool = True) -> Iterator[Path]:
    """Where to write a file; on leaving it has the name `path`. On an error nothing changes.

    Without `overwrite` a file of that name stays: one of the same bytes as it is, for any other FileExistsError is raised.
    """
    partial = path.with_name(f".{secrets.token_hex(4)}{_ENDING}")
    try:
        yield partial
        if not overwrite and path.exists():
            if not filecmp.cmp(partial, path, shallow=False):
                raise FileExistsError(f"{path} exists and holds something else")
            return  # Windows replaces no file that a program has mapped
        with open(partial, "r+b") as file:
            os.fsync(file.fileno())
        replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def remove_partial_files(folder: Path) -> None:
    """Remove what killed writers left in a folder. Call it only while no process writes there."""
    for partial in folder.glob(f".*{_ENDING}"):
        with suppress(OSError):
            partial.unlink()


def rename(source: Path, target: Path, patience_seconds: float = PATIENCE_SECONDS) -> None:
    """`os.rename`, patient."""
    _patiently(os.rename, source, target, patience_seconds)


def replace(source: Path, target: Path) -> None:
    """`os.replace`, patient."""
    _patiently(os.replace, source, target, PATIENCE_SECONDS)


def _patiently(move: Callable[[Path, Path], None], source: Path, target: Path, patience_seconds: float) -> None:
    """On Windows a virus scanner, an indexer or a sync client opens what was just written, for long if it is large."""
    give_up, pause_seconds = time.monotonic() + patience_seconds, _FIRST_PAUSE_SECONDS
    while True:
        try:
            move(source, target)
            return
        except PermissionError:
            if sys.platform != "win32" or time.monotonic() + pause_seconds > give_up:
                raise
            time.sleep(pause_seconds)
            pause_seconds = min(2 * pause_seconds, _LONGEST_PAUSE_SECONDS)
