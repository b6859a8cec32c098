"""A file of weights that is mapped and read through one handle: both give the same bytes, even when another file takes its name."""

from __future__ import annotations

import mmap
import os
import threading
import warnings
import weakref
from dataclasses import dataclass
from pathlib import Path

import torch

_open_files: weakref.WeakSet[MappedFile] = weakref.WeakSet()


class MappedFile(mmap.mmap):
    """A file, mapped read-only, which stays open as long as one of its tensors lives."""

    _path: Path
    _descriptor: int
    _start: int
    _lock: threading.Lock

    def __new__(cls, path: Path) -> MappedFile:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        try:
            file = super().__new__(cls, descriptor, 0, access=mmap.ACCESS_READ)
        except BaseException:
            os.close(descriptor)
            raise
        weakref.finalize(file, os.close, descriptor)
        file._path, file._descriptor, file._lock = path, descriptor, threading.Lock()
        file._start = file.tensor(0, 1).data_ptr()
        _open_files.add(file)
        return file

    def tensor(self, offset: int, nbytes: int) -> torch.Tensor:
        """A part of the mapping as bytes (uint8), without a copy: never write to it."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given buffer is not writable")
            return torch.frombuffer(self, dtype=torch.uint8, count=nbytes, offset=offset)

    def offset_of(self, tensor: torch.Tensor) -> int | None:
        """Where in the file a tensor lies whose memory is part of the mapping; None for any other."""
        offset = tensor.data_ptr() - self._start
        return offset if offset >= 0 and offset + tensor.nbytes <= len(self) else None

    def read_into(self, offset: int, target: torch.Tensor) -> None:
        """Fills `target` (uint8, contiguous) from the file, without the mapping; any thread may. Raises OSError."""
        left = target.numpy().data
        while left:
            count = self._read_at(left, offset)
            if not count:
                raise OSError(f"{self._path.name} ends at byte {offset}: it was cut short after training began. Copy it back and resume.")
            left, offset = left[count:], offset + count

    def _read_at(self, target: memoryview, offset: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self._descriptor, [target], offset)
        with self._lock:  # Windows has no reading at a position: two threads would move each other's
            os.lseek(self._descriptor, offset, os.SEEK_SET)
            return _read_here(self._descriptor, target)


def _read_here(descriptor: int, target: memoryview) -> int:
    """Reads from the descriptor's position into `target`, without a copy between."""
    with open(descriptor, "rb", buffering=0, closefd=False) as file:
        return file.readinto(target) or 0


@dataclass(frozen=True)
class FileRange:
    """The bytes of a tensor in a file, which is kept open."""

    file: MappedFile
    offset: int

    def read_into(self, target: torch.Tensor) -> None:
        self.file.read_into(self.offset, target)


def range_of(tensor: torch.Tensor) -> FileRange | None:
    """Where a mapped tensor, or a contiguous part of one, lies in its file; None for memory of its own (quantised, converted)."""
    if tensor.device.type != "cpu" or not tensor.is_contiguous() or not tensor.nbytes:
        return None
    for file in list(_open_files):
        if (offset := file.offset_of(tensor)) is not None:
            return FileRange(file, offset)
    return None
