"""One session of a run: what its worker does from taking the run's lock to the last event."""

from __future__ import annotations

import gc
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from .environment import allow_determinism, go_offline, started_processes, use_memory_without_gaps
from .errors import JobError, Problem, VideoTrainerError
from .lock import FileLock, device_lock
from .run import Run
from .run_status import OUTCOMES, Outcome

_POLL_SECONDS = 0.5


def main(arguments: Sequence[str]) -> int:
    """Work on the run whose folder is the one argument. Returns the process's exit code: 0, or 1 when the run failed."""
    go_offline()
    use_memory_without_gaps()
    (folder,) = arguments
    run = Run.open(Path(folder))
    if run.job.deterministic:
        allow_determinism()
    lock = run.lock()
    if not lock.acquire():
        print(f"{run.name} has a worker already; this one ends.")
        return 0
    try:
        run.tidy()
        return _work(run)
    finally:
        lock.release()


def _work(run: Run) -> int:
    run.event("queued")
    try:
        _refuse_other_processes()
        while (outcome := _train(run)) == "paused" and run.requested() is None:
            gc.collect()  # the pause was taken back: go on, without what the first training left in reference cycles on the GPU
    except Exception as error:
        run.event("failed", message=_message(error), error=type(error).__name__)
        with suppress(OSError):  # worker.log is on the same disk as events.jsonl, which may be full
            traceback.print_exc()
        return 1
    run.clear("stop")
    run.clear("pause")
    run.event(outcome)
    return 0


def _refuse_other_processes() -> None:
    """Raises JobError. Asked here and nowhere else: a worker that `launch` starts inherits none of this from ComfyUI."""
    if (count := started_processes()) > 1:
        remedy = 'Start it once, without torchrun or accelerate launch; for a second GPU start another job with device "cuda:1".'
        raise JobError(
            Problem(f"{count} processes were started together (WORLD_SIZE)", "a run is trained by one process, on one GPU", remedy)
        )


def _train(run: Run) -> Outcome:
    """Train when the device is free. A paused run gives its device back: it ends here, and is resumed by a new worker."""
    from .device import pick_device

    device = pick_device(run.job)
    lock = device_lock(str(device))
    if asked := _wait_for(lock, run, str(device)):
        return asked
    try:
        from .trainer import train

        step = run.latest_checkpoint()
        run.event("training" if step is None else "resumed", step=step or 0)
        return train(run)
    finally:
        lock.release()


def _wait_for(device: FileLock, run: Run, name: str) -> Outcome | None:
    """Wait until the device is ours (None), or until the run is asked for something else (what it then is)."""
    waiting = False
    while True:
        if asked := run.requested():
            return OUTCOMES[asked]
        if device.acquire():
            return None
        if not waiting:
            run.event("queued", message=f"waiting for {name}, which another run uses")
        waiting = True
        time.sleep(_POLL_SECONDS)


def _message(error: Exception) -> str:
    """What the user reads: our own errors say everything, others only what happened."""
    if isinstance(error, VideoTrainerError):
        return str(error)
    lines = traceback.format_exception_only(error)
    return f"{lines[-1].strip()} (see worker.log)"
