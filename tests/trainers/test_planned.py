"""What the last look at a job says of memory on a card, asked as ComfyUI asks: under inference_mode. The card is one of the table."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.trainers.tiny import tiny_job
from trainers import machine as machine_module
from trainers import memory_plan, preflight
from trainers.device import Hardware
from trainers.errors import JobError
from trainers.job import Job
from trainers.machine import Machine, card_of
from trainers.memory_report import summary
from trainers.plan import hand_over, planned


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return tiny_job(tmp_path, precision="bf16", gradient_checkpointing=True)


def _with_card(monkeypatch: pytest.MonkeyPatch, machine: Machine) -> None:
    monkeypatch.setattr(preflight, "pick_device", lambda job: torch.device("cuda"))
    monkeypatch.setattr(Hardware, "of", lambda device: Hardware.cuda(machine.name, machine.bf16))
    monkeypatch.setattr(machine_module, "empty_card", lambda device: machine)


def test_a_job_that_fits_comes_with_its_plan(job: Job, monkeypatch: pytest.MonkeyPatch):
    _with_card(monkeypatch, card_of("RTX 4090", None).machine(32))
    with torch.inference_mode():
        kept, plan = planned(job)
    assert kept == hand_over(job)
    assert plan
    assert plan.price.device_bytes > 2**20
    assert (
        summary(plan)
        == f"at the most {plan.price.device_bytes / 2**20:.2g} MiB of RTX 4090 (24 GiB). All weights stay on the device, because they fit."
    )


def test_one_that_cannot_fit_says_so_with_a_remedy(job: Job, monkeypatch: pytest.MonkeyPatch):
    _with_card(monkeypatch, card_of("RTX 4090", None).machine(32, vram_gib=0.52))
    monkeypatch.setattr(memory_plan, "CHUNKS", (1,))  # every remedy is tried with all of them
    with torch.inference_mode(), pytest.raises(JobError, match=r"The job \S+ cannot run: the largest batch .* at the least"):
        planned(job)


def test_without_a_card_nothing_is_planned(job: Job):
    assert planned(job)[1] is None
