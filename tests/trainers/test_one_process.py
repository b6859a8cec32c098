"""A run is trained by one process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import tiny_job

from trainers.plan import make_plan
from trainers.run import Run
from trainers.state import Position, check_position

WORKER = Path(__file__).parents[2] / "trainers" / "worker.py"


def test_several_workers_are_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    """Under torchrun the second worker ended at once, and the first waited for it for ever, holding the GPU."""
    run = Run.create(tiny_job(tmp_path))
    torchrun = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29511"}
    worker = subprocess.Popen([sys.executable, str(WORKER), str(run.folder)], env=os.environ | torchrun)
    try:
        assert worker.wait(120) == 1
    finally:
        worker.send_signal(signal.SIGKILL)
    status = run.status()
    assert status.state == "failed"
    assert "2 processes were started together (WORLD_SIZE); a run is trained by one process, on one GPU." in status.message
    assert run.read_metrics() == []


def test_what_another_program_left_in_the_environment_is_not_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pack for several GPUs may set WORLD_SIZE in ComfyUI: the worker does not inherit it, so Train LoRA must not refuse."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    make_plan(tiny_job(tmp_path))


def test_a_checkpoint_says_how_many_forward_passes_a_step_has() -> None:
    """`micro_per_step` is what older checkpoints, of one process, have: they are resumed."""
    check_position(Position(**{"step": 5, "encoded_identity": "a", "micro_per_step": 3}), "a", 3)
    with pytest.raises(Exception, match=r"accumulation is 3, it was 6; .* Set accumulation to 6\."):
        check_position(Position(5, "a", 6), "a", 3)
