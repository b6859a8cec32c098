"""The guarded worker with stand-ins for the trainer and (but for one test) the device.

A job's first trigger word says what its training does.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import types
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from guarded_worker import forbid_network, run_worker


def _train(run: Any) -> str:
    behaviour = run.job.trigger_words[0]
    _misbehave(behaviour)
    for step in range(1, run.job.steps + 1):
        run.metrics(step=step, loss=1.0 / step, seconds=0.01)
        if behaviour == "is killed" and step == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        while behaviour == "slow" and not run.requested():
            time.sleep(0.02)
        if asked := run.requested():
            if run.job.name == "slow-to-pause":
                while run.requested() == "pause":
                    time.sleep(0.02)
            return {"stop": "stopped", "pause": "paused"}[asked]
        with run.writing_checkpoint(step) as folder:
            (folder / "position.json").write_text("{}")
    return "done"


def _misbehave(behaviour: str) -> None:
    from trainers.errors import JobError, Problem

    if behaviour == "fails for the user":
        raise JobError(Problem("num_frames is 80", "Wan needs 4n+1", "Use 77 or 81."))
    if behaviour == "fails":
        raise ZeroDivisionError("nobody divides by zero")
    if behaviour == "calls home":
        import socket

        socket.create_connection(("127.0.0.1", 9))


if __name__ == "__main__":
    forbid_network()
    trainer = types.ModuleType("trainers.trainer")
    trainer.train = _train  # type: ignore[attr-defined]
    sys.modules["trainers.trainer"] = trainer
    if "real-device" not in sys.argv[1]:
        device = types.ModuleType("trainers.device")
        device.pick_device = lambda job: "cpu"  # type: ignore[attr-defined]
        sys.modules["trainers.device"] = device
    run_worker()
