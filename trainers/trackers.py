"""TensorBoard's curves of a run, through Accelerate. When they cannot be written, the run goes on without them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from .job import Job

if TYPE_CHECKING:
    from .training import Training


def trackers_of(job: Job) -> list[str] | None:
    """What Accelerate is to log with; None: nothing."""
    from accelerate.utils import is_tensorboard_available

    return ["tensorboard"] if job.tensorboard and is_tensorboard_available() else None


def start_trackers(training: Training) -> None:
    """Curves of steps after the present one, which an earlier session may have left, are hidden."""
    options: dict[str, Any] = {"tensorboard": {"purge_step": training.step + 1}}
    training.accelerator.init_trackers("", init_kwargs=options)


def track(training: Training, numbers: Mapping[str, float]) -> None:
    """Adds the numbers of the present step to the curves."""
    _keep_going(training, lambda: training.accelerator.log(dict(numbers), step=training.step))


def end_trackers(training: Training) -> None:
    """Writes what is left of the curves."""
    _keep_going(training, training.accelerator.end_training)


def _keep_going(training: Training, write: Callable[[], None]) -> None:
    try:
        write()
    except Exception as error:  # a full disk: an OSError, or with TensorFlow installed one of its own
        training.accelerator.trackers = []  # its thread has ended: it would fail in every step
        message = (
            f"TensorBoard's curves could not be written: {error}. They continue when you resume the run; metrics.jsonl has every step."
        )
        training.run.event("warning", step=training.step, message=message)
