"""How often a training step waits for the GPU, by optimizer (README, `optimizer.kind`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from simulated_gpu.gpu_runs import FIRST_VARIANTS, forget_accelerate, job_on, steps_watched
from trainers import trainer
from trainers.run import Run
from trainers.state import read_optimizer

RANK = 32
"""Enough for 8-bit states: smaller tensors keep theirs in float32."""


def waits_of_steps(run: Run) -> list[int]:
    forget_accelerate()
    with steps_watched() as steps:
        assert trainer.train(run) == "done"
    assert [step.pageable for step in steps] == [{}] * len(steps)
    return [sum(step.waits.values()) for step in steps]


@pytest.mark.parametrize(
    ("kind", "fields", "first"),
    [
        ("adamw", {}, 1),
        ("adamw8bit", {}, 3),  # its two tables of 256 numbers go to the GPU
        ("adamw_kahan", {"method": "full", "precision": "bf16"}, 1),
    ],
)
def test_a_step_waits_once(tmp_path: Path, kind: str, fields: dict[str, Any], first: int) -> None:
    """With adamw8bit it waited after each parameter, too: 800 drained queues a step for a LoRA of a 14B model."""
    job = job_on("cuda:0", tmp_path, *FIRST_VARIANTS[0], **({"lora": {"rank": RANK}, "optimizer": {"kind": kind}} | fields))
    assert waits_of_steps(Run.create(job)) == [first, 1, 1, 1]


def test_prodigy_waits_twice_for_each_parameter(tmp_path: Path) -> None:
    """That is its library's way. In the first step it also asks whether each of them is all zeros, and half of them are."""
    run = Run.create(job_on("cuda:0", tmp_path, *FIRST_VARIANTS[0], optimizer={"kind": "prodigy", "learning_rate": 1.0}))
    waits = waits_of_steps(run)
    optimizer, _ = read_optimizer(run.checkpoint_folder(4), "")
    parameters = len(optimizer["state"])
    assert waits == [3 * parameters + parameters // 2 + 1, *[2 * parameters + 1] * 3]
