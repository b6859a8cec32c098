"""What a job would train, from headers and shapes alone; and the last look at a job before it becomes a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .batches import Samples
from .checkpoint import Checkpoint
from .data.encoded import Encoded
from .device import Hardware, Precision, pick_device, pick_precision
from .errors import DatasetError
from .experts import experts_of
from .family import Detection, Family, Variant, detect
from .full import full_lines
from .job import Job
from .preflight import check
from .run import run_of

if TYPE_CHECKING:
    from .machine import Machine
    from .memory_plan import MemoryPlan

Bucket = tuple[int, int, int]
"""Frames, height and width in pixels."""


@dataclass(frozen=True)
class Plan:
    """What a job would train. `buckets` counts the training clips of a size, `tokens` is what the transformer sees of one.

    `adapters` and `parameters` are those of one of the `loras` (one for each expert); where all weights are trained `adapters`
    is 0. `base_bytes` are those of the transformer as its file stores it. `mean_share` is how long a step is on average, of
    one with the largest clips.
    """

    job: Job
    family: Family
    variant: Variant
    clips: int
    held_out: int
    buckets: Mapping[Bucket, int]
    tokens: Mapping[Bucket, int]
    steps: int
    steps_per_epoch: float
    adapters: int
    parameters: int
    base_bytes: int
    loras: int
    memory: MemoryPlan
    mean_share: float
    precision: Precision

    @property
    def lora_bytes(self) -> int:
        """Size of a LoRA file, which holds float32, without its header."""
        return 4 * self.parameters

    @property
    def run_seconds(self) -> float:
        """How long the whole run is."""
        return self.steps * self.mean_share * self.memory.price.step_seconds

    def as_values(self) -> dict[str, Any]:
        """As plain values, for other programs."""
        from .memory_report import as_values

        return {
            "name": self.job.name,
            "variant": self.variant.id,
            "clips": self.clips,
            "held_out": self.held_out,
            "buckets": [
                {"frames": size[0], "height": size[1], "width": size[2], "clips": count, "tokens": self.tokens[size]}
                for size, count in sorted(self.buckets.items(), reverse=True)
            ],
            "steps": self.steps,
            "steps_per_epoch": self.steps_per_epoch,
            "loras": self.loras,
            "adapters": self.adapters,
            "parameters": self.parameters,
            "precision": {"name": self.precision.name, "reason": self.precision.reason},
            "memory": as_values(self.memory, self.run_seconds),
        }

    def __str__(self) -> str:
        job = self.job
        lines = [
            f"{job.name}: {'all weights of' if job.method == 'full' else 'a LoRA for'} {self.variant.title} ({self.variant.id})",
            f"data     {self.clips} clips, {self.held_out} held out, from {job.encoded}",
            *(
                f"         {count} x {width}x{height}, {frames} frames: {self.tokens[frames, height, width]} tokens each"
                for (frames, height, width), count in sorted(self.buckets.items(), reverse=True)
            ),
            f"steps    {self.steps} of {job.batch_size * job.accumulation} clips; {self.steps_per_epoch:.1f} are an epoch",
            *self._expert_lines(),
            *self._start_lines(),
            *(self._weight_lines() if job.method == "full" else self._lora_lines()),
            f"compute  in {self.precision.name}: {self.precision.reason}",
            f"learning {job.optimizer.kind}, rate {job.optimizer.learning_rate:g}, {job.optimizer.schedule}",
            f"output   {job.output_folder / job.name}",
            *(f"{'' if index else 'memory':<8} {line}" for index, line in enumerate(self._memory_lines())),
        ]
        return "\n".join(lines)

    def _weight_lines(self) -> list[str]:
        return full_lines(self.job, self.precision, self.parameters, self.base_bytes, self.steps)

    def _lora_lines(self) -> list[str]:
        lora = self.job.lora
        return [
            f"{'DoRA' if lora.dora else 'LoRA'}     rank {lora.rank} on {self.adapters} layers ({lora.targets.replace('_', ' ')}): "
            f"{self.parameters / 1e6:.2f} million parameters, {self.lora_bytes / 2**20:.1f} MiB"
            f"{' for each expert' if self.loras > 1 else ''}",
        ]

    def _memory_lines(self) -> list[str]:
        from .memory_report import report

        return report(self.memory, self.run_seconds)

    def _expert_lines(self) -> list[str]:
        experts = [expert for expert in experts_of(self.job, self.variant) if expert.name]
        lines = [
            f"expert   {expert.name}: {Path(expert.path).name}, noise {expert.lowest_sigma:g} to {expert.highest_sigma:g}"
            for expert in experts
            if expert.trained
        ]
        if len(lines) > 1:
            lines.append(f"         turns of {self.job.experts.turn_steps} steps; each gets a LoRA and its share of the steps")
        return lines

    def _start_lines(self) -> list[str]:
        job, lines = self.job, []
        if job.start.extends:
            done = int(job.start.extends.rpartition("@")[2])
            lines.append(f"start    from {job.start.extends}: {self.steps - done} steps more, up to {self.steps}")
        if job.start.initial_lora:
            lines.append(f"start    from {Path(job.start.initial_lora).name}, at step 0")
        if job.batch_size > self.clips:
            lines.append(f"note     batch_size is {job.batch_size}, more than the {self.clips} clips: no batch will be full")
        return lines


def hand_over(job: Job) -> Job:
    """The job as a run keeps it: checked, paths absolute, and tied to the encoded data: the version it names, or as it is now.

    Raises JobError with every problem.
    """
    return planned(job)[0]


def planned(job: Job) -> tuple[Job, MemoryPlan | None]:
    """`hand_over`, and the plan that `check` gives."""
    job = job.with_absolute_paths(Path.cwd())
    try:
        encoded = Encoded.open(Path(job.encoded), job.encoded_identity)
        encoded.keep_version()
        job = job.model_copy(update={"encoded_identity": encoded.identity})
    except DatasetError:
        check(job)  # tells this problem with all the others
    run = run_of(job)
    return job, check(job, started=run is not None and run.latest_checkpoint() is not None)


def make_plan(job: Job, machine: Machine | None = None) -> Plan:
    """What the job would train, on this machine or on another one. Raises JobError with every problem."""
    from .job_memory import plan_memory

    elsewhere = None if machine is None else Hardware.cuda(machine.name, machine.bf16)
    check(job, elsewhere=elsewhere)
    base = Checkpoint.open(job.base.transformer)
    detection = detect(base, job.base.variant)
    encoded = Encoded.open(Path(job.encoded))
    device = pick_device(job) if machine is None else torch.device(machine.device)
    precision = pick_precision(job, detection.family, elsewhere or Hardware.of(device))
    samples = Samples.of(job, detection.family, detection.variant, encoded, torch.device("cpu"), torch.float32)
    spec = detection.family.latent(detection.variant)
    buckets = Counter((item.num_frames, item.height, item.width) for item in samples.items)
    memory = plan_memory(job, detection, samples, device, precision.dtype, machine and machine.computing_in(precision.dtype))
    return Plan(
        job=job,
        family=detection.family,
        variant=detection.variant,
        clips=len(samples.items),
        held_out=len(encoded.items) - len(samples.items),
        buckets=buckets,
        tokens={bucket: spec.tokens(*bucket) for bucket in buckets},
        steps=samples.total_steps,
        steps_per_epoch=samples.order.micro_per_epoch / samples.order.micro_per_step,
        adapters=memory.model.adapters,
        parameters=memory.model.parameters,
        base_bytes=base.nbytes,
        loras=memory.model.trained,
        memory=memory,
        mean_share=_mean_share(detection, buckets),
        precision=precision,
    )


def _mean_share(detection: Detection, buckets: Mapping[Bucket, int]) -> float:
    """What a clip costs on average, of the most expensive one."""
    family, spec = detection.family, detection.family.latent(detection.variant)
    costs = {bucket: family.cost(detection.config, spec.shape(*bucket), 256) for bucket in buckets}
    return sum(costs[bucket] * count for bucket, count in buckets.items()) / sum(buckets.values()) / max(costs.values())
