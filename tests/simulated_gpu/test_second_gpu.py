"""With two GPUs, a run on one of them leaves the other alone. `make test` runs this file with SIMULATED_DEVICES=2.

A CUDA context on the other GPU takes 300 to 500 MiB of what ComfyUI draws with, for as long as the run lasts.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from simulated_gpu import gpu
from simulated_gpu.gpu_runs import ARRANGEMENTS, trained
from simulated_gpu.whole_jobs import job_with_everything
from trainers.family import families
from trainers.offload import blocks

WAN = families()["wan"]
TWO_EXPERTS = next(variant for variant in WAN.variants if variant.id == "wan2.2-t2v")
IN_EVERY_RUN = ("mapped", "cuda:0", 1), ("mapped", "cuda:1", 0), ("chunks", "cuda:1", 0)
CASES = [(arrangement, device, other) for arrangement in ARRANGEMENTS for device, other in (("cuda:0", 1), ("cuda:1", 0))]


@pytest.mark.parametrize(
    ("arrangement", "device", "other"),
    [pytest.param(*case, marks=() if case in IN_EVERY_RUN else pytest.mark.matrix) for case in CASES],
)
def test_the_other_gpu_is_not_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arrangement: str, device: str, other: int) -> None:
    """Two experts, previews and held-out loss included."""
    monkeypatch.setattr(blocks, "_WORTH_COPYING_BYTES", 0)
    torch.cuda.set_device(other)  # where a process that does nothing about it is
    torch.cuda.reset_peak_memory_stats(other)
    before = torch.cuda.max_memory_allocated(other)
    gpu.reset()
    trained(job_with_everything(device, tmp_path, WAN, TWO_EXPERTS, memory=ARRANGEMENTS[arrangement]))
    assert torch.cuda.max_memory_allocated(other) == before
    assert [use for use in gpu.report().contexts if use.startswith(f"cuda:{other}")] == []
    assert gpu.report().misplaced == []
