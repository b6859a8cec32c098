"""How fast a device computes and copies, and how fast a model's file is read: measured here, once for each device and drive.

Rates are bytes or operations per second. What was measured is kept beside the runs (`measurements.py`).
"""

from __future__ import annotations

import math
import mmap
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch

from .measurements import Measurements, device_key, drive_key, host_key
from .offload.mapped_file import MappedFile
from .offload.pinned import PinningError, give_back_pinned_cache, pinned_copy

ASSUMED_DISK_RATE = 2e9
"""Of a file that is not in memory: an NVMe drive."""
ASSUMED_HOST_COPY_RATE = 8e9
"""Of one thread that copies from a mapped file in memory into a staging buffer."""
MIB = 2**20
PIECE_BYTES = 16 * MIB
_LEAST_FILE_BYTES = 8 * PIECE_BYTES
"""Of a smaller file too little is read for a rate."""
_MOST_READ_BYTES = 512 * MIB
_READ_SECONDS = 0.5


@dataclass(frozen=True)
class Rates:
    """`flops` is what a large matrix product reaches, `memory` what the device's memory does, `copy` pinned memory to the device.

    `measured`: which of the fields were measured on this machine; the others are assumptions.
    """

    flops: float
    memory: float
    copy: float
    host_copy: float = ASSUMED_HOST_COPY_RATE
    disk: float = ASSUMED_DISK_RATE
    measured: frozenset[str] = field(default_factory=frozenset)


def rates_of(device: torch.device, dtype: torch.dtype, base: Path | None = None, kept: Measurements | None = None) -> Rates:
    """The rates of this machine: the kept ones, and for those that are missing, new ones, which are kept. `base`: the model's file.

    It takes a second the first time, and no time later.
    """
    kept = kept or Measurements(None)
    flops, key = f"{name_of(dtype)}_flops", device_key(device)
    device_rates = kept.rates("devices", key)
    lacking: dict[str, Callable[[], float]] = {
        flops: lambda: flops_rate(device, dtype),
        "memory": lambda: memory_rate(device),
        "copy": lambda: copy_rate(device),
    }
    if missing := [name for name in lacking if name not in device_rates]:
        disturbed = is_used_by_others(device)
        new = {name: lacking[name]() for name in missing}
        if not disturbed:
            kept.keep("devices", key, new, device)
        device_rates |= new
    host, disk = _file_rates(base, kept)
    found = {"host_copy": host, "disk": disk}
    measured = {"flops", "memory", "copy", *(name for name, rate in found.items() if rate)}
    return Rates(
        device_rates[flops],
        device_rates["memory"],
        device_rates["copy"],
        host or ASSUMED_HOST_COPY_RATE,
        disk or ASSUMED_DISK_RATE,
        frozenset(measured),
    )


def is_used_by_others(device: torch.device) -> bool:
    """Whether a GPU computes for another process, such as a ComfyUI that renders: it would seem slow for good."""
    from . import nvidia_smi

    return device.type == "cuda" and nvidia_smi.is_used_by_others(str(getattr(torch.cuda.get_device_properties(device), "uuid", "")))


def _file_rates(base: Path | None, kept: Measurements) -> tuple[float | None, float | None]:
    """Rates of copying from a mapped file and of reading the drive; None where it cannot be measured."""
    host = kept.rates("hosts", host_key()).get("host_copy")
    file = None if base is None else large_file(base)
    disk = None
    if file is None:
        return host, disk
    with suppress(OSError):  # a drive that cannot be read now, or a mapping that the system refuses: plans then assume a rate
        disk = kept.rates("drives", drive_key(file)).get("read")
        if disk is None and (disk := read_rate(file)):
            kept.keep("drives", drive_key(file), {"read": disk})
    with suppress(OSError):
        if host is None and (host := host_copy_rate(file)):
            kept.keep("hosts", host_key(), {"host_copy": host})
    return host, disk


def large_file(base: Path) -> Path | None:
    """The model's file, or the largest one of its folder; None when there is none that takes long enough to read."""
    try:
        files = [path for path in base.iterdir() if path.is_file()] if base.is_dir() else [base]
        if base.suffix == ".json":  # the index of shards
            files = list(base.parent.glob("*.safetensors"))
        largest = max(files, key=lambda path: path.stat().st_size, default=None)
        return largest if largest and largest.stat().st_size >= _LEAST_FILE_BYTES else None
    except OSError:
        return None


def flops_rate(device: torch.device, dtype: torch.dtype) -> float:
    side = 4096 if device.type == "cuda" else 512
    left, right = (torch.ones(side, side, device=device, dtype=dtype) for _ in range(2))
    return 2 * side**3 / seconds_of(lambda: left @ right, device)


def memory_rate(device: torch.device) -> float:
    """Reading and writing both count."""
    source = torch.empty(128 * MIB if device.type == "cuda" else 16 * MIB, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds_of(lambda: target.copy_(source), device)


def copy_rate(device: torch.device) -> float:
    """From pinned host memory to a GPU; elsewhere from memory to memory."""
    source = torch.empty(128 * MIB if device.type == "cuda" else 16 * MIB, dtype=torch.uint8)
    if device.type == "cuda":
        with suppress(PinningError):  # then what is not pinned is what there will be to copy from
            source = pinned_copy(source, device)
    rate = _rate_of_copying(source, device)
    del source
    give_back_pinned_cache(device)
    return rate


def _rate_of_copying(source: torch.Tensor, device: torch.device) -> float:
    target = torch.empty_like(source, device=device)
    return source.nbytes / seconds_of(lambda: target.copy_(source, non_blocking=True), device)


def read_rate(path: Path) -> float | None:
    """Of a file that is not in memory, by reading pieces of it for half a second; None where the system's cache cannot be passed by."""
    if sys.platform == "win32":
        return None
    with open(path, "rb", buffering=0) as file:
        pieces = _pieces(file.seek(0, os.SEEK_END))
        if not _forget(file.fileno(), pieces):
            return None
        return _rate_of_pieces(pieces, lambda start, piece: file.seek(start) and file.readinto(piece))


def host_copy_rate(path: Path) -> float | None:
    """Of copying a part of a mapped file that is in memory."""
    mapped = MappedFile(path)  # read-only: Windows promises memory for all of a mapping that can be written to

    def copy(start: int, piece: memoryview) -> None:
        torch.frombuffer(piece, dtype=torch.uint8).copy_(mapped.tensor(start, PIECE_BYTES))

    pieces = _pieces(len(mapped))[:2]
    for start in pieces:
        _rate_of_pieces([start], copy)  # brings it into memory
    return _rate_of_pieces(4 * pieces, copy)


def _pieces(size: int) -> list[int]:
    """Where the pieces start that are read: evenly over the file, the header apart."""
    count = min(size // PIECE_BYTES - 1, _MOST_READ_BYTES // PIECE_BYTES)
    return [PIECE_BYTES + (size // PIECE_BYTES - 1) * index // count * PIECE_BYTES for index in range(count)]


def _forget(descriptor: int, pieces: list[int]) -> bool:
    """Lets the system drop the pieces from its cache; False where it cannot be asked to."""
    if sys.platform == "linux":
        for start in pieces:
            os.posix_fadvise(descriptor, start, PIECE_BYTES, os.POSIX_FADV_DONTNEED)
        return True
    if sys.platform == "darwin":
        import fcntl

        fcntl.fcntl(descriptor, fcntl.F_NOCACHE, 1)
        return True
    return False


def _rate_of_pieces(pieces: list[int], take: Callable[[int, memoryview], object]) -> float | None:
    with mmap.mmap(-1, PIECE_BYTES) as memory, memoryview(memory) as piece:
        memory.write(bytes(PIECE_BYTES))  # its pages are there before the clock starts
        taken, started = 0, time.perf_counter()
        for start in pieces:
            take(start, piece)
            taken += PIECE_BYTES
            if time.perf_counter() - started >= _READ_SECONDS:
                break
        return taken / max(time.perf_counter() - started, 1e-9) if taken else None


def seconds_of(work: Callable[[], object], device: torch.device, at_least: float = 0.05) -> float:
    """Seconds of the shortest call: after a first one, of as many as fill `at_least` seconds. Other programs make calls longer."""
    work()
    finish(device)
    shortest, passed = math.inf, 0.0
    while not passed or passed < at_least:
        started = time.perf_counter()
        work()
        finish(device)
        seconds = max(time.perf_counter() - started, 1e-9)
        shortest, passed = min(shortest, seconds), passed + seconds
    return shortest


def finish(device: torch.device) -> None:
    """Waits for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
