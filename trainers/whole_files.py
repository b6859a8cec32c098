"""Files and folders that get their name once they are whole, and never before.

They are written beside their place under a hidden name, `.<name>.<process>.partial`, brought to the disk and renamed.
"""

from __future__ import annotations

import filecmp
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_ENDING = ".partial"


@contextmanager
def written_beside(path: Path, *, overwrite: bool = True) -> Iterator[Path]:
    """Where to write a file; on leaving it has the name `path`. On an error nothing changes.

    Without `overwrite` a file of that name stays: one of the same bytes as it is, for any other FileExistsError is raised.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}{_ENDING}")
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


def rename(source: Path, target: Path) -> None:
    """`os.rename`, patient."""
    _patiently(os.rename, source, target)


def replace(source: Path, target: Path) -> None:
    """`os.replace`, patient."""
    _patiently(os.replace, source, target)


def _patiently(move: Callable[[Path, Path], None], source: Path, target: Path, patience_seconds: float = 2.0) -> None:
    """On Windows a virus scanner or an indexer may hold a file for a moment."""
    give_up = time.monotonic() + patience_seconds
    while True:
        try:
            move(source, target)
            return
        except PermissionError:
            if sys.platform != "win32" or time.monotonic() >= give_up:
                raise
            time.sleep(0.05)
