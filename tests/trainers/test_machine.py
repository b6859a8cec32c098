"""What is free of a machine's memory, from the texts that systems give, and the rates measured here."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from trainers.errors import JobError
from trainers.machine import (
    CARDS,
    GIB,
    available_in_cgroup,
    available_ram,
    card_of,
    cgroup_folders,
    size_text,
    this_machine,
)
from trainers.memory_limits import System, context_headroom, pinnable_bytes


def test_a_container_s_limit_counts() -> None:
    second = {"memory.max": "8589934592\n", "memory.current": "6000000000\n", "memory.stat": "anon 1\ninactive_file 2000000000\n"}
    assert available_in_cgroup(second) == 8589934592 - 6000000000 + 2000000000
    first = {"memory.limit_in_bytes": "4294967296", "memory.usage_in_bytes": "1073741824", "memory.stat": "total_inactive_file 5\n"}
    assert available_in_cgroup(first) == 4294967296 - 1073741824 + 5


@pytest.mark.parametrize("limit", ["max", "", "9223372036854771712"])
def test_no_limit_is_none(limit: str) -> None:
    assert available_in_cgroup({"memory.max": limit, "memory.current": "1"}) is None


def test_the_groups_above_count_too() -> None:
    root = "/sys/fs/cgroup"
    assert cgroup_folders("0::/user.slice/run\n") == [f"{root}/user.slice/run", f"{root}/user.slice", root]
    assert cgroup_folders("4:memory:/docker/ab\n2:cpu,cpuacct:/docker/ab\n") == [
        f"{root}/memory/docker/ab",
        f"{root}/memory/docker",
        f"{root}/memory",
    ]


def test_this_machine_is_measured() -> None:
    machine = this_machine(torch.device("cpu"), torch.float32)
    assert machine.measured == {"flops", "memory", "copy"}, "there is no file to read"
    assert 0 < machine.free_bytes <= machine.ram_bytes + GIB
    assert machine.flops_rate > 1e8
    assert machine.copy_rate > 1e7
    assert available_ram() > 2**20


def test_a_card_is_known_by_its_size_or_name() -> None:
    assert card_of(None, 12).name == "RTX 3060"
    assert card_of(None, 22).name == "RTX 4090"
    assert not card_of("t4", None).bf16
    assert card_of("rtx4090", None) == card_of(" Rtx-4090", 8) == card_of("RTX 4090", None)
    with pytest.raises(JobError, match="RTX 4090"):
        card_of("GTX 1080", None)


def test_a_stated_card_leaves_room_for_its_context() -> None:
    for card in CARDS:
        machine = card.machine(32)
        assert machine.free_bytes < machine.total_bytes == int(card.gib * GIB)
        assert not machine.measured
        assert machine.turing is not card.bf16


def test_a_card_of_almost_nothing_has_nothing_free() -> None:
    machine = card_of(None, 0.1).machine(32, 0.1)
    assert machine.free_bytes == 0
    assert machine.total_bytes == int(0.1 * GIB)


def test_limits_are_never_above_what_is_free() -> None:
    machine = card_of("RTX 4090", None).machine(32)
    assert machine.with_limits(None, None) == machine
    assert machine.with_limits(100, float("inf")) == machine
    less = machine.with_limits(8, 16)
    assert (less.free_bytes, less.ram_bytes) == (8 * GIB, 16 * GIB)


@pytest.mark.parametrize(
    ("system", "ram", "swap", "available", "expected"),
    [
        ("windows", 64, 0, 60, 25.6),
        ("windows", 64, 100, 10, 6),
        ("linux", 64, 0, 60, 48),
        ("linux", 64, 16, 62, 57.6),
        ("linux", 64, 16, 30, 26),
        ("linux", 16, 0, 15, 6.4),
        ("linux", 8, 8, 3, 0.75),
        ("wsl", 32, 8, 30, 24),
    ],
)
def test_what_may_be_pinned_is_a_part_of_ram(system: System, ram: float, swap: float, available: float, expected: float) -> None:
    """ComfyUI's shares of RAM; 4 GiB of what is available stay for others, but the buffers that weights pass through are always pinned."""
    found = pinnable_bytes(system, int(ram * GIB), int(swap * GIB), int(available * GIB))
    assert found == pytest.approx(expected * GIB, rel=1e-6)


def test_headroom_is_left_unless_the_job_says_what_may_be_taken() -> None:
    machine = replace(card_of("RTX 4090", None).machine(32), free_bytes=20 * GIB, headroom_bytes=GIB)
    assert machine.with_limits(None, None).free_bytes == 19 * GIB
    assert machine.with_limits(19.5, None).free_bytes == 19.5 * GIB
    assert machine.with_limits(30, None).free_bytes == 19 * GIB, "whoever writes 12 for a GPU of 12 has no headroom otherwise"
    assert machine.with_limits(None, None).with_limits(None, None).free_bytes == 19 * GIB, "once"
    assert context_headroom(8 * GIB) == 256 * 2**20
    assert context_headroom(20 * GIB) == int(0.03 * 20 * GIB)


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 MiB"), (2**20, "1 MiB"), (50 * 2**20, "50 MiB"), (52 * 2**20, "0.1 GiB"), (3 * GIB, "3.0 GiB")]
)
def test_small_sizes_are_not_nothing(size: int, text: str) -> None:
    assert size_text(size) == text
