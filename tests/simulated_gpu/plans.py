"""A plan of memory beside what training takes: the most that is allocated on the simulated GPU, arrangement by arrangement.

`PYTHONPATH=tests/simulated_gpu/site:.:tests:tests/trainers python tests/simulated_gpu/plan_results.py` prints all of it as a table.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any

from simulated_gpu import gpu
from simulated_gpu.gpu_runs import forget_accelerate
from trainers.checkpoint import Checkpoint
from trainers.family import detect
from trainers.job import Job
from trainers.job_memory import JobTrace
from trainers.memory_plan import MemoryPlan, choose
from trainers.offload.placement import SLOTS
from trainers.previews import Previews
from trainers.run import Run
from trainers.trainer import held_out_clips, optimize
from trainers.training import Training, open_training

_ALWAYS = {"stream": "always", "chunks": 1}
ARRANGEMENTS: dict[str, dict[str, Any]] = {
    "resident": {"stream": "never", "activations": "device", "chunks": 1},
    "no checkpointing": {"stream": "never", "activations": "device", "chunks": 1},
    "4 chunks": {"stream": "never", "activations": "device", "chunks": 4},
    "mapped": _ALWAYS | {"host": "mapped", "activations": "device"},
    "pinned": _ALWAYS | {"host": "pinned", "activations": "device"},
    "partly resident": {"stream": "auto", "host": "pinned", "activations": "device", "chunks": 1},
    "inputs on the host": _ALWAYS | {"host": "pinned", "activations": "host"},
    "2 chunks": _ALWAYS | {"host": "pinned", "activations": "host", "chunks": 2},
}
"""`memory` of a job. "partly resident": the GPU is half a block short for all weights."""
ALL = tuple(ARRANGEMENTS)
RESIDENT = ALL[:3]
"""What there is of them when all weights are trained, or a DoRA looks at them."""
FEW = ("resident", "pinned", "2 chunks")


@dataclass(frozen=True)
class Cell:
    """A job on a wide model (`wide_models.py`), and the arrangements it is compared in. `every`: for `make gpu-matrix` only."""

    variant: str
    stored: str
    arrangements: Sequence[str]
    what: str = "LoRA"
    fields: Mapping[str, Any] = field(default_factory=dict)
    every: bool = True

    def __str__(self) -> str:
        return f"{self.variant} {self.stored} {self.what}"


_KEPT = {"conditions": [{"probability": 1.0}]}
_NOT_KEPT = {"conditions": []}
_HOW: dict[str, tuple[str, Sequence[str], dict[str, Any]]] = {
    "bf16": ("bf16", FEW, {}),
    "fp8": ("bf16", FEW, {"memory": {"quantise": "fp8"}}),
    "fp8_scaled": ("fp8_scaled", FEW, {}),
    "nf4": ("bf16", FEW, {"memory": {"quantise": "nf4"}}),
    "DoRA": ("bf16", RESIDENT, {"lora": {"rank": 4, "dora": True}}),
    "full": ("float32", RESIDENT, {"method": "full"}),
    "full, adamw_kahan": ("bf16", RESIDENT, {"method": "full", "optimizer": {"kind": "adamw_kahan"}}),
    "full, adamw_kahan, float32": ("float32", RESIDENT[:1], {"method": "full", "optimizer": {"kind": "adamw_kahan"}}),
    "batch 2": ("float32", FEW, {"batch_size": 2}),
    "accumulation 2": ("float32", FEW, {"accumulation": 2}),
    "accumulation 2, full": ("float32", RESIDENT[:1], {"accumulation": 2, "method": "full"}),
    "prodigy": ("float32", FEW[:2], {"optimizer": {"kind": "prodigy", "learning_rate": 1.0}, "lora": {"rank": 32}}),
    "adamw8bit": ("float32", FEW[:2], {"optimizer": {"kind": "adamw8bit"}, "lora": {"rank": 32}}),
    "dropout": ("float32", FEW, {"lora": {"rank": 4, "dropout": 0.1}}),
}
_VARIANTS = ("wan2.1-t2v", "wan2.1-i2v", "wan2.2-t2v", "wan2.2-i2v", "hunyuan-t2v", "hunyuan-i2v-v1", "hunyuan-i2v-v2", "mochi-1-preview")
_IN_PLACE = ("wan2.2-ti2v", "ltxv-2b-0.9", "ltxv-2b-0.9.5", "ltxv-2b-distilled", "ltxv-13b", "ltxv-13b-distilled")


def cells() -> Iterator[Cell]:
    """The small ones of `make test` first: every family, arrangement and way to keep weights is in one of them."""
    yield Cell("wan2.2-ti2v", "float32", ("mapped", "4 chunks"), "LoRA, first frame kept, batch 2", _KEPT | {"batch_size": 2}, every=False)
    yield Cell("mochi-1-preview", "float32", ("no checkpointing", "2 chunks"), every=False)
    yield Cell("ltxv-2b-0.9.5", "float32", ("pinned",), "LoRA, first frame kept, accumulation 2", _KEPT | {"accumulation": 2}, every=False)
    yield Cell("hunyuan-t2v", "float32", ("partly resident", "inputs on the host"), every=False)
    yield Cell("wan2.1-t2v", "float32", ("resident",), "full, adamw_kahan", _HOW["full, adamw_kahan, float32"][2], every=False)
    yield Cell("wan2.2-i2v", "bf16", ("resident",), "nf4", _HOW["nf4"][2], every=False)
    for variant in _VARIANTS:
        yield Cell(variant, "float32", ALL)
    for variant in _IN_PLACE:
        both = variant in ("wan2.2-ti2v", "ltxv-2b-0.9.5")  # the others are built of the same parts
        yield Cell(variant, "float32", ALL if both else FEW[1:], "LoRA, first frame kept", _KEPT)
        if both:
            yield Cell(variant, "float32", FEW, "LoRA, no first frame", _NOT_KEPT)
    for variant in ("wan2.1-t2v", "wan2.2-ti2v", "ltxv-2b-0.9.5", "hunyuan-t2v", "mochi-1-preview"):
        for what, (stored, arrangements, fields) in _HOW.items():
            yield Cell(variant, stored, arrangements, what, fields | (_KEPT if variant in _IN_PLACE else {}))


@dataclass(frozen=True)
class Compared:
    """What was planned and what was allocated, in bytes."""

    arrangement: str
    planned: int
    peak: int

    @property
    def ratio(self) -> float:
        return self.planned / self.peak

    @property
    def is_right(self) -> bool:
        return 0.95 <= self.ratio <= 1.10

    def __str__(self) -> str:
        return f"{self.arrangement} | {self.planned / 2**20:.2f} | {self.peak / 2**20:.2f} | {self.ratio:.3f}"


def compared(job: Job, arrangements: Sequence[str]) -> Iterator[Compared]:
    """Trains the job in each of the arrangements, a step of every expert."""
    forget_accelerate()
    gc.collect()  # what an earlier training left would count, and be freed meanwhile
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


def compared_apart(job: Job) -> Iterator[Compared]:
    """Of a job with previews and held-out clips: a preview, and the held-out loss, beside what a step takes."""
    forget_accelerate()
    gc.collect()  # what an earlier training left would count, and be freed meanwhile
    before = gpu.live_bytes()
    training = open_training(Run.create(job))
    with closing(training):
        assert training.plan is not None
        assert training.plan.previews is not None
        plan = training.plan.previews
        _train(training, len(training.trained))
        previews, held_out = Previews.of(training), held_out_clips(training)
        gpu.module.reset_peak(0)
        assert held_out.loss(training.transformer_at, training.device, training.dtype)
        yield Compared("held-out loss", training.plan.price.device_bytes, gpu.peak_bytes() - before)
        gpu.module.reset_peak(0)
        previews.write_if_due(training.step, last=True)
        assert list(training.run.samples_folder.glob("*.mp4"))
        yield Compared("preview", max(plan.sampling_bytes, plan.decoding_bytes or 0), gpu.peak_bytes() - before)


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
    if name == "partly resident":
        resident = choose(job.model_copy(update={"memory": memory.model_copy(update={"stream": "never"})}), traced, machine).price
        machine = replace(machine, free_bytes=resident.device_bytes + resident.reserve_bytes - min(traced.model.blocks) // 2)
    plan = choose(job, traced, machine)
    assert plan.fits
    if name == "partly resident":
        assert SLOTS < len(plan.price.placement.streamed) < len(traced.model.blocks)
    return plan
