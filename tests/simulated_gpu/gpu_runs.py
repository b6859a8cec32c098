"""Tiny training runs on the simulated GPU, and what they leave behind."""

from __future__ import annotations

import ast
import gc
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import tiny_families

from simulated_gpu import gpu
from trainers import trainer
from trainers.data.encoded import Encoded
from trainers.family import Family, Variant, families
from trainers.job import Job, parse_job
from trainers.run import Run
from trainers.training import Training

ARRANGEMENTS: dict[str, dict[str, Any]] = {
    "resident": {"stream": "never"},
    "mapped": {"stream": "always", "host": "mapped", "activations": "device", "chunks": 1},
    "pinned": {"stream": "always", "host": "pinned", "activations": "device", "chunks": 1},
    "inputs on the host": {"stream": "always", "host": "mapped", "activations": "host", "chunks": 1},
    "chunks": {"stream": "always", "host": "pinned", "activations": "host", "chunks": 2},
}
"""`memory` of a job. Where `chunks` is left out, planning traces a step for each number of them."""

FIRST_VARIANTS = [(family, family.variants[0]) for family in families().values()]

_WAN = ("wan2.1-t2v", "wan2.1-i2v", "wan2.2-ti2v", "wan2.2-t2v", "wan2.2-i2v")
VARIANTS = {
    variant.id: (family, variant)
    for family in families().values()
    for variant in family.variants
    if family.id != "wan" or variant.id in _WAN
}
"""By id, (family, variant). Of Wan those without a size: a tiny model has none of the published."""

_SIZES: dict[str, dict[str, Any]] = {
    "wan": {"num_layers": 3},
    "ltx": {"num_layers": 3, "attention_head_dim": 32, "cross_attention_dim": 64},
    "mochi": {"num_layers": 3, "attention_head_dim": 32, "pooled_projection_dim": 64},
    "hunyuan": {},
}
"""Three blocks at the least: as many as slots would be no streaming (HunyuanVideo has two of each kind). Rows of 64 numbers at
the least: bitsandbytes' CPU kernel decodes shorter ones of nf4 wrongly."""


@lru_cache
def tiny_files(family_id: str, variant_id: str) -> Job:
    """A job over a tiny base and clips, which all tests share; the last clip is held out."""
    family, variant = VARIANTS[variant_id]
    with patch.object(tiny_families, "tiny_config", _with_sizes(tiny_families.tiny_config)):
        job = tiny_families.tiny_job_of(Path(_shared.name) / variant_id, family, variant)
    encoded = Encoded.open(Path(job.encoded))
    replace(encoded, items=(*encoded.items[:-1], replace(encoded.items[-1], held_out=True))).save()
    return job


@lru_cache
def tiny_vae(variant_id: str) -> str:
    """The path of a tiny VAE."""
    family, variant = VARIANTS[variant_id]
    vae = next(vae for vae in family.vaes if vae.fits(variant))
    return str(tiny_families.write_native_vae(Path(tiny_files(family.id, variant_id).encoded).parent / "vae.safetensors", family, vae))


@lru_cache
def low_noise_base(variant_id: str) -> str:
    """The path of a second expert, whose weights are others."""
    base, usual = Path(tiny_files("wan", variant_id).base.transformer), tiny_families.filled
    with (
        patch.object(tiny_families, "filled", lambda module: usual(module, seed=7)),
        patch.object(tiny_families, "tiny_config", _with_sizes(tiny_families.tiny_config)),
    ):
        return str(tiny_families.write_native(base.with_name("low_noise.safetensors"), *VARIANTS[variant_id]))


def _with_sizes(usual: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    return lambda family, variant: usual(family, variant) | _SIZES[family.id]


def with_videos(job: Job, **previews: Any) -> Job:
    """The job with a preview before the first step and after the last, and the held-out loss after the last."""
    values = job.model_dump(mode="json")
    family, variant = VARIANTS[str(job.base.variant)]
    step = family.latent(variant).spatial_step
    size = {"width": 3 * step, "height": 2 * step, "num_frames": 1}
    spec = {"every_steps": job.steps, "prompts": [""], "negative": "", "sampling_steps": 2, "shift": 1.0} | size | previews
    base = values["base"] | {"vae": tiny_vae(variant.id)}
    more = {"base": base, "previews": spec, "held_out": {"every_steps": job.steps, "sigmas": [0.2, 0.95]}}
    return parse_job(values | more)


def with_two_experts(job: Job) -> Job:
    """The job with both experts trained in turns of a step."""
    values = job.model_dump(mode="json")
    base = values["base"] | {"transformer_low_noise": low_noise_base(job.base.variant)}
    return parse_job(values | {"base": base, "experts": {"train": "both", "turn_steps": 1}})


_shared = tempfile.TemporaryDirectory(prefix="tiny-files-")


def forget_accelerate() -> None:
    """Accelerate keeps the device and precision of the first Accelerator of a process; a worker has only one."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for state in (AcceleratorState, GradientState, PartialState):
        state._shared_state.clear()


def shared_job(device: str, folder: Path, variant_id: str, **fields: Any) -> Job:
    """A job of three steps over the files that all tests share, whose run and LoRA come to `folder`."""
    family, _ = VARIANTS[variant_id]
    folder.mkdir(parents=True, exist_ok=True)
    values = tiny_files(family.id, variant_id).model_dump(mode="json", exclude_unset=True)
    base = values["base"] | {"variant": variant_id}
    paths = {"base": base, "runs_folder": str(folder / "runs"), "loras_folder": str(folder / "loras")}
    usual = {"device": device, "precision": "fp32", "gradient_checkpointing": True, "steps": 3}
    if fields.get("method") == "full":
        del values["lora"]
    return parse_job(values | paths | usual | fields)


def job_on(device: str, folder: Path, family: Family, variant: Variant, **fields: Any) -> Job:
    """A job of four steps over files of its own."""
    usual = {"device": device, "precision": "fp32", "gradient_checkpointing": True}
    return tiny_families.tiny_job_of(folder, family, variant, **(usual | fields))


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


def trained(job: Job, pinned: bool = True) -> Run:
    """The run of a job, trained to its end in this process.

    On the GPU, the host waits once in each step (but with optimizers whose library waits: test_waits.py), no copy of a step is
    pageable (`pinned` False: the system refuses to pin), and after the run nothing is allocated or registered that was not before.
    """
    forget_accelerate()
    run, before = Run.create(job), in_use()
    with steps_watched() as steps:
        assert trainer.train(run) == "done"
    assert in_use() == before, "(bytes of each GPU, pinned bytes) are given back"
    if job.device.startswith("cuda"):
        assert steps
        assert not pinned or [step.pageable for step in steps] == [{}] * len(steps)
        assert job.optimizer.kind in ("adamw8bit", "prodigy") or all(sum(step.waits.values()) == 1 for step in steps), steps
    return run


def loss_on_cpu(variant_id: str, **fields: Any) -> list[float]:
    """What the CPU makes of the same job; trained once."""
    return _loss_on_cpu(variant_id, repr(fields))


@cache
def _loss_on_cpu(variant_id: str, fields: str) -> list[float]:
    with tempfile.TemporaryDirectory() as folder:
        return losses(trained(shared_job("cpu", Path(folder), variant_id, **ast.literal_eval(fields))))


def losses(run: Run) -> list[float]:
    return [step["loss"] for step in run.read_metrics()]


def in_use() -> tuple[list[int], int]:
    """(bytes of each GPU, pinned bytes of the host) that are in use now."""
    gc.collect()
    return [gpu.live_bytes(index) for index in range(gpu.module.devices())], gpu.registered_bytes()
