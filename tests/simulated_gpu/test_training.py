"""Training on the GPU is training on the CPU: the same losses, nothing unordered, nothing left behind."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import tiny_families

from simulated_gpu.gpu_runs import ARRANGEMENTS, FIRST_VARIANTS, job_on, losses, trained
from trainers.family import Family, Variant
from trainers.offload import blocks
from trainers.run import Run


@pytest.fixture(autouse=True)
def small_inputs_are_offloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "_WORTH_COPYING_BYTES", 0)


@pytest.fixture(autouse=True)
def enough_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four: as many slots as blocks would be no streaming."""
    shallow = tiny_families.tiny_config
    monkeypatch.setattr(tiny_families, "tiny_config", lambda family, variant: shallow(family, variant) | {"num_layers": 4})


def all_blocks_streamed(run: Run) -> bool:
    """Whether the run says so after the probe, which may change what was planned."""
    found = [event["message"] for event in run.follow_events()[0] if event["event"] == "memory"]
    return bool(re.search(r"\b0 of \d+ blocks stay", found[-1]))


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
@pytest.mark.parametrize(("family", "variant"), FIRST_VARIANTS, ids=[variant.id for _, variant in FIRST_VARIANTS])
def test_losses_are_those_of_the_cpu(tmp_path: Path, family: Family, variant: Variant, arrangement: str) -> None:
    run = trained(job_on("cuda:0", tmp_path / "gpu", family, variant, memory=ARRANGEMENTS[arrangement]))
    assert losses(run) == pytest.approx(losses(trained(job_on("cpu", tmp_path / "cpu", family, variant))), rel=1e-5)
    assert all_blocks_streamed(run) == (arrangement != "resident"), "stream = always streams every block of every step, after the probe too"
