"""What is read off a process, a card and a profile: memory by the kernel's account, copies, how long the card was idle."""

from __future__ import annotations

import json
import platform
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

GIB = 2**30
MIB = 2**20


def host_memory() -> dict[str, int]:
    """Bytes of this process by the kernel's account: `anonymous` is its own (a mapped file's pages are not), `pss` its share of
    all, `rss` all. Empty where the kernel gives no account.
    """
    try:
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    except OSError:
        return {}
    kept = {"Anonymous": "anonymous", "Pss": "pss", "Rss": "rss", "Private_Dirty": "private_dirty", "Private_Clean": "private_clean"}
    rows = (line.split() for line in lines)
    return {kept[row[0].rstrip(":")]: int(row[1]) * 1024 for row in rows if row[0].rstrip(":") in kept}


def card_memory(device: torch.device) -> dict[str, float]:
    """GiB of the card: the most allocated and reserved so far, and what the process takes besides (its context, libraries)."""
    if device.type != "cuda":
        return {}
    free, total = torch.cuda.mem_get_info(device)
    return {
        "peak_allocated_gib": torch.cuda.max_memory_allocated(device) / GIB,
        "peak_reserved_gib": torch.cuda.max_memory_reserved(device) / GIB,
        "context_gib": (total - free - torch.cuda.memory_reserved(device)) / GIB,
        "alloc_retries": torch.cuda.memory_stats(device).get("num_alloc_retries", 0),
    }


def cap_card(device: torch.device, cap_gib: float | None) -> None:
    """Lets PyTorch reserve so much of the card and no more: beyond it there is an out-of-memory error. None: no limit."""
    if device.type == "cuda" and cap_gib is not None:
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, cap_gib * GIB / total), device)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def profile(step: Callable[[], object], device: torch.device) -> dict[str, Any]:
    """What the card did in one step (see `profile_of`). On a CPU there is nothing to see."""
    activities = [torch.profiler.ProfilerActivity.CUDA] if device.type == "cuda" else [torch.profiler.ProfilerActivity.CPU]
    synchronize(device)
    with torch.profiler.profile(activities=activities) as profiler:
        step()
        synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        return profile_of(json.loads(trace.read_text())["traceEvents"])


def profile_of(events: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Of a Chrome trace: seconds from the first to the last thing on the card, the share without a kernel, seconds in which
    copies ran, and their bytes by direction.
    """
    kernels, copies, directions = [], [], {"HtoD": 0, "DtoH": 0, "DtoD": 0}
    for event in events:
        if event.get("ph") != "X" or event.get("cat") not in ("kernel", "gpu_memcpy", "gpu_memset"):
            continue
        span = float(event["ts"]), float(event["ts"]) + float(event["dur"])
        if event["cat"] == "gpu_memcpy":
            copies.append(span)
            for direction in directions:
                directions[direction] += int(event["args"].get("bytes", 0)) if direction in event["name"] else 0
        elif event["cat"] == "kernel":
            kernels.append(span)
    if not kernels:
        return {}
    everything = kernels + copies
    begin, end = min(start for start, _ in everything), max(stop for _, stop in everything)
    return {
        "seconds": (end - begin) / 1e6,
        "idle_share": 1 - covered(kernels) / (end - begin),
        "copy_seconds": covered(copies) / 1e6,
        "kernels": len(kernels),
        "copied_bytes": directions,
    }


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """The length of what at least one of the spans covers."""
    total, reached = 0.0, float("-inf")
    for start, stop in sorted(spans):
        total += max(stop - max(start, reached), 0.0)
        reached = max(reached, stop)
    return total


def hardware(device: torch.device) -> str:
    """The machine in words, without its name."""
    model = next((line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), platform.machine())
    memory = next((int(line.split()[1]) for line in _lines("/proc/meminfo") if line.startswith("MemTotal")), 0)
    cores = f"{_cores()} cores of {model}, {memory * 1024 / GIB:.0f} GiB"
    return f"{torch.cuda.get_device_name(device)}, {cores}" if device.type == "cuda" else f"{cores}, no GPU"


def versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for package in ("torch", "diffusers", "peft", "accelerate", "transformers", "bitsandbytes"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def _cores() -> int:
    import os

    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 0


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
