"""A GPU that became slow in the middle of a run is said in the run's events; only its time shows it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_families import write_native

from simulated_gpu.gpu_runs import FIRST_VARIANTS, job_on, trained
from trainers import trainer
from trainers.family import family_of
from trainers.run import Run
from trainers.training import Training

SLOW = range(15, 25)


@pytest.fixture(autouse=True)
def steps_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second each, and those in SLOW twenty: what this machine takes is another thing each time."""
    measured = trainer.optimize

    def optimize(training: Training) -> dict[str, Any]:
        return measured(training) | {"seconds": 20.0 if training.step in SLOW else 1.0}

    monkeypatch.setattr(trainer, "optimize", optimize)


def warnings(run: Run) -> list[tuple[int, str]]:
    return [(event["step"], event["message"]) for event in run.read_events() if event["event"] == "warning"]


@pytest.mark.parametrize("device", ["cuda:0", "cpu"])
def test_it_is_said_once_and_not_of_a_cpu(tmp_path: Path, device: str) -> None:
    run = trained(job_on(device, tmp_path, *FIRST_VARIANTS[0], steps=30, checkpoints={"every_steps": 30}))
    if device == "cpu":
        assert warnings(run) == []
        return
    ((step, message),) = warnings(run)
    assert step == SLOW[4]
    assert message.startswith("the last 5 steps took 20.0 times as long as usual. Another program may be using the GPU")


def test_a_step_that_loads_an_experts_weights_is_no_slow_one(tmp_path: Path) -> None:
    """Two experts, a step each: every step changes over, and none of them is compared."""
    family, variant = family_of("wan2.2-t2v")
    job = job_on("cuda:0", tmp_path, family, variant, steps=30, experts={"train": "both", "turn_steps": 1})
    low = write_native(tmp_path / "low_noise.safetensors", family, variant)
    base = job.base.model_copy(update={"transformer_low_noise": str(low), "variant": variant.id})
    assert warnings(trained(job.model_copy(update={"base": base}))) == []
