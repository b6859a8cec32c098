"""What a machine has: memory of the GPU and of the host, and how fast it computes and copies; measured here, or stated.

Rates are bytes or operations per second. Sizes in GiB are multiples of 2**30 bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from .errors import JobError, Problem
from .measurements import Measurements, device_key
from .memory_limits import (
    LINUX_KEPT_WITH_SWAP_BYTES,
    context_headroom,
    free_after_warm_up,
    pinnable_bytes,
    pinnable_here,
    this_system,
)
from .offload.copies import on_device
from .rates import ASSUMED_DISK_RATE, ASSUMED_HOST_COPY_RATE, rates_of

GIB = 2**30
MIB = 2**20
_CONTEXT_BYTES = GIB // 2
"""What CUDA itself takes of a card for a process, before anything is allocated; some 300 to 500 MiB."""


@dataclass(frozen=True)
class Machine:
    """A device and its host. `flops_rate` is what a large matrix product reaches, `memory_rate` what the device's memory does.

    `free_bytes` of the device and `ram_bytes` of the host are available to a training; `pinnable_bytes` of the host may be pinned
    (None: no limit is known), and `headroom_bytes` of `free_bytes` are for CUDA itself, unless a job says what may be taken.
    `bf16` and `turing`: whether the GPU computes in bf16, and is older than compute capability 8.0. `kernel_time_limit`: whether it
    ends a kernel that runs for seconds, as a GPU that draws a display does. `measured`: which rates were measured on this machine
    ("flops", "memory", "copy", "host_copy", "disk"); the others are assumptions.
    """

    name: str
    device: str
    total_bytes: int
    free_bytes: int
    ram_bytes: int
    flops_rate: float
    memory_rate: float
    copy_rate: float
    host_copy_rate: float = ASSUMED_HOST_COPY_RATE
    disk_rate: float = ASSUMED_DISK_RATE
    bf16: bool = True
    turing: bool = False
    kernel_time_limit: bool = False
    measured: frozenset[str] = frozenset()
    flops_rate_fp32: float | None = None
    """In float32, where another precision's rate is assumed and this one is known to be far from it."""
    pinnable_bytes: int | None = None
    headroom_bytes: int = 0

    def computing_in(self, dtype: torch.dtype) -> Machine:
        """The same machine, whose `flops_rate` is that of `dtype`."""
        known = self.flops_rate_fp32 if dtype == torch.float32 else None
        return self if known is None else replace(self, flops_rate=known)

    def with_limits(self, vram_gib: float | None, ram_gib: float | None) -> Machine:
        """The same machine, of which a training may take no more than these, and no more than is free.

        CUDA's headroom is left, unless `vram_gib` says that a part of what is free may be taken whole.
        """
        own = vram_gib is not None and vram_gib * GIB < self.free_bytes
        free = _at_most(self.free_bytes - (0 if own else self.headroom_bytes), vram_gib)
        return replace(self, free_bytes=free, ram_bytes=_at_most(self.ram_bytes, ram_gib), headroom_bytes=0)


def _at_most(free_bytes: int, limit_gib: float | None) -> int:
    return free_bytes if limit_gib is None else int(min(free_bytes, limit_gib * GIB))


@dataclass(frozen=True)
class Card:
    """A typical card of its size. All rates are assumptions: what large matrix products and copies are known to reach, rounded."""

    name: str
    gib: float
    tera_flops: float
    memory_gb_per_second: float
    copy_gb_per_second: float
    bf16: bool = True
    tera_flops_fp32: float | None = None
    """Of a GPU without bf16, on which some models are trained in float32."""

    def machine(self, ram_gib: float, vram_gib: float | None = None) -> Machine:
        """A host of `ram_gib` with this card and nothing else on it; `vram_gib`: another size than its own."""
        total = int((self.gib if vram_gib is None else vram_gib) * GIB)
        rates = self.tera_flops * 1e12, self.memory_gb_per_second * 1e9, self.copy_gb_per_second * 1e9
        free = max(total - _CONTEXT_BYTES, 0)
        fp32 = None if self.tera_flops_fp32 is None else self.tera_flops_fp32 * 1e12
        ram = int(ram_gib * GIB)
        pinnable = pinnable_bytes(this_system(), ram, LINUX_KEPT_WITH_SWAP_BYTES, ram)
        machine = Machine(self.name, "cuda", total, free, ram, *rates, bf16=self.bf16, turing=not self.bf16, pinnable_bytes=pinnable)
        return replace(machine, flops_rate_fp32=fp32)


CARDS = (
    Card("RTX 4060", 8.0, 24, 240, 12),
    Card("RTX 3060", 12.0, 22, 320, 22),
    Card("T4", 14.7, 24, 240, 11, bf16=False, tera_flops_fp32=4.5),
    Card("RTX 4080", 16.0, 80, 630, 22),
    Card("RTX 4090", 24.0, 140, 900, 22),
    Card("L40S", 48.0, 160, 770, 22),
    Card("A100", 79.2, 230, 1700, 22),
)


def card_of(name: str | None, vram_gib: float | None) -> Card:
    """The card of the table of that name, however it is spaced and capitalised, or the nearest in size (a T4 only by its name).

    Raises JobError for a name that is not in the table.
    """
    if name is None:
        assert vram_gib is not None, "a card has a name or a size"
        return min((card for card in CARDS if card.bf16), key=lambda card: abs(card.gib - vram_gib))
    for card in CARDS:
        if _letters(card.name) == _letters(name):
            return card
    raise JobError(Problem(f"--card is {name}", f"known are {', '.join(card.name for card in CARDS)}", "Give --vram instead."))


def _letters(name: str) -> str:
    return "".join(filter(str.isalnum, name)).lower()


def this_machine(device: torch.device, dtype: torch.dtype, base: Path | None = None, runs_folder: Path | None = None) -> Machine:
    """The machine as it is now. CUDA's context is made.

    What it reads, computes and copies a second is measured, unless the runs folder has it (`measurements.py`), where it is kept.
    `base`: the model's file.
    """
    with on_device(device):
        return _machine(device, dtype, base, Measurements(runs_folder))


def _machine(device: torch.device, dtype: torch.dtype, base: Path | None, kept: Measurements) -> Machine:
    ram = available_ram()
    rates = rates_of(device, dtype, base, kept)
    if device.type == "cuda":
        free, total = free_after_warm_up(device, dtype)
        capability = torch.cuda.get_device_capability(device)
        name, bf16 = torch.cuda.get_device_name(device), capability >= (8, 0)
    else:
        free = total = ram
        name, bf16 = "the CPU" if device.type == "cpu" else "Metal", True
    return Machine(
        name,
        device.type,
        total,
        free,
        ram,
        rates.flops,
        rates.memory,
        rates.copy,
        rates.host_copy,
        rates.disk,
        bf16=bf16,
        turing=not bf16,
        kernel_time_limit=device.type == "cuda" and has_kernel_time_limit(device),
        measured=rates.measured,
        pinnable_bytes=_pinnable(device, ram, kept),
        headroom_bytes=context_headroom(free) if device.type == "cuda" else 0,
    )


def _pinnable(device: torch.device, ram_bytes: int, kept: Measurements) -> int | None:
    """What may be pinned here: no more than where `check` was refused, if it was."""
    found = pinnable_here(device, ram_bytes)
    refused = kept.rates("devices", device_key(device)).get("pinnable")
    return found if found is None or refused is None else min(found, int(refused))


def empty_card(device: torch.device) -> Machine:
    """A CUDA card of this machine as if nothing else were on it. Nothing is measured: what fits does not depend on rates."""
    properties = torch.cuda.get_device_properties(device)
    card = card_of(None, properties.total_memory / GIB)
    older = (properties.major, properties.minor) < (8, 0)
    machine = card.machine(available_ram() / GIB, properties.total_memory / GIB)
    limited = has_kernel_time_limit(device)
    return replace(machine, name=properties.name, bf16=not older, turing=older, kernel_time_limit=limited)


def has_kernel_time_limit(device: torch.device) -> bool:
    """Whether a kernel that runs for seconds is ended."""
    from .nvidia_smi import ends_long_kernels

    return ends_long_kernels(str(getattr(torch.cuda.get_device_properties(device), "uuid", "")))


def size_text(byte_count: int) -> str:
    """A size as people read it: in GiB, and below 0.05 of them in MiB."""
    if byte_count >= 0.05 * GIB:
        return f"{byte_count / GIB:.1f} GiB"
    return f"{byte_count / MIB:.0f} MiB" if byte_count >= 10 * MIB else f"{byte_count / MIB:.2g} MiB"


def available_ram() -> int:
    """Bytes of the host's memory that a program may still take, within the limits of its container."""
    import psutil

    limits = [int(psutil.virtual_memory().available)]
    for folder in cgroup_folders(_text("/proc/self/cgroup")):
        files = {name: _text(f"{folder}/{name}") for name in _CGROUP_FILES}
        if (limit := available_in_cgroup(files)) is not None:
            limits.append(limit)
    return min(limits)


_CGROUP_FILES = ("memory.max", "memory.current", "memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat")


def cgroup_folders(text: str) -> list[str]:
    """Where the limits of a process are, by /proc/self/cgroup: those of its own group and of all above it, version 2 and 1."""
    folders = []
    for line in text.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root = "/sys/fs/cgroup/memory" if controllers else "/sys/fs/cgroup"
        parts = [part for part in path.split("/") if part and part != ".."]
        folders += ["/".join([root, *parts[:count]]) for count in range(len(parts), -1, -1)]
    return folders


def available_in_cgroup(files: Mapping[str, str]) -> int | None:
    """What a group may still take, by its files (version 2 or 1); pages of files that are not in use give way. None: no limit."""
    limit = files.get("memory.max") or files.get("memory.limit_in_bytes") or ""
    used = files.get("memory.current") or files.get("memory.usage_in_bytes") or ""
    if not limit.strip().isdigit() or not used.strip().isdigit() or int(limit) >= 1 << 60:
        return None
    lines = (line.split() for line in files.get("memory.stat", "").splitlines())
    caches = {line[0]: int(line[1]) for line in lines if len(line) == 2}
    reclaimable = caches.get("total_inactive_file", caches.get("inactive_file", 0))
    return max(int(limit) - int(used) + reclaimable, 0)


def _text(path: str) -> str:
    try:
        return Path(path).read_text("utf-8")
    except (OSError, ValueError):
        return ""
