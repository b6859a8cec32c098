"""How fast the device computes and copies, how fast the model's file is read, and whether copies hide behind computing."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import nn

from .. import rates
from ..machine import CARDS, MIB, Card, size_text
from ..measurements import device_key, drive_key, host_key
from ..offload.arrangement import Arrangement
from ..offload.linear import FrozenLinear
from ..offload.pinned import Buffer
from ..rates import finish, large_file, name_of, seconds_of
from ..residency import Residency
from .lines import Bench, Check, Line, State

_GROUP = "rates and overlap"
_SLOW_COPY, _SLOW_READ = 6e9, 5e8
_COPIED_BYTES, _COPIED_ON_CPU_BYTES = 128 * MIB, 16 * MIB
_BLOCKS = 6
_MOST_STALL = 0.05
_HIDDEN = 1.5
"""How many times longer than its copy a block computes: then all of the copy can hide."""
_UNHURRIED_SECONDS = 0.03
_LARGE_SIDE, _SMALL_SIDE, _ROWS = 8192, 1024, 256
"""Of a block: in bf16 128 MiB, and 2 MiB for what is slow; rows that a product is timed with."""


@contextmanager
def _kept_unless_disturbed(bench: Bench) -> Iterator[dict[str, float]]:
    """Rates to keep of the device; not those measured while another process computes on it: it would seem slow for good."""
    disturbed, found = rates.is_used_by_others(bench.device), dict[str, float]()
    yield found
    if not disturbed:
        bench.kept.keep("devices", device_key(bench.device), found, bench.device)


def usual_gpu(name: str) -> Card | None:
    """The typical GPU of a device's name, by whole words: an RTX A1000 is no A100, a T400 no T4."""
    return next((card for card in CARDS if re.search(rf"\b{re.escape(card.name)}\b", name)), None)


def _computing(bench: Bench) -> Iterator[Line]:
    device, dtype = bench.device, bench.dtype
    with _kept_unless_disturbed(bench) as found:
        flops, memory = rates.flops_rate(device, dtype), rates.memory_rate(device)
        found |= {f"{name_of(dtype)}_flops": flops, "memory": memory}
    usual = usual_gpu(torch.cuda.get_device_name(device)) if bench.on_gpu else None
    slow = usual is not None and flops < 0.5e12 * usual.tera_flops
    remedy = f"Usual for a GPU of this kind: {usual.tera_flops} TFLOPS. Is it busy, hot, or on battery?" if usual else ""
    text = f"{flops / 1e12:.3g} TFLOPS in {name_of(dtype)}, {memory / 1e9:.3g} GB/s of its own memory"
    yield Line("computing", "slow" if slow else "ok", text, remedy)


def _copies(bench: Bench) -> Iterator[Line]:
    device = bench.device
    with _kept_unless_disturbed(bench) as found:
        found["copy"] = rate = rates.copy_rate(device)
    if not bench.on_gpu:
        yield Line("copies", "ok", f"{rate / 1e9:.3g} GB/s from memory to memory")
        return
    state: State = "ok" if rate >= _SLOW_COPY else "slow"
    remedy = "The GPU may sit in a slow PCIe slot, or save power: check its link (nvidia-smi -q, Link Width)."
    yield Line("pinned to GPU", state, f"{rate / 1e9:.3g} GB/s", remedy)
    back, both, plain = _other_copies(device)
    yield Line("other copies", "ok", f"{back / 1e9:.3g} GB/s back, {both / 1e9:.3g} both ways at once, {plain / 1e9:.3g} not pinned")


def _other_copies(device: torch.device) -> tuple[float, float, float]:
    """Bytes per second from the GPU, both ways at once (of both), and to it from memory that is not pinned."""
    host, second = Buffer(_COPIED_BYTES, device), Buffer(_COPIED_BYTES, device)
    plain = torch.ones(_COPIED_BYTES, dtype=torch.uint8)
    target, source = (torch.ones(_COPIED_BYTES, dtype=torch.uint8, device=device) for _ in range(2))
    beside: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def both() -> None:
        beside.wait_stream(torch.cuda.current_stream(device))
        target.copy_(host.bytes, non_blocking=True)
        with torch.cuda.stream(beside):
            second.bytes.copy_(source, non_blocking=True)
        torch.cuda.current_stream(device).wait_stream(beside)

    try:
        back = _COPIED_BYTES / seconds_of(lambda: second.bytes.copy_(source, non_blocking=True), device)
        twice = 2 * _COPIED_BYTES / seconds_of(both, device)
        return back, twice, _COPIED_BYTES / seconds_of(lambda: target.copy_(plain), device)
    finally:
        finish(device)
        host.close()
        second.close()


def _file(bench: Bench) -> Iterator[Line]:
    """The model's file, not in memory and in memory. Without one, a new file on the drive of the runs, which is in memory."""
    if bench.base is None:
        yield Line("reading the model", "skipped", "no file was given", "Add --base FILE, the model you train on.")
        with TemporaryDirectory(prefix=".check-", dir=bench.runs_folder) as folder:
            path = Path(folder, "file")
            path.write_bytes(os.urandom(MIB) * 160)
            yield _in_memory(bench, path)
        return
    file = large_file(bench.base)
    if file is None:
        yield Line("reading the model", "skipped", "the file is missing or too small to measure", "Give the transformer's own file.")
        return
    rate = rates.read_rate(file)
    if rate is None:
        yield Line("reading the model", "skipped", "Windows reads it from its cache; 2 GB/s are assumed")
    else:
        bench.kept.keep("drives", drive_key(file), {"read": rate})
        remedy = "Put the model on an NVMe drive of this machine: streamed weights come from it when RAM is short."
        yield Line("reading the model", "ok" if rate >= _SLOW_READ else "slow", f"{rate / 1e9:.3g} GB/s, not in memory", remedy)
    yield _in_memory(bench, file)


def _in_memory(bench: Bench, file: Path) -> Line:
    rate = rates.host_copy_rate(file)
    if rate is None:
        return Line("a file in memory", "skipped", "the file is too small to measure")
    bench.kept.keep("hosts", host_key(), {"host_copy": rate})
    return Line("a file in memory", "ok", f"{rate / 1e9:.3g} GB/s into a staging buffer")


class _Ring(nn.Module):
    """Blocks of one frozen square matrix each."""

    def __init__(self, side: int, dtype: torch.dtype) -> None:
        super().__init__()
        weights = (torch.full((side, side), 1 / side, dtype=dtype) for _ in range(_BLOCKS))
        self.blocks = nn.ModuleList(nn.Sequential(FrozenLinear(weight)) for weight in weights)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            rows = block(rows)
        return rows


def _overlap(bench: Bench) -> Iterator[Line]:
    """A ring of blocks of a large model's size, each with so much to compute that its copy can hide."""
    device, dtype = bench.device, bench.dtype
    side = _LARGE_SIDE if _copy_seconds(_LARGE_SIDE, device, dtype) < _UNHURRIED_SECONDS else _SMALL_SIDE
    block_bytes = side**2 * dtype.itemsize
    copy, product = _copy_seconds(side, device, dtype), _product_seconds(side, device, dtype)
    hosts: tuple[Literal["pinned", "mapped"], ...] = ("pinned", "mapped")
    for host in hosts:
        if host == "mapped":
            copy = max(copy, block_bytes / bench.kept.rates("hosts", host_key()).get("host_copy", rates.ASSUMED_HOST_COPY_RATE))
        rows = max(int(_ROWS * _HIDDEN * copy / product), 1)
        resident = _seconds_of_a_pass(device, side, dtype, rows, Arrangement())
        streamed = _seconds_of_a_pass(device, side, dtype, rows, Arrangement(weights_bytes=2 * block_bytes, host=host))
        stall = max(1 - resident / streamed, 0.0)
        text = f"{stall:.0%} of a pass waits for {_BLOCKS} blocks of {size_text(block_bytes)} ({1000 * streamed:.0f} ms)"
        state: State = "ok" if stall < _MOST_STALL else "slow"
        yield Line(
            f"overlap, {host}",
            state,
            text,
            "Copying takes longer than computing hides here: `plan` is too hopeful for streamed models. Please report it.",
        )


def _copy_seconds(side: int, device: torch.device, dtype: torch.dtype) -> float:
    """Of one block, from pinned memory."""
    nbytes = side**2 * dtype.itemsize
    host, target = Buffer(nbytes, device), torch.empty(nbytes, dtype=torch.uint8, device=device)
    try:
        return seconds_of(lambda: target.copy_(host.bytes, non_blocking=True), device)
    finally:
        host.close()


def _product_seconds(side: int, device: torch.device, dtype: torch.dtype) -> float:
    """Of some rows with one block."""
    rows, weight = torch.ones(_ROWS, side, device=device, dtype=dtype), torch.ones(side, side, device=device, dtype=dtype)
    return seconds_of(lambda: rows @ weight, device)


def _seconds_of_a_pass(device: torch.device, side: int, dtype: torch.dtype, rows: int, arrangement: Arrangement) -> float:
    ring = _Ring(side, dtype)
    family: Any = SimpleNamespace(blocks=("blocks",), chunked=())
    residency = Residency(ring, family, device, arrangement)
    with torch.no_grad():
        try:
            residency.enter()
            given = torch.ones(rows, side, dtype=dtype, device=device)
            return _shortest(lambda: ring(given), device)
        finally:
            finish(device)
            residency.leave()


def _shortest(work: Callable[[], object], device: torch.device) -> float:
    """Of three calls, after a first one."""
    found = []
    for _ in range(4):
        started = time.perf_counter()
        work()
        finish(device)
        found.append(time.perf_counter() - started)
    return min(found[1:])


CHECKS = (
    Check(_GROUP, "computing", _computing),
    Check(_GROUP, "copies", _copies),
    Check(_GROUP, "reading the model", _file),
    Check(_GROUP, "overlap", _overlap, gpu_only=True, needs_seconds=8.0),
)
