"""Tiny training runs on the simulated GPU, and what they leave behind."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from tiny_families import tiny_job_of

from simulated_gpu import gpu
from trainers import trainer
from trainers.family import Family, Variant, families
from trainers.job import Job
from trainers.run import Run
from trainers.training import Training

ARRANGEMENTS: dict[str, dict[str, Any]] = {
    "resident": {"stream": "never"},
    "mapped": {"stream": "always", "host": "mapped", "activations": "device"},
    "pinned": {"stream": "always", "host": "pinned", "activations": "device"},
    "inputs on the host": {"stream": "always", "host": "mapped", "activations": "host"},
    "chunks": {"stream": "always", "host": "pinned", "activations": "host", "chunks": 2},
}
"""`memory` of a job."""

FIRST_VARIANTS = [(family, family.variants[0]) for family in families().values()]


def forget_accelerate() -> None:
    """Accelerate keeps the device and precision of the first Accelerator of a process; a worker has only one."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for state in (AcceleratorState, GradientState, PartialState):
        state._shared_state.clear()


def job_on(device: str, folder: Path, family: Family, variant: Variant, **fields: Any) -> Job:
    return tiny_job_of(folder, family, variant, **({"device": device, "precision": "fp32", "gradient_checkpointing": True} | fields))


@dataclass(frozen=True)
class Step:
    """What one training step did: how often the host waited for the GPU, and its copies that were not asynchronous, by line."""

    waits: dict[str, int]
    pageable: dict[str, int]


@contextmanager
def steps_watched() -> Iterator[list[Step]]:
    """Within it, every step that is trained adds what it did. Previews and held-out loss are no part of a step."""
    steps, optimize = list[Step](), trainer.optimize

    def watched(training: Training) -> dict[str, Any]:
        before = gpu.report()
        metrics = optimize(training)
        after = gpu.report()
        steps.append(Step(_more(after.host_waits, before.host_waits), _more(after.pageable, before.pageable)))
        return metrics

    with patch.object(trainer, "optimize", watched):
        yield steps


def _more(after: dict[str, int], before: dict[str, int]) -> dict[str, int]:
    return {where: count - before.get(where, 0) for where, count in after.items() if count > before.get(where, 0)}


def trained(job: Job, waits: int | None = 1, pinned: bool = True) -> Run:
    """The run of a job, trained to its end in this process.

    On the GPU, the host waits `waits` times in each step (None: as often as it likes, for a step that runs out of memory), no copy
    of a step is pageable (`pinned` False: the system refuses to pin), and after the run nothing is allocated or registered that was
    not before.
    """
    forget_accelerate()
    run, before = Run.create(job), in_use()
    with steps_watched() as steps:
        assert trainer.train(run) == "done"
    assert in_use() == before, "(bytes of each GPU, pinned bytes) are given back"
    if job.device.startswith("cuda"):
        assert steps
        assert not pinned or [step.pageable for step in steps] == [{}] * len(steps)
        assert waits is None or all(sum(step.waits.values()) == waits for step in steps), steps
    return run


def losses(run: Run) -> list[float]:
    return [step["loss"] for step in run.read_metrics()]


def in_use() -> tuple[list[int], int]:
    """(bytes of each GPU, pinned bytes of the host) that are in use now."""
    gc.collect()
    return [gpu.live_bytes(index) for index in range(gpu.module.devices())], gpu.registered_bytes()
