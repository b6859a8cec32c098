"""`check` on a GPU: every line is there, and what a GPU refuses is said with a remedy."""

from __future__ import annotations

import stat
import sys
from pathlib import Path

import pytest
import torch
from check_page import lines_of_page

from simulated_gpu import gpu
from simulated_gpu.gpu_runs import in_use
from trainers.machine import this_machine
from trainers.measurements import Measurements, device_key
from trainers.offload import blocks
from trainers.quantise import quantised
from trainers.selftest import devices, memory, models, versions
from trainers.selftest.checks import run_checks
from trainers.selftest.lines import Check, Line

GPU = torch.device("cuda", 0)


def lines_of(checks: tuple[Check, ...], folder: Path) -> dict[str, Line]:
    return {line.name: line for line in run_checks(GPU, folder, checks=checks, limit_seconds=600.0).lines}


@pytest.mark.matrix
def test_every_line_runs_and_is_on_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "SIDE", 4)
    monkeypatch.setattr(blocks, "_WORTH_COPYING_BYTES", 0)
    quantised(torch.ones(64, 64, device=GPU), None, "nf4", GPU)  # bitsandbytes keeps its tables
    before = in_use()
    found = run_checks(GPU, tmp_path, limit_seconds=900.0)
    assert in_use() == before, "nothing stays on the GPU, and nothing pinned"
    assert not found.failed, found.table()
    names = [(section.title, line.name) for section in found.sections for line in section.lines]
    assert [(title, name) for title, name, _ in lines_of_page("On the simulated GPU")] == names
    kept = Measurements(tmp_path).rates("devices", device_key(GPU))
    assert {"bfloat16_flops", "memory", "copy"} <= kept.keys()


def test_the_limit_of_a_full_gpu_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In ComfyUI the check runs in its process: a limit that stays would break every later prompt."""
    monkeypatch.setattr(models, "SIDE", 4)
    run_checks(GPU, tmp_path, checks=(*memory.CHECKS, models.CHECKS[0]), limit_seconds=600.0)
    assert torch.empty(gpu.total_bytes // 2, dtype=torch.uint8, device=GPU).is_cuda


def test_a_refusal_to_pin_is_said_and_kept(tmp_path: Path) -> None:
    gpu.module.limit_pinned(2**30)
    found = lines_of(memory.CHECKS, tmp_path)["most pinned"]
    assert (found.state, found.text[:7]) == ("slow", "1.0 GiB")
    assert "ulimit" in found.remedy
    assert Measurements(tmp_path).rates("devices", device_key(GPU))["pinnable"] == 2**30
    gpu.reset()
    assert this_machine(GPU, torch.float32, None, tmp_path).pinnable_bytes == 2**30, "a plan keeps to it"
    assert gpu.registered_bytes() == 0


def test_a_gpu_that_spills_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *_: None)
    found = lines_of(memory.CHECKS, tmp_path)["the limit holds"]
    assert found.state == "failed"
    assert "Sysmem Fallback" in found.remedy


def test_an_allocation_that_fails_is_a_line(tmp_path: Path) -> None:
    gpu.fail_allocations(0, 1)
    found = lines_of(devices.CHECKS, tmp_path)
    assert (found["a thread's device"].state, found["CUDA's own memory"].state) == ("failed", "ok")
    assert "out of memory" in found["a thread's device"].text.lower()


@pytest.mark.skipif(sys.platform == "win32", reason="the stand-in is a shell script")
@pytest.mark.parametrize(("display", "limit"), [("Enabled", True), ("Disabled", False)])
def test_a_gpu_with_a_screen_has_a_time_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, display: str, limit: bool) -> None:
    """nvidia-smi stands in by a script: a simulated GPU has none."""
    script = tmp_path / "nvidia-smi"
    script.write_text(
        f"#!/bin/sh\ncase $1 in *apps*) echo 1;; *driver_version*) echo '580.1, [N/A], {display}';; *) echo '[N/A], {display}';; esac\n"
    )
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    found = lines_of(versions.CHECKS, tmp_path)["driver"]
    assert found.text.startswith(f"580.1, display {display.lower()}, 1 other programs")
    assert ("a kernel that runs for seconds is ended" in found.text) == limit
