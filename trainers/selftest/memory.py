"""How much host memory can be pinned, whether the limit of GPU memory holds, and whether a full GPU recovers."""

from __future__ import annotations

import time
from collections.abc import Iterator

import psutil
import torch

from ..machine import GIB, MIB, available_ram, size_text
from ..measurements import device_key
from ..offload.copies import copies_of
from ..offload.pinned import Buffer, PinningError, register
from .lines import Bench, Check, Line, State

_PINNED, _CAP = "pinned memory", "limit of GPU memory"
_PIECE_BYTES = 256 * MIB
_SHARE, _KEPT_BYTES = 0.6, 2 * GIB
_PINNING_SECONDS = 8.0
_LITTLE_BYTES = 8 * GIB
_QUICK_SECONDS = 1.0


def _pinnable(bench: Bench) -> Iterator[Line]:
    """Pins pieces until the system refuses, or 60 % of RAM are pinned, and unpins them all."""
    most = min(int(_SHARE * psutil.virtual_memory().total), available_ram() - _KEPT_BYTES)
    pieces: list[Buffer] = []
    refused, started = "", time.monotonic()
    try:
        while (len(pieces) + 1) * _PIECE_BYTES <= most and time.monotonic() - started < _PINNING_SECONDS:
            pieces.append(Buffer(_PIECE_BYTES, bench.device))
    except (PinningError, RuntimeError, MemoryError) as error:
        refused = " ".join(str(error).split())
    finally:
        for piece in pieces:
            piece.close()
    key = device_key(bench.device)
    pinned, seconds = len(pieces) * _PIECE_BYTES, time.monotonic() - started
    if not refused:
        bench.kept.keep("devices", key, {"pinnable": psutil.virtual_memory().total})  # an earlier refusal holds no more
        yield Line("most pinned", "ok", f"{size_text(pinned)} in {seconds:.1f} s, nothing was refused")
        return
    bench.kept.keep("devices", key, {"pinnable": max(pinned, 1)})
    state: State = "slow" if pinned < _LITTLE_BYTES else "ok"
    remedy = "Raise the limit (WSL: memory in .wslconfig; containers: ulimit -l), or close other programs that pin memory."
    yield Line("most pinned", state, f"{size_text(pinned)}, then the system refuses; `plan` keeps to it", remedy)


def _refusal(bench: Bench) -> Iterator[Line]:
    """CUDA says its last error once more to whoever launches next, unless somebody asked."""
    piece = Buffer(MIB, bench.device)
    try:
        register(piece.bytes, bench.device)
        yield Line("after a refusal", "failed", "memory that is pinned already was pinned again", "Please report it, with the block below.")
    except PinningError:
        total = torch.ones(8, device=bench.device).sum()
        torch.cuda.synchronize(bench.device)
        yield Line("after a refusal", "ok" if float(total) == 8 else "failed", "pinning twice is refused, and leaves no error behind")
    finally:
        piece.close()


def _asynchronous(bench: Bench) -> Iterator[Line]:
    """Python must go on while a copy runs, or copies hide behind nothing."""
    piece, copies = Buffer(_PIECE_BYTES, bench.device), copies_of(bench.device)
    try:
        target = torch.empty(_PIECE_BYTES, dtype=torch.uint8, device=bench.device)
        copies.finish(copies.copy(target, piece.bytes, None))
        started = time.perf_counter()
        end = copies.copy(target, piece.bytes, copies.mark())
        returned = time.perf_counter() - started
        copies.finish(end)
        whole = time.perf_counter() - started
    finally:
        piece.close()
    state: State = "ok" if returned < 0.5 * whole else "slow"
    text = f"the call returns after {1000 * returned:.1f} ms of the {1000 * whole:.1f} ms that {size_text(_PIECE_BYTES)} take"
    yield Line("asynchronous copies", state, text, "Python waits for copies: update the driver; in WSL, train in Windows.")


def _cap(bench: Bench) -> Iterator[Line]:
    """Beyond its limit the allocator must fail, at once: a driver that spills into RAM makes steps 10 to 50 times slower."""
    device = bench.device
    _, total = torch.cuda.mem_get_info(device)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved(device)
    limit = min(before + GIB, total)
    torch.cuda.set_per_process_memory_fraction(limit / total, device)
    started, taken = time.monotonic(), None
    try:
        taken = torch.empty(limit - before + 256 * MIB, dtype=torch.uint8, device=device)
        torch.cuda.synchronize(device)
    except torch.OutOfMemoryError:
        pass
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
    seconds = time.monotonic() - started
    if taken is not None:
        remedy = "NVIDIA Control Panel, CUDA - Sysmem Fallback Policy: Prefer No Sysmem Fallback; else report it."
        yield Line("the limit holds", "failed", f"{size_text(taken.nbytes)} were given beyond {size_text(limit)}", remedy)
        return
    state: State = "ok" if seconds < _QUICK_SECONDS else "slow"
    yield Line(
        "the limit holds", state, f"beyond {size_text(limit)} there is an error within {1000 * seconds:.0f} ms", "Update the driver."
    )
    torch.cuda.empty_cache()
    left = torch.cuda.memory_reserved(device) - before
    back = torch.empty(64 * MIB, dtype=torch.uint8, device=device).fill_(1)
    right = left <= 0 and int(back[-1]) == 1
    yield Line("memory after it", "ok" if right else "failed", f"{size_text(max(left, 0))} still taken; the GPU works")


CHECKS = (
    Check(_PINNED, "most pinned", _pinnable, gpu_only=True, needs_seconds=10.0),
    Check(_PINNED, "after a refusal", _refusal, gpu_only=True),
    Check(_PINNED, "asynchronous copies", _asynchronous, gpu_only=True),
    Check(_CAP, "the limit holds", _cap, gpu_only=True),
)
