"""`check` on a GPU: every line is there, and what a GPU refuses is said with a remedy."""

from __future__ import annotations

import stat
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from check_page import lines_of_page

from simulated_gpu import gpu
from simulated_gpu.gpu_runs import in_use
from trainers.attention import BACKENDS
from trainers.family import families
from trainers.machine import this_machine
from trainers.measurements import Measurements, device_key
from trainers.offload import blocks
from trainers.quantise import quantised
from trainers.selftest import devices, memory, models, packages, versions
from trainers.selftest.checks import run_checks
from trainers.selftest.lines import Bench, Check, Line

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
    of_one_gpu = [name for name in names if name[1] != "other GPUs"]
    assert [(title, name) for title, name, _ in lines_of_page("On the simulated GPU")] == of_one_gpu
    kept = Measurements(tmp_path).rates("devices", device_key(GPU))
    assert {"bfloat16_flops", "memory", "copy"} <= kept.keys()


def test_the_limit_of_a_full_gpu_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit that stayed would fail every later line, and whatever else the process does."""
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


def in_tf32(tensor: torch.Tensor) -> torch.Tensor:
    """As cuDNN's kernels take float32 where TF32 is allowed: 10 bits of the mantissa, rounded."""
    return ((tensor.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def resident_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Line:
    """That of a model whose patches are embedded by a convolution."""
    monkeypatch.setattr(models, "SIDE", 4)
    (check,) = (check for check in models.CHECKS if check.group.endswith(families()["wan"].title))
    lines = iter(check.run(Bench(GPU, None, folder, Measurements(folder))))
    return next(line for line in lines if line.name == "resident, as on the CPU")


def test_convolutions_in_tf32_are_no_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch allows cuDNN TF32, which RTX 30 and newer have: "as on the CPU" failed on each of them for what is no fault."""
    usual = torch.nn.Conv3d._conv_forward

    def on_a_newer_gpu(module: Any, source: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if source.is_cuda and weight.dtype == torch.float32 and torch.backends.cudnn.allow_tf32:
            source, weight = in_tf32(source.detach()), in_tf32(weight.detach())
        return usual(module, source, weight, bias)

    monkeypatch.setattr(torch.nn.Conv3d, "_conv_forward", on_a_newer_gpu)
    line = resident_line(tmp_path, monkeypatch)
    assert line.state == "ok", line.text
    assert (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32) == (True, False), "as before"


def test_a_gpu_that_computes_wrongly_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The remedy was not to stream weights, of which there are none in this line."""
    usual = torch.nn.Conv3d._conv_forward

    def wrong(module: Any, source: torch.Tensor, *given: Any) -> torch.Tensor:
        return usual(module, source, *given) * (1.001 if source.is_cuda else 1.0)

    monkeypatch.setattr(torch.nn.Conv3d, "_conv_forward", wrong)
    line = resident_line(tmp_path, monkeypatch)
    assert line.state == "failed"
    assert "stream" not in line.remedy


def installed(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    """All attention libraries, on a GPU of this compute capability; none of them computes."""
    monkeypatch.setattr(packages, "missing_library", lambda backend: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)


def test_a_library_that_the_gpu_is_too_old_for_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """flash-attn on a T4: `check` failed, though nothing is wrong and a job with it is refused in a sentence."""
    installed(monkeypatch, (7, 5))
    found = lines_of(packages.CHECKS, tmp_path)
    assert {name: found[name].state for name in BACKENDS} == {"flash": "skipped", "flash_3": "skipped", "xformers": "failed"}
    assert found["flash"].text == "needs compute capability 8.0; this GPU has 7.5"


def test_each_library_is_tried_whatever_the_others_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, (9, 0))
    monkeypatch.setattr(packages, "build_optimizer", lambda *_: 1 / 0)
    found = lines_of(packages.CHECKS, tmp_path)
    for name in (*BACKENDS, "adamw8bit", "prodigy", "adamw_kahan"):
        assert found[name].state == "failed"
        assert 'to "auto"' in found[name].remedy or 'to "adamw"' in found[name].remedy


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
