"""The folder of the runs: long paths, renaming, locks of processes that die, and workers that live on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from ..launch import helper_command, start_apart
from ..lock import probe
from ..whole_files import rename, written_beside
from .lines import Bench, Check, Line, State

_GROUP = "the runs folder"
_LONG_NAME = "n" * 60
_LONGEST = Path("checkpoints", ".step-000500.00000000.partial", "optimizer-high.pt")
_PATIENCE_SECONDS = 20.0
_SLOW_SECONDS = 1.0
_MIB = 2**20

_HOLD_A_LOCK = """
from trainers.lock import FileLock
from pathlib import Path
import time
lock = FileLock(Path(sys.argv[1]))
assert lock.acquire()
time.sleep(60)
"""

_START_A_WORKER = """
from trainers.launch import helper_command, start_apart
from pathlib import Path
start_apart(helper_command(WORKER, sys.argv[1]), Path(sys.argv[1]).parent, Path(sys.argv[1]))
"""

_WORKER = """
import time
print("started", flush=True)
time.sleep(1.5)
print("lives on", flush=True)
"""


def _paths(bench: Bench) -> Iterator[Line]:
    """What a run with a long name writes, relative to the runs folder; it is tried, since Windows can be set up for longer paths."""
    with _folder(bench) as folder:
        base = folder.parent / f".check-{_LONG_NAME}"[: len(_LONG_NAME)]
        path = base / _LONGEST
        characters = len(str(path.absolute()))
        try:
            path.parent.mkdir(parents=True)
            path.write_bytes(b"1")
        except OSError as error:
            text = f"a run with a name of {len(_LONG_NAME)} characters needs paths of {characters}: {type(error).__name__}"
            yield Line("long paths", "failed", text, "Use short names and folders, or switch on long paths in Windows (LongPathsEnabled).")
            return
        finally:
            _remove(base)
        yield Line("long paths", "ok", f"a path of {characters} characters can be written, as a run with a long name needs")


def _renames(bench: Bench) -> Iterator[Line]:
    """A checkpoint is written beside its place and renamed: scanners open what is new."""
    with _folder(bench) as folder:
        first, second = folder / "written", folder / "checkpoint"
        first.mkdir()
        started = time.monotonic()
        for number in range(4):
            (first / f"{number}.bin").write_bytes(b"1" * 4 * _MIB)
        with written_beside(first / "whole.bin") as partial:
            partial.write_bytes(b"1" * _MIB)
        written = time.monotonic() - started
        started = time.monotonic()
        rename(first, second)
        seconds = time.monotonic() - started
        state: State = "ok" if seconds < _SLOW_SECONDS else "slow"
        remedy = "Something holds new files open (a virus scanner, OneDrive): exclude this folder from it."
        yield Line("renaming a checkpoint", state, f"after {1000 * seconds:.0f} ms; 17 MiB are written in {1000 * written:.0f} ms", remedy)


def _locks(bench: Bench) -> Iterator[Line]:
    """The system gives back a lock when its holder is killed."""
    with _folder(bench) as folder:
        path, log = folder / "lock", folder / "log.txt"
        child = start_apart(helper_command(_HOLD_A_LOCK, str(path)), folder, log)
        try:
            held = _until(lambda: probe(path))
        finally:
            child.kill()
            child.wait()
        free = _until(lambda: not probe(path))
        if not held:
            yield Line("a lock", "failed", f"another process could not take it: {_last(log)}", "Put the runs on a drive of this machine.")
            return
        remedy = "Put the runs on a drive of this machine: this one keeps locks of processes that are gone."
        yield Line("a lock", "ok" if free else "failed", f"is {'free again' if free else 'still held'} when its holder was killed", remedy)


def _workers(bench: Bench) -> Iterator[Line]:
    """A worker must live on when ComfyUI ends, and what it prints must be in its log."""
    with _folder(bench) as folder:
        log = folder / "worker.log"
        parent = start_apart(helper_command(_START_A_WORKER.replace("WORKER", repr(_WORKER)), str(log)), folder, folder / "parent.log")
        parent.wait()
        started = _until(lambda: "started" in _last(log))
        alive = started and _until(lambda: "lives on" in _last(log))
        if not started:
            yield Line("a worker", "failed", f"did not start: {_last(folder / 'parent.log')}", "Please report it, with the block below.")
            return
        text = "lives on when the process that started it ends, and its log is written" if alive else "is ended with its starter"
        yield Line("a worker", "ok" if alive else "failed", text, "Start trainings from the command line: python -m trainers train.")


@contextmanager
def _folder(bench: Bench) -> Iterator[Path]:
    """A hidden folder beside the runs."""
    with TemporaryDirectory(prefix=".check-", dir=bench.runs_folder, ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def _remove(base: Path) -> None:
    """The folders of `_LONGEST`, as far as they were made; `shutil` would not find what is too long."""
    for path in (base / _LONGEST, *list((base / _LONGEST).parents)):
        if path == base.parent:
            return
        if path.is_dir():
            path.rmdir()
        else:
            path.unlink(missing_ok=True)


def _until(right: Callable[[], bool]) -> bool:
    """Whether something becomes true within some patience: Python starts slowly on a busy machine."""
    give_up = time.monotonic() + _PATIENCE_SECONDS
    while not (found := right()) and time.monotonic() < give_up:
        time.sleep(0.05)
    return bool(found)


def _last(log: Path) -> str:
    try:
        return " ".join(log.read_text("utf-8", "replace").split())[-300:]
    except OSError:
        return ""


CHECKS = (
    Check(_GROUP, "long paths", _paths),
    Check(_GROUP, "renaming a checkpoint", _renames),
    Check(_GROUP, "a lock", _locks, needs_seconds=3.0),
    Check(_GROUP, "a worker", _workers, needs_seconds=5.0),
)
