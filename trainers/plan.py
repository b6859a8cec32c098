"""What a job would train, from headers and shapes alone; and the last look at a job before it becomes a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from .batches import Samples
from .checkpoint import Checkpoint
from .data.encoded import Encoded
from .errors import DatasetError
from .experts import experts_of
from .family import Family, Variant, detect
from .full import full_lines
from .job import Job
from .preflight import check
from .run import run_of

Bucket = tuple[int, int, int]
"""Frames, height and width in pixels."""


@dataclass(frozen=True)
class Plan:
    """What a job would train. `buckets` counts the training clips of a size, `tokens` is what the transformer sees of one.

    `adapters` is 0 where all weights are trained; `base_bytes` are those of the transformer as its file stores it.
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

    @property
    def lora_bytes(self) -> int:
        """Size of a LoRA file, which holds float32, without its header."""
        return 4 * self.parameters

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
            *(full_lines(job, self.parameters, self.base_bytes, self.steps) if job.method == "full" else self._lora_lines()),
            f"learning {job.optimizer.kind}, rate {job.optimizer.learning_rate:g}, {job.optimizer.schedule}",
            f"output   {job.output_folder / job.name}",
        ]
        return "\n".join(lines)

    def _lora_lines(self) -> list[str]:
        lora = self.job.lora
        return [
            f"{'DoRA' if lora.dora else 'LoRA'}     rank {lora.rank} on {self.adapters} layers ({lora.targets.replace('_', ' ')}): "
            f"{self.parameters / 1e6:.2f} million parameters, {self.lora_bytes / 2**20:.1f} MiB",
        ]

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
    job = job.with_absolute_paths(Path.cwd())
    try:
        encoded = Encoded.open(Path(job.encoded), job.encoded_identity)
        encoded.keep_version()
        job = job.model_copy(update={"encoded_identity": encoded.identity})
    except DatasetError:
        check(job)  # tells this problem with all the others
    run = run_of(job)
    check(job, started=run is not None and run.latest_checkpoint() is not None)
    return job


def make_plan(job: Job) -> Plan:
    """What the job would train. Raises JobError with every problem."""
    check(job)
    base = Checkpoint.open(job.base.transformer)
    detection = detect(base, job.base.variant)
    encoded = Encoded.open(Path(job.encoded))
    samples = Samples.of(job, detection.family, detection.variant, encoded, 1, torch.device("cpu"), torch.float32)
    spec = detection.family.latent(detection.variant)
    buckets = Counter((item.num_frames, item.height, item.width) for item in samples.items)
    adapters, parameters = _trained(job, detection.family, detection.config)
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
        adapters=adapters,
        parameters=parameters,
        base_bytes=base.nbytes,
    )


def _trained(job: Job, family: Family, config: Mapping[str, object]) -> tuple[int, int]:
    """How many layers get an adapter, and how many parameters are trained; the base itself takes no memory."""
    from .lora import inject

    transformer = family.build(config)
    if job.method == "full":
        return 0, sum(parameter.numel() for parameter in transformer.parameters())
    parameters = inject(transformer, family, job.lora, job.seed, device=torch.device("meta"))
    return len(parameters) // (3 if job.lora.dora else 2), sum(parameter.numel() for parameter in parameters)
