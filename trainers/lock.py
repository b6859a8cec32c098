"""Locks held by the operating system: released when their holder dies, however it dies.

Nothing is ever written into a lock file, and it is never deleted (deleting one while another process opens it would
let both of them hold "the" lock). `flock` belongs to an open file, which a forked child shares: children close their
copy at once, so that a killed worker's lock does not live on in its data loaders.
"""

from __future__ import annotations

import getpass
import os
import re
import sys
import tempfile
import time
import weakref
from pathlib import Path
from types import TracebackType

from .errors import RunLocked

_RETRY_SECONDS = 0.01

_PROBE_TRIES = 5 if sys.platform == "win32" else 1
"""Windows has no shared locks: another `probe` holds a free one for a moment, a worker for longer than all these tries."""

if sys.platform == "win32":
    import msvcrt

    _READ_FLAGS = os.O_RDWR
    _FAR_BYTE = 1 << 30  # Windows locks bytes and forbids reading them: lock one that no reader reaches

    def _try_lock(descriptor: int, shared: bool) -> bool:
        os.lseek(descriptor, _FAR_BYTE, os.SEEK_SET)
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True

else:
    import fcntl

    _READ_FLAGS = os.O_RDONLY

    def _try_lock(descriptor: int, shared: bool) -> bool:
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


class FileLock:
    """An exclusive lock on a file, for one process at a time.

    Used with `with`, it raises RunLocked when another holder keeps it for `patience_seconds`. Some patience is always
    needed: `probe` holds a free lock for a moment.
    """

    def __init__(self, path: Path, patience_seconds: float = 0.3) -> None:
        self.path = path
        self._patience_seconds = patience_seconds
        self._descriptor: int | None = None

    @property
    def held(self) -> bool:
        """Whether this object holds the lock."""
        return self._descriptor is not None

    def acquire(self) -> bool:
        """Take the lock, making its file if needed; False when another holder keeps it for `patience_seconds`."""
        assert not self.held, f"{self.path} is locked twice by one object"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        give_up = time.monotonic() + self._patience_seconds
        while not _try_lock(descriptor, shared=False):
            if time.monotonic() >= give_up:
                os.close(descriptor)
                return False
            time.sleep(_RETRY_SECONDS)
        self._descriptor = descriptor
        _held.add(self)
        return True

    def release(self) -> None:
        """Give the lock back; nothing happens when it is not held."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
            _held.discard(self)

    def __enter__(self) -> FileLock:
        if not self.acquire():
            raise RunLocked(f"{self.path} is held by another process; it can have one holder. Wait for that process or stop it.")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.release()


def probe(path: Path) -> bool:
    """Whether some process (this one too) holds the lock on `path`."""
    try:
        descriptor = os.open(path, _READ_FLAGS)
    except FileNotFoundError:
        return False
    try:
        for attempt in range(_PROBE_TRIES):
            if attempt:
                time.sleep(_RETRY_SECONDS)
            if _try_lock(descriptor, shared=True):
                return False
        return True
    finally:
        os.close(descriptor)


def held_by_another(device: str) -> bool:
    """Whether a run of another process holds a device."""
    path = device_lock(device).path
    return path not in {lock.path for lock in _held} and probe(path)


def device_lock(device: str) -> FileLock:
    """The lock of a torch device ("cpu", "cuda:0", "mps"), the same for all runs of this user on this machine.

    A CUDA card is named by its UUID: its index depends on the cards that are visible to the process.
    """
    folder = Path(tempfile.gettempdir()) / f"video-trainer-{_file_name(_user())}"
    return FileLock(folder / f"{_file_name(_device_name(device))}.lock")


def _device_name(device: str) -> str:
    if not device.startswith("cuda"):
        return device
    import torch

    properties = torch.cuda.get_device_properties(torch.device(device))
    return str(getattr(properties, "uuid", device))


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):  # a container's user may have no name
        return str(os.getuid()) if sys.platform != "win32" else "user"


def _file_name(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]", "-", text)


_held: weakref.WeakSet[FileLock] = weakref.WeakSet()


def _release_in_child() -> None:
    for lock in list(_held):
        lock.release()


if sys.platform != "win32":
    os.register_at_fork(after_in_child=_release_in_child)
