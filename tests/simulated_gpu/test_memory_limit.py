"""The memory limit of a run leaves what CUDA takes beside PyTorch's allocator."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from simulated_gpu import gpu
from simulated_gpu.gpu_runs import forget_accelerate, job_on
from trainers.family import families
from trainers.job import Job
from trainers.machine import GIB, MIB, this_machine
from trainers.run import Run
from trainers.training import open_training

GPU = torch.device("cuda", 0)
WAN = families()["wan"]
GROWTH = {"attention": 100 * MIB, "attention backward": 30 * MIB, "aten::convolution": 150 * MIB, "aten::bmm": 20 * MIB}


def limit_of(job: Job) -> int:
    forget_accelerate()
    open_training(Run.create(job)).close()
    return gpu.cap_bytes()


@pytest.mark.parametrize("total_gib", [2, 24])
def test_what_is_free_is_read_after_the_libraries_are_loaded(total_gib: int) -> None:
    """It was read before: kernels, cuBLAS and cuDNN then took 150 to 400 MiB of what the plan had given to the training, and the driver
    refused memory below the limit (on Windows: steps became ten times as slow).
    """
    gpu.set_total(total_gib * GIB)
    gpu.grow_context(GROWTH)
    machine = this_machine(GPU, torch.float32)
    assert gpu.context_bytes() == sum(GROWTH.values())
    free = total_gib * GIB - gpu.context_bytes() - gpu.live_bytes()
    assert machine.free_bytes == free
    assert machine.with_limits(None, None).free_bytes == free - max(256 * MIB, int(0.03 * free))


def test_the_limit_leaves_headroom(tmp_path: Path) -> None:
    gpu.set_total(GIB)
    gpu.grow_context(GROWTH)
    limit = limit_of(job_on("cuda:0", tmp_path, WAN, WAN.variants[0]))
    assert limit == pytest.approx(GIB - sum(GROWTH.values()) - 256 * MIB, abs=MIB)


@pytest.mark.parametrize("vram_gib", [0.25, 0.6])
def test_the_job_s_own_limit_is_kept_to(tmp_path: Path, vram_gib: float) -> None:
    """Up to what is free: who says how much may be taken needs no headroom from us."""
    gpu.set_total(GIB)
    gpu.grow_context(GROWTH)
    limit = limit_of(job_on("cuda:0", tmp_path, WAN, WAN.variants[0], memory={"vram_gib": vram_gib}))
    assert limit == pytest.approx(vram_gib * GIB, abs=MIB)
