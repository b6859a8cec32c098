"""Full fine-tuning: every weight of a small transformer is trained, and written as a model file with native names.

All parameters of the transformer are trained: weights, biases, norms and learned tables (rope tables are computed, not
learned). Each is a copy; the base's file stays mapped read-only, or is not needed any more.

In float32 any optimizer will do. In bf16 the weights are bf16 too, so that Wan 1.3B fits on a card of 24 GB, and only
adamw_kahan is let through: bf16 has 8 bits, an update below 1/512 of a weight would be rounded away, and Kahan summation
carries it on (https://arxiv.org/abs/2010.06192). Parts that the model's class wants in float32 are float32 there too.
Float32 masters under autocast would be the other way: 16 bytes for each weight with AdamW, 10 with this.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from .checkpoint import Checkpoint
from .device import Hardware, Precision, pick_precision
from .errors import KeyTableError, Problem, RunError
from .experts import Expert
from .family import Detection
from .job import ExpertsSpec, Job, LoraSpec
from .keytable import KeyTable
from .load import native_state
from .lora_metadata import model_metadata
from .quantisation import FP8_DTYPES
from .stable_file import save_file

MOST_PARAMETERS = 3_000_000_000
"""Larger models are trained with a LoRA: weights, gradients and optimizer must all be on the card."""

_KEPT_METADATA = ("config", "license", "modelspec.license")
"""What the header of the base says that is true of the trained model too: LTX-Video's config, and terms of use."""

_OPTIMIZER_VALUES = {"adamw": 2, "adamw_kahan": 3, "adamw8bit": 2, "prodigy": 4}
"""Numbers that an optimizer keeps for each weight; of the weight's dtype, adamw8bit's of one byte."""


@dataclass(frozen=True)
class FullMethod:
    """The Method protocol (see `method`) for all weights. `dtypes` are those of the base's file, by native name."""

    job: Job
    detection: Detection
    dtypes: Mapping[str, torch.dtype]
    header: Mapping[str, str]
    state_file = "weights"
    event_field = "model"
    keep_stored = False
    can_stream = False

    @classmethod
    def of(cls, job: Job, checkpoint: Checkpoint, detection: Detection) -> FullMethod:
        kept = {name: text for name, text in checkpoint.metadata.items() if name in _KEPT_METADATA}
        dtypes = _native_dtypes(checkpoint, detection.family.keys)
        return cls(job, detection, dtypes, kept | dict(detection.native_metadata))

    def inject(self, transformer: nn.Module, device: torch.device) -> list[nn.Parameter]:
        for module in transformer.modules():
            for name, parameter in module.named_parameters(recurse=False):
                setattr(module, name, nn.Parameter(_own_copy(parameter.detach(), device)))
        return list(transformer.parameters())

    def tensors(self, transformer: nn.Module) -> dict[str, torch.Tensor]:
        return {name: parameter.detach() for name, parameter in transformer.named_parameters()}

    def load_tensors(self, transformer: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
        parameters = dict(transformer.named_parameters())
        if here := _unlike(parameters, tensors):
            name, found = here
            raise RunError(
                f"the checkpoint has {name} as {_told(tensors.get(name))}, this run as {_told(found)}; a run goes on in the same "
                "precision and on the same model. Set precision and base as they were."
            )
        with torch.no_grad():
            for name, tensor in tensors.items():
                parameters[name].copy_(tensor)

    def begin(self, transformer: nn.Module, expert: Expert) -> None:
        """It begins with the base."""

    def write(self, path: Path, transformer: nn.Module, expert: Expert, name: str, step: int) -> None:
        """See Method. Tensor by tensor in the dtype that the base's file stores it in."""
        family, variant = self.detection.family, self.detection.variant
        state = native_state(self.tensors(transformer), family.keys)
        stored = {native: tensor.to("cpu", self.dtypes[native]) for native, tensor in state.items()}
        told = model_metadata(
            name=name,
            family=family,
            variant=variant,
            base=expert.path,
            step=step,
            trigger_words=self.job.trigger_words,
            job_hash=self.job.hash(),
        )
        save_file(stored, path, {**self.header, **told})


def _own_copy(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor in memory that may be written to: on the CPU it may be a page of the base's file, elsewhere it never is."""
    if tensor.device.type == "cpu" and device.type == "cpu":
        return tensor.clone(memory_format=torch.contiguous_format)
    return tensor.to(device).contiguous()


def _unlike(parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, torch.Tensor]) -> tuple[str, torch.Tensor | None] | None:
    """The first name whose tensor here is not of the shape and dtype there, with the one here."""
    for name in [*parameters, *tensors]:
        here, there = parameters.get(name), tensors.get(name)
        if here is None or there is None or (here.shape, here.dtype) != (there.shape, there.dtype):
            return name, here
    return None


def _told(tensor: torch.Tensor | None) -> str:
    return "nothing" if tensor is None else f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _native_dtypes(checkpoint: Checkpoint, table: KeyTable) -> dict[str, torch.dtype]:
    """The stored dtype of every tensor, by its native name, whichever of the two namings the file has."""
    stored = {name: tensor.dtype for name, tensor in checkpoint.tensors.items()}
    try:
        table.map_file(stored)
    except KeyTableError:
        return {table.to_native(name).name: dtype for name, dtype in stored.items()}
    return stored


# What is wrong with a job


def full_problems(job: Job, checkpoint: Checkpoint, detection: Detection, hardware: Hardware | None) -> Iterator[Problem]:
    """Why all weights of this base cannot be trained by this job; nothing for a job that trains a LoRA.

    `hardware` None: the job's device is not there, which is a problem of its own.
    """
    if job.method != "full":
        return
    yield from _base_problems(job, checkpoint, detection)
    yield from _setting_problems(job)
    if hardware is not None:
        yield from _precision_problems(job, pick_precision(job, detection.family, hardware))


def _base_problems(job: Job, checkpoint: Checkpoint, detection: Detection) -> Iterator[Problem]:
    rule, remedy = 'method "full" trains', 'Set method to "lora".'
    parameters = checkpoint.parameters
    if parameters > MOST_PARAMETERS:
        most = f"models of up to {MOST_PARAMETERS / 1e9:g} billion, whose weights, gradients and optimizer fit on a card"
        yield Problem(f"{checkpoint.path.name} has {parameters / 1e9:.1f} billion parameters", f"{rule} {most}", remedy)
    if detection.variant.boundary is not None or job.base.transformer_low_noise:
        yield Problem(f"{detection.variant.title} has two experts", f"{rule} models of one transformer", remedy)
    packed = {stored.dtype for stored in checkpoint.tensors.values()} & set(FP8_DTYPES)
    if packed or checkpoint.quantisation:
        value = f"{checkpoint.path.name} is stored as {checkpoint.quantisation or str(next(iter(packed))).removeprefix('torch.')}"
        yield Problem(value, f"{rule} the weights themselves, which fp8 is too coarse for", "Give the bf16 or fp16 file of the model.")


def _setting_problems(job: Job) -> Iterator[Problem]:
    rule = 'it has no meaning with method "full"'
    defaults = {"lora": LoraSpec(), "experts": ExpertsSpec()}
    for table, default in defaults.items():
        given = getattr(job, table)
        for field in type(default).model_fields:
            if getattr(given, field) != getattr(default, field):
                yield Problem(f"{table}.{field} is {getattr(given, field)!r}", rule, 'Leave it out, or set method to "lora".')
    if job.memory.stream == "always":
        value, rule = "memory.stream is always", "weights that are trained stay on the card"
        yield Problem(value, rule, 'Set it to "auto".')
    if job.start.initial_lora:
        value, rule = f"start.initial_lora is {Path(job.start.initial_lora).name}", 'method "full" begins with the base'
        yield Problem(value, rule, 'Leave it out, or set method to "lora".')


def _precision_problems(job: Job, precision: Precision) -> Iterator[Problem]:
    if precision.name == "fp16":
        value = f"precision is {'fp16' if job.precision == 'fp16' else 'auto, here fp16'}"
        yield Problem(value, "weights in fp16 lose small updates and overflow", 'Set precision to "fp32".')
    if precision.name == "bf16" and job.optimizer.kind != "adamw_kahan":
        rule = "weights in bf16 would lose every update below 1/512 of them; adamw_kahan carries them on"
        remedy = 'Set optimizer.kind to "adamw_kahan", or precision to "fp32" (up to twice the memory).'
        yield Problem(f"optimizer.kind is {job.optimizer.kind}, in bf16", rule, remedy)


# How large it becomes


def full_lines(job: Job, precision: Precision, parameters: int, base_bytes: int, steps: int) -> list[str]:
    """What `plan` says of the weights and of their files; `base_bytes` are those of the base's transformer."""
    spec, each = job.checkpoints, _resume_bytes(job, precision, parameters)
    count = -(-steps // spec.every_steps)
    kept = min(count, spec.keep_last)
    return [
        f"weights  {parameters / 1e6:.2f} million, all of them, in {precision.name}",
        f"disk     {count} models of {_size(base_bytes)}, stored as the base is; none is deleted",
        f"         checkpoints for resuming: about {_size(each)} each, {_size(each * (kept + 1))} while the last of {kept} is written",
    ]


def _resume_bytes(job: Job, precision: Precision, parameters: int) -> int:
    """About the size of a checkpoint for resuming: the weights as they are trained, and the optimizer's numbers."""
    weight, kind = precision.dtype.itemsize, job.optimizer.kind
    values = 2 if kind == "adamw_kahan" and weight == 4 else _OPTIMIZER_VALUES[kind]
    return parameters * (weight + values * (1 if kind == "adamw8bit" else weight))


def _size(nbytes: int) -> str:
    return f"{nbytes / 2**30:.1f} GiB" if nbytes >= 2**30 else f"{nbytes / 2**20:.1f} MiB"
