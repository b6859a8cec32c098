"""kill -9 at any moment, start again: the LoRA is the same file, byte for byte, as that of a run that was never touched."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import warm_worker
from tiny import TinyShape, tiny_job

from trainers.run import Run
from trainers.training import lora_path

KILL_AT_RENAME = Path(__file__).parent / "kill_at_rename.py"
STEPS, EVERY = 60, 5
LAST_KILL = 45
"""No kill is meant for a later step, so that those which come late find the worker alive."""
SHAPE = TinyShape(layers=1, width=128, ffn=128, height=32, width_pixels=32, num_frames=5, text_dim=64)


def job_in(folder: Path, optimizer: str):
    folder.mkdir()
    settings = {"kind": optimizer, "learning_rate": 1e-2, "schedule": "cosine", "warmup_steps": 5}
    return tiny_job(
        folder,
        SHAPE,
        steps=STEPS,
        batch_size=2,
        accumulation=2,
        lora={"rank": 32, "dropout": 0.1},
        optimizer=settings,
        checkpoints={"every_steps": EVERY, "keep_last": 2},
        held_out={"every_steps": 20},
    )


def straight_through(run: Run) -> None:
    """A worker of its own from start to end."""
    with run.log_file.open("ab") as log:
        done = subprocess.run([sys.executable, str(warm_worker.WORKER), str(run.folder)], stdout=log, stderr=log, check=False)
    assert done.returncode == 0, run.log_file.read_text()


class Training:
    """A worker at a run, with the steps that it has written itself: earlier workers' lines do not count."""

    def __init__(self, run: Run, *before: str) -> None:
        self.run = run
        self.steps: list[int] = []
        self._since = run.follow_metrics()[1]
        self.worker = warm_worker.start(run.folder, run.log_file, *before)

    def look(self) -> list[int]:
        records, self._since = self.run.follow_metrics(self._since)
        self.steps += [record["step"] for record in records]
        return self.steps


def exit_code(training: Training) -> int | None:
    training.worker.join()
    return training.worker.exitcode


def next_step(run: Run) -> int:
    """The first step that the run's next worker trains."""
    return (run.latest_checkpoint() or 0) + 1


def kill_when_step_is_written(run: Run, step: int, then_seconds: float) -> None:
    step = max(step, next_step(run))
    training = Training(run)
    try:
        while max(training.look(), default=0) < step:
            assert training.worker.is_alive(), run.log_file.read_text()
            time.sleep(0.005)
        time.sleep(then_seconds)
    finally:
        training.worker.kill()
    assert exit_code(training) == -signal.SIGKILL, f"killed after the end, not in training: {training.look()}"


def kill_between_writing_and_rename(run: Run, step: int) -> None:
    while step < next_step(run):  # a kill before this one came so late that the checkpoint is there
        step += EVERY
    training = Training(run, str(KILL_AT_RENAME), f"step-{step:06d}")
    assert exit_code(training) == -signal.SIGKILL, run.log_file.read_text()
    assert training.look(), "it was killed before it trained"
    assert step not in run.checkpoints()
    assert list((run.folder / "checkpoints").glob(f".step-{step:06d}*")), "the checkpoint was written, and not yet renamed"


@pytest.mark.parametrize(
    ("optimizer", "at_rename", "in_steps"),
    [("adamw", 1, 2), *(pytest.param(name, 3, 7, marks=pytest.mark.slow) for name in ("adamw", "adamw8bit"))],
)
def test_kills_leave_no_trace(tmp_path, optimizer, at_rename, in_steps):
    straight = Run.create(job_in(tmp_path / "straight", optimizer))
    straight_through(straight)

    chance = random.Random(optimizer)
    killed = Run.create(job_in(tmp_path / "killed", optimizer))
    points = [(EVERY * n, True) for n in chance.sample(range(2, LAST_KILL // EVERY + 1), at_rename)]
    points += [(step, False) for step in chance.sample([s for s in range(1, LAST_KILL) if s % EVERY], in_steps)]
    for step, renamed in sorted(points):
        if renamed:
            kill_between_writing_and_rename(killed, step)
        else:
            kill_when_step_is_written(killed, step, chance.uniform(0, 0.05))
    last = Training(killed)
    assert exit_code(last) == 0, killed.log_file.read_text()

    for step in range(EVERY, STEPS + 1, EVERY):
        expected, found = (lora_path(run, step).read_bytes() for run in (straight, killed))
        assert expected == found, f"the LoRA files of step {step} differ"
    strip = [[{k: v for k, v in line.items() if k != "seconds"} for line in run.read_metrics()] for run in (straight, killed)]
    assert strip[0] == strip[1]
