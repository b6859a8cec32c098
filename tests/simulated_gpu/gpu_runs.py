"""Tiny training runs on the simulated GPU, and what they leave behind."""

from __future__ import annotations

import ast
import gc
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import tiny_families

from simulated_gpu import gpu
from trainers import trainer
from trainers.family import families
from trainers.job import Job, parse_job
from trainers.run import Run

ARRANGEMENTS: dict[str, dict[str, Any]] = {
    "resident": {"stream": "never"},
    "mapped": {"stream": "always", "host": "mapped", "activations": "device", "chunks": 1},
    "pinned": {"stream": "always", "host": "pinned", "activations": "device", "chunks": 1},
    "inputs on the host": {"stream": "always", "host": "mapped", "activations": "host", "chunks": 1},
    "chunks": {"stream": "always", "host": "pinned", "activations": "host", "chunks": 2},
}
"""`memory` of a job. Where `chunks` is left out, planning traces a step for each number of them."""

_PUBLISHED = {published.variant for tiny in tiny_families.TINY.values() for published in tiny.published}
VARIANTS = {variant.id: (family, variant) for family in families().values() for variant in family.variants if variant.id in _PUBLISHED}

FIRST_VARIANTS = [family.variants[0].id for family in families().values()]

_SIZES: dict[str, dict[str, Any]] = {
    "ltx": {"attention_head_dim": 32, "cross_attention_dim": 64},
    "mochi": {"attention_head_dim": 32, "pooled_projection_dim": 64},
}
"""Rows of 64 numbers at the least: bitsandbytes' CPU kernel decodes shorter ones of nf4 wrongly."""


@lru_cache
def tiny_files(family_id: str, variant_id: str) -> Job:
    """A job over a tiny base of four blocks (fewer than slots would be no streaming) and clips, which all tests share."""
    family, variant = VARIANTS[variant_id]
    usual = tiny_families.tiny_config
    deeper = {"num_layers": 4} | _SIZES.get(family_id, {})
    with patch.object(tiny_families, "tiny_config", lambda *of: usual(*of) | deeper):
        return tiny_families.tiny_job_of(Path(_shared.name) / variant_id, family, variant)


_shared = tempfile.TemporaryDirectory(prefix="tiny-files-")


def forget_accelerate() -> None:
    """Accelerate keeps the device and precision of the first Accelerator of a process; a worker has only one."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for state in (AcceleratorState, GradientState, PartialState):
        state._shared_state.clear()


def job_on(device: str, folder: Path, variant_id: str, **fields: Any) -> Job:
    """A job of three steps whose run and LoRA come to `folder`."""
    family, _ = VARIANTS[variant_id]
    folder.mkdir(parents=True, exist_ok=True)
    values = tiny_files(family.id, variant_id).model_dump(mode="json", exclude_unset=True)
    base = values["base"] | {"variant": variant_id}
    paths = {"base": base, "runs_folder": str(folder / "runs"), "loras_folder": str(folder / "loras")}
    usual = {"device": device, "precision": "fp32", "gradient_checkpointing": True, "steps": 3}
    return parse_job(values | paths | usual | fields)


def trained(job: Job) -> Run:
    """The run of a job, trained to its end in this process."""
    forget_accelerate()
    run = Run.create(job)
    assert trainer.train(run) == "done"
    return run


def loss_on_cpu(variant_id: str, **fields: Any) -> list[float]:
    """What the CPU makes of the same job; trained once."""
    return _loss_on_cpu(variant_id, repr(fields))


@lru_cache(maxsize=None)
def _loss_on_cpu(variant_id: str, fields: str) -> list[float]:
    with tempfile.TemporaryDirectory() as folder:
        return losses(trained(job_on("cpu", Path(folder), variant_id, **ast.literal_eval(fields))))


def losses(run: Run) -> list[float]:
    return [step["loss"] for step in run.read_metrics()]


def in_use() -> tuple[list[int], int]:
    """(bytes of each GPU, pinned bytes of the host) that are in use now."""
    gc.collect()
    return [gpu.live_bytes(index) for index in range(gpu.module.devices())], gpu.registered_bytes()


def waits_of_steps() -> int:
    """How often a training step waited for the GPU since `gpu.reset`."""
    return sum(count for line, count in gpu.report().host_waits.items() if "trainer.py:" in line)
