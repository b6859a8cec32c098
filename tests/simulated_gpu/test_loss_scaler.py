"""fp16 with a loss scaler: what ends a run, and what does not."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from simulated_gpu.gpu_runs import forget_accelerate, job_on, losses
from trainers import trainer
from trainers.errors import RunError
from trainers.family import families
from trainers.job import Job
from trainers.run import Run
from trainers.stable_file import save_file
from trainers.training import lora_path

WAN = families()["wan"]
VARIANT = WAN.variants[0]


def fp16_job(folder: Path, **fields: object) -> Job:
    return job_on("cuda:0", folder, WAN, VARIANT, **({"precision": "fp16", "checkpoints": {"every_steps": 8}} | fields))


def train(run: Run) -> str:
    forget_accelerate()
    return trainer.train(run)


def gradients_overflow(monkeypatch: pytest.MonkeyPatch, run: Run, when: Callable[[int], bool]) -> None:
    """Infinite gradients of a finite loss in the steps in which `when`, as fp16 gives them when the loss scale is too high."""
    computed = trainer.batch_loss

    def loss_of(*args: object) -> torch.Tensor:
        loss = computed(*args)  # type: ignore[arg-type]
        steps = run.read_metrics()
        if when(steps[-1]["step"] + 1 if steps else 1):
            loss.register_hook(lambda gradient: gradient * math.inf)
        return loss

    monkeypatch.setattr(trainer, "batch_loss", loss_of)


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path: Path) -> None:
    """The run went on to its last step and wrote a LoRA that had learned nothing: a night of GPU time."""
    job = fp16_job(tmp_path, steps=4)
    base = Path(job.base.transformer)
    too_large = {name: tensor * (1e5 if name == "head.head.weight" else 1) for name, tensor in load_file(base).items()}
    save_file(too_large, base, overwrite=True)
    run = Run.create(job)
    with pytest.raises(RunError, match=r"^loss is (nan|inf) .* in step 1; both must be finite\. No checkpoint .*precision to bf16 or fp32"):
        train(run)
    assert not lora_path(run, 4).exists()


def test_a_run_that_learns_nothing_any_more_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With every step skipped, a run of 2,000 steps was "done" with the LoRA of its first steps."""
    run = Run.create(fp16_job(tmp_path, steps=60))
    gradients_overflow(monkeypatch, run, lambda step: step >= 11)
    with pytest.raises(RunError, match=r"last 20 steps \(up to step 30\) overflowed in fp16.*The checkpoint of step 24 is kept\."):
        train(run)


@pytest.mark.matrix
def test_steps_that_are_skipped_now_and_then_are_no_reason_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nineteen in a row, twice: a scale that settles. The scale is no higher than what was skipped, the losses are finite."""
    run = Run.create(fp16_job(tmp_path, steps=44))
    gradients_overflow(monkeypatch, run, lambda step: step not in (1, 21, 41, 42, 43, 44))
    assert train(run) == "done"
    assert all(map(math.isfinite, losses(run)))


def test_a_resumed_run_ends_in_the_same_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The steps that were skipped before an interruption count: they are in the checkpoint."""
    run = Run.create(fp16_job(tmp_path, steps=60))

    def skipped(step: int) -> bool:
        if step in (8, 21):
            run.request("pause")
        return step >= 6

    gradients_overflow(monkeypatch, run, skipped)
    for _ in range(2):
        assert train(run) == "paused"
        run.clear("pause")
    with pytest.raises(RunError, match=r"last 20 steps \(up to step 25\)"):
        train(run)
