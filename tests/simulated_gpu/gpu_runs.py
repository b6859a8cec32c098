"""Tiny training runs on the simulated GPU, and what they leave behind."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

from tiny_families import tiny_job_of

from simulated_gpu import gpu
from trainers import trainer
from trainers.family import Family, Variant, families
from trainers.job import Job
from trainers.run import Run

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


def trained(job: Job) -> Run:
    """The run of a job, trained to its end in this process."""
    forget_accelerate()
    run = Run.create(job)
    assert trainer.train(run) == "done"
    return run


def losses(run: Run) -> list[float]:
    return [step["loss"] for step in run.read_metrics()]


def in_use() -> tuple[list[int], int]:
    """(bytes of each GPU, pinned bytes of the host) that are in use now."""
    gc.collect()
    return [gpu.live_bytes(index) for index in range(gpu.module.devices())], gpu.registered_bytes()


def waits_of_steps() -> int:
    """How often a training step waited for the GPU since `gpu.reset`."""
    return sum(count for line, count in gpu.report().host_waits.items() if "trainer.py:" in line)
