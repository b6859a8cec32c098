"""kill -9 at any moment, start again: the LoRA is the same file, byte for byte, as that of a run that was never touched."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny import TinyShape, tiny_job

from trainers.run import Run
from trainers.training import lora_path

WORKER = Path(__file__).parents[2] / "trainers" / "worker.py"
KILL_AT_RENAME = Path(__file__).parent / "kill_at_rename.py"
STEPS, EVERY = 60, 5
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


def start(run: Run, *before: str) -> subprocess.Popen[bytes]:
    with run.log_file.open("ab") as log:
        return subprocess.Popen([sys.executable, *before, str(WORKER), str(run.folder)], stdout=log, stderr=log)


def last_step(run: Run) -> int:
    metrics = run.read_metrics()
    return metrics[-1]["step"] if metrics else 0


def kill_when_step_is_written(run: Run, step: int, then_seconds: float) -> None:
    worker = start(run)
    while last_step(run) < step:
        assert worker.poll() is None, run.log_file.read_text()
        time.sleep(0.005)
    time.sleep(then_seconds)
    worker.kill()
    assert worker.wait() == -signal.SIGKILL


def kill_between_writing_and_rename(run: Run, step: int) -> None:
    worker = start(run, str(KILL_AT_RENAME), f"step-{step:06d}")
    assert worker.wait() == -signal.SIGKILL, run.log_file.read_text()
    assert step not in run.checkpoints()
    assert list((run.folder / "checkpoints").glob(f".step-{step:06d}*")), "the checkpoint was written, and not yet renamed"


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_ten_kills_leave_no_trace(tmp_path, optimizer):
    straight = Run.create(job_in(tmp_path / "straight", optimizer))
    assert start(straight).wait() == 0, straight.log_file.read_text()

    chance = random.Random(optimizer)
    killed = Run.create(job_in(tmp_path / "killed", optimizer))
    rename_points = sorted(chance.sample(range(2, STEPS // EVERY), 3))
    points = [(EVERY * n, True) for n in rename_points]
    points += [(step, False) for step in chance.sample([s for s in range(1, STEPS) if s % EVERY], 7)]
    for step, at_rename in sorted(points):
        if at_rename:
            kill_between_writing_and_rename(killed, step)
        else:
            kill_when_step_is_written(killed, max(step, last_step(killed) // EVERY * EVERY + 1), chance.uniform(0, 0.05))
    assert start(killed).wait() == 0, killed.log_file.read_text()

    for step in range(EVERY, STEPS + 1, EVERY):
        expected, found = (lora_path(run, step).read_bytes() for run in (straight, killed))
        assert expected == found, f"the LoRA files of step {step} differ"
    strip = [[{k: v for k, v in line.items() if k != "seconds"} for line in run.read_metrics()] for run in (straight, killed)]
    assert strip[0] == strip[1]
