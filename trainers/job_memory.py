"""What a job takes, from its files and its data: the largest batch, the transformer without values, and the plan of memory.

Shape suffixes: C channels, F latent frames, H and W latent height and width.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from importlib.metadata import version
from pathlib import Path

import torch
from torch import nn

from .attention_by_heads import limit_attention
from .batches import Samples
from .card_kernels import AMPERE, CPU, TURING, Kernels
from .checkpoint import Checkpoint
from .conditions import first_frame_probability
from .data.encoded import Encoded, EncodedItem
from .errors import JobError, Problem
from .experts import experts_of
from .family import FIRST_FRAME, IMAGE_TEXT, LATENTS, Detection, Family, LatentSpec, Variant
from .job import Job
from .load import load_transformer
from .lora_keys import listed
from .machine import Machine, this_machine
from .memory_plan import MemoryPlan, choose, too_large
from .memory_trace import ModelBytes, StepShape, StepTrace, Tracer, Traces
from .method import method_of
from .offload.arrangement import Arrangement
from .offload.chunks import whole_only
from .preview_memory import plan_previews
from .residency import blocks_of

_META = torch.device("meta")
_TEXTS_LOOKED_AT = 256
"""Headers of captions that are read for the longest: more would take long on a network drive."""


def _measured(job: Job, device: torch.device, dtype: torch.dtype) -> Machine:
    """This machine. Raises RunError when its GPU has no memory even for measuring it."""
    from .room import saying_what_is_full

    with saying_what_is_full(device, "its speed was measured", "half a GiB must be free to plan a run"):
        return this_machine(device, dtype, Path(job.base.transformer), Path(job.runs_folder))


def plan_memory(
    job: Job, detection: Detection, samples: Samples, device: torch.device, dtype: torch.dtype, machine: Machine | None = None
) -> MemoryPlan:
    """How the job is kept and run on `device`, computing in `dtype`; `machine` None: this one, as it is now.

    Raises JobError when nothing fits on a card, with what would.
    """
    machine = machine or _measured(job, device, dtype)
    with torch.inference_mode(False), torch.enable_grad():  # ComfyUI's nodes ask otherwise
        traced = JobTrace.of(job, detection, samples, machine, dtype)
        plan = choose(job, traced, machine)
        if not plan.fits and machine.device == "cuda":
            raise JobError(too_large(plan, traced))
        return replace(plan, previews=plan_previews(job, detection, traced.tracer, traced.shape, plan))


@dataclass(frozen=True)
class JobTrace:
    """The `Traced` protocol for a job."""

    tracer: Tracer
    model: ModelBytes
    shape: StepShape

    @classmethod
    def of(cls, job: Job, detection: Detection, samples: Samples, machine: Machine, dtype: torch.dtype) -> JobTrace:
        checkpoint = Checkpoint.open(job.base.transformer)
        tracer = tracer_of(job, checkpoint, detection, machine, dtype)
        trained = sum(expert.trained for expert in experts_of(job, detection.variant))
        shape = largest_batch(job, detection, samples.encoded, samples.items)
        return cls(tracer, replace(tracer.model, trained=trained), shape)

    def step(self, shape: StepShape, arrangement: Arrangement) -> StepTrace:
        return self.tracer.step(shape, arrangement)


def tracer_of(job: Job, checkpoint: Checkpoint, detection: Detection, machine: Machine, dtype: torch.dtype) -> Tracer:
    """The transformer of a file as a run loads it, with what is trained of it, and without values."""
    method = method_of(job, checkpoint, detection)
    streams = machine.device == "cuda" and method.can_stream
    keep_stored = None if streams else False
    transformer = load_transformer(checkpoint, detection, _META, dtype, keep_stored, all_frozen=streams, quantise=job.memory.quantise)
    check_chunks(job, transformer, detection.family)
    limit_attention(machine)
    add, kernels = partial(method.inject, device=_META), _kernels(machine)
    known = _traces_of(_identity(job, checkpoint, detection, dtype, machine))
    both = (detection.family, detection.variant)
    return Tracer(*both, transformer, add, dtype, kernels=kernels, accumulation=job.accumulation, known=known)


@lru_cache(maxsize=4)
def _traces_of(identity: str) -> Traces:
    """Kept while the process lives: a run's start plans twice, on an empty GPU and on what is free, and tracing takes the time."""
    return Traces()


def _identity(job: Job, checkpoint: Checkpoint, detection: Detection, dtype: torch.dtype, machine: Machine) -> str:
    """All that a step's trace depends on besides the batch and the arrangement."""
    stored = sorted((name, str(tensor.dtype), tuple(tensor.shape)) for name, tensor in checkpoint.tensors.items())
    trained = (job.method, job.lora, job.optimizer.kind, job.memory.quantise, job.accumulation)
    model = (detection.family.id, detection.variant, sorted(detection.config.items()), checkpoint.quantisation, stored)
    on = (machine.device, _kernels(machine), machine.kernel_time_limit and machine.flops_rate)
    return hashlib.sha256(repr((model, trained, dtype, on)).encode()).hexdigest()


def check_chunks(job: Job, transformer: nn.Module, family: Family) -> None:
    """Raises JobError when the job asks for parts that its blocks do not have; a plan leaves them out there."""
    if (job.memory.chunks or 1) > 1 and (kinds := whole_only(blocks_of(transformer, family), family.chunked)):
        value = f"memory.chunks is {job.memory.chunks}"
        rule = f"{listed(kinds)} of diffusers {version('diffusers')} is not what was written in parts"
        raise JobError(Problem(value, rule, "Leave memory.chunks out, or install another diffusers."))


def _kernels(machine: Machine) -> Kernels:
    if machine.device != "cuda":
        return CPU
    return replace(TURING if machine.turing else AMPERE, fused_norm=hasattr(torch.ops.aten, "_fused_rms_norm"))


def largest_batch(job: Job, detection: Detection, encoded: Encoded, items: Sequence[EncodedItem]) -> StepShape:
    """The batch of the job with the most tokens: of clips of one size, as many as there are up to `batch_size`."""
    family, variant = detection.family, detection.variant
    spec = family.latent(variant)
    size, batch_size = largest_size(items, spec, job.batch_size)
    item = next(item for item in items if (item.num_frames, item.height, item.width) == size)
    rows, width, pooled = _text(encoded, items)
    latents = spec.shape(*size)
    return StepShape(
        latents,
        batch_size,
        rows,
        width,
        pooled,
        _extras(encoded, item, family, variant, latents),
        first_frame=first_frame_probability(job, family.first_frame(variant)) > 0 and latents[1] > 1,
    )


def largest_size(items: Sequence[EncodedItem], spec: LatentSpec, batch_size: int) -> tuple[tuple[int, int, int], int]:
    """(frames, height, width) of the clips whose batch has the most tokens, and how many are in it: up to `batch_size`."""
    counts = Counter((item.num_frames, item.height, item.width) for item in items for _ in range(item.repeats))
    batches = {size: min(count, batch_size) for size, count in counts.items()}
    size = max(batches, key=lambda size: batches[size] * spec.tokens(*size))
    return size, batches[size]


def _text(encoded: Encoded, items: Sequence[EncodedItem]) -> tuple[int, int, int | None]:
    """Rows of the longest text of those that are looked at, their width, and that of the pooled output."""
    keys = sorted(
        {item.text for item in items} | {item.text_without_caption or "" for item in items} - {""} | set(encoded.prompts.values())
    )
    found = [encoded.cache.shapes(IMAGE_TEXT, key) for key in keys[:: max(len(keys) // _TEXTS_LOOKED_AT, 1)]]
    pooled = found[0].get("pooled_D")
    return max(shapes["embeds_LD"][0] for shapes in found), found[0]["embeds_LD"][1], pooled[0] if pooled else None


def _extras(
    encoded: Encoded, item: EncodedItem, family: Family, variant: Variant, latents_CFHW: tuple[int, int, int, int]
) -> dict[str, tuple[int, ...]]:
    """Shapes of what the variant gets besides latents and text, of one sample."""
    if family.first_frame(variant) is None:
        return {}
    channels, _, height, width = latents_CFHW
    shapes: dict[str, tuple[int, ...]] = {FIRST_FRAME: (channels, 1, height, width)}
    for kind in sorted(family.required(variant) - {LATENTS, IMAGE_TEXT}):
        shapes[kind] = next(iter(encoded.cache.shapes(kind, item.extras[kind]).values()))
    return shapes
