"""A plan of memory beside what training takes: the most that is allocated on the simulated GPU in two steps, arrangement by arrangement."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

from simulated_gpu import gpu
from simulated_gpu.gpu_runs import forget_accelerate
from trainers.family import detect
from trainers.checkpoint import Checkpoint
from trainers.job import Job, MemorySpec
from trainers.job_memory import JobTrace
from trainers.memory_plan import MemoryPlan, choose
from trainers.offload.placement import SLOTS
from trainers.run import Run
from trainers.trainer import optimize
from trainers.training import Training, open_training

_ALWAYS = {"stream": "always", "chunks": 1}
ARRANGEMENTS: dict[str, dict[str, Any]] = {
    "resident": {"stream": "never", "activations": "device", "chunks": 1},
    "no checkpointing": {"stream": "never", "activations": "device", "chunks": 1},
    "mapped": _ALWAYS | {"host": "mapped", "activations": "device"},
    "pinned": _ALWAYS | {"host": "pinned", "activations": "device"},
    "partly": {"stream": "auto", "host": "pinned", "activations": "device", "chunks": 1},
    "inputs on the host": _ALWAYS | {"host": "pinned", "activations": "host"},
    "2 chunks": _ALWAYS | {"host": "pinned", "activations": "host", "chunks": 2},
    "4 chunks": {"stream": "never", "activations": "device", "chunks": 4},
}
"""`memory` of a job. "partly": the GPU is one and a half blocks short for all weights."""
RESIDENT_ONLY = ("resident", "no checkpointing")
"""What there is of them when all weights are trained, or a DoRA looks at them."""


@dataclass(frozen=True)
class Compared:
    """What was planned and what was allocated, in bytes."""

    arrangement: str
    planned: int
    peak: int

    @property
    def ratio(self) -> float:
        return self.planned / self.peak

    def __str__(self) -> str:
        return f"{self.arrangement}: {self.planned / 2**20:.2f} MiB planned, {self.peak / 2**20:.2f} at the peak, ratio {self.ratio:.3f}"


def compared(job: Job, arrangements: Sequence[str]) -> Iterator[Compared]:
    """Trains the job in each of the arrangements, two steps of every expert."""
    forget_accelerate()
    before = gpu.live_bytes()
    training = open_training(Run.create(job))
    with closing(training):
        experts = len(training.trained)
        _train(training, experts)  # optimizers have their state then
        for name in arrangements:
            plan = _planned(training, name)
            training.rearrange(plan.arrangement)
            gpu.module.reset_peak(0)
            _train(training, experts)
            yield Compared(name, plan.price.device_bytes, gpu.peak_bytes() - before)


def _train(training: Training, steps: int) -> None:
    for _ in range(steps):
        training.step += 1
        optimize(training)


def _planned(training: Training, name: str) -> MemoryPlan:
    memory = training.job.memory.model_copy(update=ARRANGEMENTS[name])
    job = training.job.model_copy(update={"memory": memory, "gradient_checkpointing": name != "no checkpointing"})
    assert training.plan is not None
    machine = training.plan.machine
    detection = detect(Checkpoint.open(job.base.transformer), job.base.variant)
    traced = JobTrace.of(job, detection, training.samples, machine, training.dtype)
    if name == "partly":
        resident = choose(job.model_copy(update={"memory": memory.model_copy(update={"stream": "never"})}), traced, machine).price
        machine = replace(machine, free_bytes=resident.device_bytes + resident.reserve_bytes - 3 * max(traced.model.blocks) // 2)
    plan = choose(job, traced, machine)
    assert plan.fits
    if name == "partly":
        assert SLOTS < len(plan.price.placement.streamed) < len(traced.model.blocks)
    return plan
