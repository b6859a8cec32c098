"""What was given up when memory ran out is tried again: a run was slow to its end because another program took the GPU for a second."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import tiny_families
import torch
from tiny_families import tiny_job_of

from trainers import residency, room, shortage, trainer
from trainers.family import families
from trainers.job import Job, MemorySpec
from trainers.offload.arrangement import Arrangement
from trainers.residency import tighter
from trainers.room import kept_by
from trainers.run import Run
from trainers.shortage import GOOD_STEPS, Shortages
from trainers.trainer import train
from trainers.training import open_training

WAN = families()["wan"]


def one_less(now: int) -> int | None:
    return now - 1 if now else None


def test_it_is_tried_again_once_after_enough_good_steps() -> None:
    shortages: Shortages[int] = Shortages()
    assert shortages.again(9, 1000) is None
    assert shortages.less(9, one_less, step=10) == 8
    assert shortages.less(8, one_less, step=50) == 7
    assert shortages.again(7, 50 + GOOD_STEPS - 1) is None
    assert shortages.again(7, 50 + GOOD_STEPS) == 9, "what was used before the first failure"
    assert shortages.less(9, one_less, step=151) == 7, "what worked before, at once"
    assert not shortages.will_go_back
    assert shortages.again(7, 10_000) is None


def test_a_later_shortage_has_a_trial_of_its_own() -> None:
    shortages: Shortages[int] = Shortages()
    shortages.less(9, one_less, step=10)
    assert shortages.again(8, 110) == 9
    assert shortages.again(9, 210) is None, "it held"
    assert shortages.less(9, one_less, step=211) == 8
    assert shortages.will_go_back
    assert shortages.again(8, 311) == 9


def test_the_least_is_the_least() -> None:
    shortages: Shortages[int] = Shortages()
    assert shortages.less(0, one_less, step=1) is None
    assert not shortages.will_go_back


@pytest.mark.parametrize(
    ("memory", "field", "left"),
    [
        ({}, "activations", None),
        ({"activations": "device"}, "weights_bytes", "activations"),
        ({"stream": "never"}, "activations", "weights_bytes"),
        ({"activations": "device", "stream": "never"}, "chunks", "activations"),
        ({"activations": "device", "stream": "never", "chunks": 1}, "activations", None),
    ],
)
def test_what_the_job_says_is_given_up_last(memory: dict[str, Any], field: str, left: str | None) -> None:
    job = Job.model_construct(memory=MemorySpec(**memory), gradient_checkpointing=True)
    start = Arrangement()
    found = tighter(start, [100] * 10, kept=kept_by(job))
    assert found is not None
    assert [name for name in ("activations", "weights_bytes", "chunks") if getattr(found, name) != getattr(start, name)] == [field]
    now: Arrangement | None = start
    while left and now and getattr(now, left) == getattr(start, left):
        before, now = now, tighter(now, [100] * 10, kept=kept_by(job))
    if left:
        assert before.chunks == 16, "all else was given up before"


class FullFor:
    """A device that is full in the backward pass of the steps given, for so many attempts each."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, attempts: dict[int, int]) -> None:
        self.arrangements: dict[int, Arrangement] = {}
        opened, loss_of = trainer.open_training, trainer.batch_loss

        def opens(run: Run) -> Any:
            self.training = opened(run)
            first = self.training.learners[0].residency
            self.training.rearrange(dataclasses.replace(first.arrangement, weights_bytes=None))
            return self.training

        def loss(*args: Any) -> torch.Tensor:
            found = loss_of(*args)
            step = self.training.step
            self.arrangements[step] = self.training.learners[0].residency.arrangement
            if attempts.get(step, 0) > 0:
                attempts[step] -= 1
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return found

        monkeypatch.setattr(trainer, "open_training", opens)
        monkeypatch.setattr(trainer, "batch_loss", loss)
        monkeypatch.setattr(room, "batch_loss", loss)


@pytest.fixture
def wan_run(tmp_path, monkeypatch):
    shallow = tiny_families.tiny_config
    monkeypatch.setattr(tiny_families, "tiny_config", lambda family, variant: {**shallow(family, variant), "num_layers": 4})
    monkeypatch.setattr(shortage, "GOOD_STEPS", 5)

    def make(name: str) -> Run:
        memory = {"memory": {"stream": "always"}, "gradient_checkpointing": True}
        return Run.create(tiny_job_of(tmp_path / name, WAN, WAN.variants[0], steps=16, **memory))

    return make


def losses(run: Run) -> list[float]:
    return [line["loss"] for line in run.read_metrics()]


def messages(run: Run) -> list[str]:
    return [event["message"] for event in run.read_events() if event["event"] == "memory"]


def test_a_run_grows_back_and_learns_the_same(wan_run, monkeypatch) -> None:
    """Where blocks and their inputs wait changes no bit, so a deterministic run stays exact."""
    straight, short = wan_run("straight"), wan_run("short")
    train(straight)
    device = FullFor(monkeypatch, {3: 2})
    train(short)
    start, less = device.arrangements[1], device.arrangements[3]
    assert less != start
    assert [device.arrangements[step] == start for step in range(1, 17)] == [step < 3 or step >= 8 for step in range(1, 17)]
    assert losses(short) == losses(straight)
    assert "tried again" in messages(short)[0]
    assert "Back to the settings from before step 3: all blocks stay on the GPU; with less on the GPU a step took" in messages(short)[-1]


def test_a_trial_that_fails_is_not_repeated(wan_run, monkeypatch) -> None:
    straight, short = wan_run("straight"), wan_run("short")
    train(straight)
    device = FullFor(monkeypatch, {3: 1, 8: 1})
    train(short)
    start, less = device.arrangements[1], device.arrangements[3]
    assert {device.arrangements[step] for step in range(8, 17)} == {less} != {start}
    assert losses(short) == losses(straight)
    assert messages(short)[-1].endswith("The run keeps these settings")


def test_a_wait_does_not_go_on_with_half_a_model(wan_run, monkeypatch) -> None:
    """The device was full while blocks came back: the step was then tried with weights on two devices, and the run failed."""
    run, made, failures = wan_run("half"), residency.Stream, [4]
    monkeypatch.setattr(room.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(room, "tighter", lambda *given: None)

    def stream(*given: Any) -> Any:
        if failures[0]:
            failures[0] -= 1
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return made(*given)

    training = open_training(run)
    training.take_turn()
    monkeypatch.setattr(residency, "Stream", stream)
    with pytest.raises(torch.OutOfMemoryError):
        training.rearrange(training.learners[0].residency.arrangement)
    assert not training.learners[0].residency.is_whole
    failed = iter([torch.OutOfMemoryError("CUDA out of memory.")])

    def work() -> bool:
        if error := next(failed, None):
            raise error
        return training.learners[0].residency.is_whole

    assert room.with_room(training, work)
    training.close()
