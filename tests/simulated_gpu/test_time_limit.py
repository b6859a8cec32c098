"""A GPU that draws a display ends a kernel that runs for seconds: long attention is computed in several launches there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from simulated_gpu import gpu
from simulated_gpu.gpu_runs import ARRANGEMENTS, job_on, losses, trained
from trainers import attention_by_heads, machine
from trainers.family import families

LTX = families()["ltx"]


def test_attention_is_split_under_a_time_limit_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward, recomputed and backward, in chunks; the losses are the same, and the plan counts what it takes."""
    monkeypatch.setattr(attention_by_heads, "LONGEST_SECONDS", 1e-12)
    found = {}
    for limited in (False, True):
        monkeypatch.setattr(machine, "has_kernel_time_limit", lambda device, limited=limited: limited)
        gpu.reset()
        run = trained(job_on("cuda:0", tmp_path / str(limited), LTX, LTX.variants[0], memory=ARRANGEMENTS["chunks"]))
        operators = gpu.report().operators
        found[limited] = [operators["attention"], operators["attention backward"]], losses(run)
    (whole, wanted), (by_heads, split) = found[False], found[True]
    assert all(count >= 2 * before for count, before in zip(by_heads, whole, strict=True))
    if torch.backends.cpu.get_cpu_capability() == "DEFAULT":  # off by 7e-8 without AVX2, why is not known (LOG.md)
        assert split == pytest.approx(wanted, rel=1e-6)
    else:
        assert split == wanted
