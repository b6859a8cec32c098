"""Steering a run from outside: stop, pause, resume. Each says in a sentence what happens now, or why nothing can."""

from __future__ import annotations

from .errors import RunError
from .launch import launch
from .run import Run


def pause(run: Run) -> str:
    """Asks a live run to pause after its current step. Raises RunError when it has no worker."""
    _check_live(run, "paused")
    run.request("pause")
    return f"{run.name} pauses after its current step; `resume` goes on."


def stop(run: Run) -> str:
    """Asks a live run to stop after its current step. Raises RunError when it has no worker."""
    _check_live(run, "stopped")
    run.request("stop")
    return f"{run.name} stops after its current step; `resume` goes on from there."


def resume(run: Run) -> str:
    """Takes a pause back, or starts a worker for a run that ended before its last step; returns when it has the run.

    Raises RunError for a run that is stopping or done, or whose worker could not start.
    """
    if run.live:
        if run.requested() == "stop":
            raise RunError(f"{run.name} is stopping; it can go on when it has stopped. Try again in a moment.")
        run.clear("pause")
        return f"{run.name} goes on."
    if run.status().state == "done":
        raise RunError(f"{run.name} is done; only a run with steps left can go on. To add steps, train a job that extends it.")
    run.clear("stop")
    run.clear("pause")
    return f"{run.name} goes on, worker {launch(run)}."


def _check_live(run: Run, what: str) -> None:
    if not run.live:
        raise RunError(f"{run.name} is {run.status().state}; only a run with a worker can be {what}. There is nothing to do.")
