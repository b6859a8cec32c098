"""With two GPUs, a run on one of them leaves the other alone. `make test` runs this file with SIMULATED_DEVICES=2.

A CUDA context on the other GPU takes 300 to 500 MiB of what ComfyUI draws with, for as long as the run lasts.
"""

from __future__ import annotations

import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from encoder_files import whole

from simulated_gpu import gpu
from simulated_gpu.gpu_runs import ARRANGEMENTS, trained
from simulated_gpu.whole_jobs import job_with_everything
from trainers.family import families
from trainers.folder_encoder import EncoderFiles, FolderEncoder, needed_parts
from trainers.offload import blocks
from trainers.plan import make_plan
from trainers.selftest import devices, memory
from trainers.selftest.checks import run_checks

WAN = families()["wan"]
TWO_EXPERTS = next(variant for variant in WAN.variants if variant.id == "wan2.2-t2v")
SECOND = torch.device("cuda", 1)
IN_EVERY_RUN = ("mapped", "cuda:0", 1), ("mapped", "cuda:1", 0), ("chunks", "cuda:1", 0)
CASES = [(arrangement, device, other) for arrangement in ARRANGEMENTS for device, other in (("cuda:0", 1), ("cuda:1", 0))]


@pytest.mark.parametrize(
    ("arrangement", "device", "other"),
    [pytest.param(*case, marks=() if case in IN_EVERY_RUN else pytest.mark.matrix) for case in CASES],
)
def test_the_other_gpu_is_not_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arrangement: str, device: str, other: int) -> None:
    """Two experts, previews and held-out loss included."""
    monkeypatch.setattr(blocks, "_WORTH_COPYING_BYTES", 0)
    with untouched(other):
        trained(job_with_everything(device, tmp_path, WAN, TWO_EXPERTS, memory=ARRANGEMENTS[arrangement]))


@contextmanager
def untouched(other: int) -> Iterator[None]:
    """Within it the thread's GPU is `other`, as that of a process that does nothing about it; nothing may come to lie there."""
    torch.cuda.set_device(other)
    torch.cuda.reset_peak_memory_stats(other)
    before = torch.cuda.max_memory_allocated(other)
    gpu.reset()
    yield
    assert torch.cuda.max_memory_allocated(other) == before
    assert [use for use in gpu.report().contexts if use.startswith(f"cuda:{other}")] == []
    assert gpu.report().misplaced == []


def test_check_leaves_the_other_gpu_alone(tmp_path: Path) -> None:
    """It computed beside the GPU it was asked for, and its line for that could not fail: the question itself made a context."""
    with untouched(0):
        found = run_checks(SECOND, tmp_path, checks=(*devices.CHECKS, *memory.CHECKS[1:]), limit_seconds=600.0)
    lines = {line.name: line for line in found.lines}
    assert lines["a thread's device"].text == "a tensor of another thread lies on cuda:1, its device is 1"
    assert not found.failed, found.table()
    assert torch.cuda.current_device() == 0, "as before"


@pytest.mark.skipif(sys.platform == "win32", reason="the stand-in is a shell script")
@pytest.mark.parametrize(("taken_mib", "state", "text"), [(0, "ok", "0 MiB"), (40, "ok", "40 MiB"), (400, "slow", "0.4 GiB")])
def test_what_is_taken_of_other_gpus_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, taken_mib: int, state: str, text: str
) -> None:
    """nvidia-smi stands in by a script that says more the second time."""
    script, asked = tmp_path / "nvidia-smi", tmp_path / "asked"
    script.write_text(f"#!/bin/sh\nif [ -e {asked} ]; then echo {500 + taken_mib}; else echo 500; fi\necho $* >> {asked}\n")
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    found = run_checks(SECOND, tmp_path, checks=devices.CHECKS[:1], limit_seconds=600.0)
    line = next(line for line in found.lines if line.name == "other GPUs")
    assert (line.state, line.text) == (state, f"{text} of their memory taken meanwhile")
    assert asked.read_text().count("--id=GPU-simulated-0") == 2


def test_planning_leaves_the_other_gpu_alone(tmp_path: Path) -> None:
    """ComfyUI plans in its own process, before any worker is there."""
    job = job_with_everything("cuda:1", tmp_path, WAN, TWO_EXPERTS)
    with untouched(0):
        make_plan(job)
    assert torch.cuda.current_device() == 0, "as before"


def test_encoding_leaves_the_other_gpu_alone(tmp_path: Path) -> None:
    model = whole("wan2.1-i2v")
    model.write(tmp_path)
    encoder = FolderEncoder(model.family, model.variant, EncoderFiles.find(tmp_path, needed_parts(model.family, model.variant)), SECOND)
    image = torch.rand(40, 56, 3)
    with untouched(0):
        encoder.encode_text(["a cat"], image)
        encoder.encode_image(image)
        encoder.encode_video(torch.zeros(1, 3, 1, 2 * encoder.latent.spatial_step, 2 * encoder.latent.spatial_step))
    assert torch.cuda.current_device() == 0, "as before"
