"""The real worker, started by path, with stand-ins for the trainer (and, but for one test, for the device).

A job's first trigger word says what its training does. No socket may be used: the process dies with exit code 99.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import time
import types
from pathlib import Path

ROOT = Path(__file__).parents[2]
FORBIDDEN = ("socket.connect", "socket.bind", "socket.getaddrinfo", "socket.sendto", "urllib.Request")


def _no_network(event: str, arguments: tuple[object, ...]) -> None:
    if event in FORBIDDEN:
        print(f"NETWORK: {event} {arguments[1:]}", flush=True)
        os._exit(99)


def _train(run) -> str:  # type: ignore[no-untyped-def]
    from trainers.errors import JobError, Problem

    behaviour = run.job.trigger_words[0]
    if behaviour == "fails for the user":
        raise JobError(Problem("num_frames is 80", "Wan needs 4n+1", "Use 77 or 81."))
    if behaviour == "fails":
        raise ZeroDivisionError("nobody divides by zero")
    if behaviour == "calls home":
        import socket

        socket.create_connection(("127.0.0.1", 9))
    for step in range(1, (run.job.steps or 1) + 1):
        run.metrics(step=step, loss=1.0 / step, seconds=0.01)
        if behaviour == "is killed" and step == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        while behaviour == "slow" and not run.requested():
            time.sleep(0.02)
        if asked := run.requested():
            return {"stop": "stopped", "pause": "paused"}[asked]
        with run.writing_checkpoint(step) as folder:
            (folder / "position.json").write_text("{}")
    return "done"


if __name__ == "__main__":
    sys.addaudithook(_no_network)
    stand_in = types.ModuleType("trainers.trainer")
    stand_in.train = _train  # type: ignore[attr-defined]
    sys.modules["trainers.trainer"] = stand_in
    if "real-device" not in sys.argv[1]:
        no_torch = types.ModuleType("trainers.device")
        no_torch.pick_device = lambda job: "cpu"  # type: ignore[attr-defined]
        sys.modules["trainers.device"] = no_torch
    sys.path[:0] = [str(ROOT / "trainers")]  # as if Python had been given the path of the worker itself
    runpy.run_path(str(ROOT / "trainers" / "worker.py"), run_name="__main__")
