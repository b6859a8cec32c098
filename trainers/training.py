"""What a run needs in memory: the frozen model, the adapter, the optimizer, the data; made, restored and saved here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .adapter import Adapter
from .batches import Samples
from .checkpoint import Checkpoint
from .data.encoded import Encoded
from .device import DTYPES, pick_device, pick_precision
from .dora import with_lengths
from .experts import Expert, Turn, expert_at, experts_of, lora_of, turn_of
from .family import Family, Variant, detect
from .job import Job
from .load import load_transformer
from .lora import adapter_state, base_weights, inject, load_adapter_state
from .lora_format import read_lora, write_lora
from .lora_metadata import lora_metadata
from .offload.arrangement import Arrangement
from .optimizers import build_optimizer
from .prefetch import Batches
from .preflight import check, extended_run
from .residency import Residency
from .run import Run
from .state import Learnt, Position, check_position, read_adapter, read_optimizer, read_position, save_state

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass
class Learner:
    """One expert in memory. An expert that this job does not train (it only takes part in previews) has no optimizer."""

    expert: Expert
    transformer: torch.nn.Module
    residency: Residency
    parameters: list[torch.nn.Parameter]
    optimizer: Any
    learning_rate: float

    @property
    def sigmas(self) -> tuple[float, float]:
        return self.expert.lowest_sigma, self.expert.highest_sigma


@dataclass
class Training:
    """A run in memory. `step` counts the optimizer steps that are done; of the `learners` one at a time is on the device."""

    run: Run
    job: Job
    accelerator: Accelerator
    family: Family
    variant: Variant
    learners: tuple[Learner, ...]
    encoded: Encoded
    samples: Samples
    batches: Batches
    total_steps: int
    device: torch.device
    dtype: torch.dtype
    budget_bytes: int | None = None
    """What the training may take of the device; None: a device that is not counted."""
    step: int = 0
    resident: Learner | None = None

    @property
    def position(self) -> Position:
        return Position(self.step, self.encoded.identity, self.samples.order.micro_per_step)

    @property
    def trained(self) -> list[Learner]:
        return [learner for learner in self.learners if learner.expert.trained]

    def take_turn(self, step: int | None = None) -> tuple[Learner, Turn]:
        """The learner of a step (None: the present one), on the device and in training mode."""
        turn = turn_of(self.step if step is None else step, self.total_steps, self.job.experts.turn_steps, len(self.trained))
        learner = self.trained[turn.index]
        self._make_resident(learner)
        learner.transformer.train()
        return learner, turn

    def transformer_at(self, sigma: float) -> torch.nn.Module:
        """What a sampler asks at a noise level, on the device and in eval mode."""
        expert = expert_at([learner.expert for learner in self.learners], sigma, self.variant.boundary)
        learner = next(learner for learner in self.learners if learner.expert is expert)
        self._make_resident(learner)
        return learner.transformer.eval()

    def rearrange(self, arrangement: Arrangement) -> None:
        """Keeps every transformer otherwise on the device; between two steps only."""
        for learner in self.learners:
            learner.residency.rearrange(arrangement)

    def _make_resident(self, learner: Learner) -> None:
        if self.resident is learner:
            return
        if self.resident:
            self.resident.residency.leave()
        self.resident = learner
        learner.residency.enter()


def open_training(run: Run) -> Training:
    """Loads what the run needs, and restores its latest checkpoint, `start.extends` or `start.initial_lora`.

    Raises VideoTrainerError with all that is wrong before anything is loaded.
    """
    job = run.job
    check(job, started=run.latest_checkpoint() is not None)
    device = pick_device(job)
    precision = pick_precision(job, device)
    torch.use_deterministic_algorithms(job.deterministic)
    accelerator = _accelerator(run, device, precision)
    detection = detect(Checkpoint.open(job.base.transformer), job.base.variant)
    experts = experts_of(job, detection.variant)
    arrangement = arrangement_of(job)
    learners = tuple(_learner(expert, job, accelerator, DTYPES[precision], arrangement) for expert in experts)
    encoded = Encoded.open(Path(job.encoded), job.encoded_identity)
    samples = Samples.of(
        job, detection.family, detection.variant, encoded, accelerator.num_processes, accelerator.device, DTYPES[precision]
    )
    training = Training(
        run=run,
        job=job,
        accelerator=accelerator,
        family=detection.family,
        variant=detection.variant,
        learners=learners,
        encoded=encoded,
        samples=samples,
        batches=Batches(samples, _sigmas_at(job, learners, samples.total_steps), accelerator.process_index, accelerator.num_processes),
        total_steps=samples.total_steps,
        device=accelerator.device,
        dtype=DTYPES[precision],
    )
    _restore(training)
    _start_trackers(training)
    return training


def arrangement_of(job: Job) -> Arrangement:
    """How a job asks for its blocks to be kept."""
    memory = job.memory
    return Arrangement(
        weights_bytes=0 if memory.stream == "always" else None,
        host="pinned" if memory.host == "pinned" else "mapped",
        checkpointing=job.gradient_checkpointing or memory.stream == "always",
        activations="host" if memory.activations == "host" else "device",
        chunks=memory.chunks or 1,
        compile=job.speed.compile,
    )


def _sigmas_at(job: Job, learners: Sequence[Learner], total_steps: int) -> Callable[[int], tuple[float, float]]:
    """Between which noise levels a step trains: those of the expert whose turn it is."""
    trained = [learner for learner in learners if learner.expert.trained]
    return lambda step: trained[turn_of(step, total_steps, job.experts.turn_steps, len(trained)).index].sigmas


def _learner(expert: Expert, job: Job, accelerator: Accelerator, dtype: torch.dtype, arrangement: Arrangement) -> Learner:
    """An expert with its LoRA and optimizer. It waits in host memory for its turn."""
    checkpoint = Checkpoint.open(expert.path)
    detection = detect(checkpoint, job.base.variant)
    device = accelerator.device
    can_stream = not job.lora.dora and (device.type != "cpu" or arrangement.weights_bytes is not None)
    keep_stored = False if job.lora.dora else None
    transformer: Any = load_transformer(checkpoint, detection, device, dtype, keep_stored, resident=False, all_frozen=can_stream)
    residency = Residency(transformer, detection.family, device, arrangement, random=job.lora.dropout > 0)
    rate = job.optimizer.learning_rate
    if expert.name == "low" and job.experts.learning_rate_low:
        rate = job.experts.learning_rate_low
    if not expert.trained:
        return Learner(expert, transformer, residency, [], None, rate)
    parameters = inject(transformer, detection.family, job.lora, job.seed, device=device)
    optimizer = accelerator.prepare_optimizer(build_optimizer(job.optimizer, parameters))
    return Learner(expert, transformer, residency, parameters, optimizer, rate)


def save_checkpoint(training: Training) -> None:
    """Writes the checkpoint of the present step, then its LoRA files, and drops the oldest checkpoints."""
    run, step, scaler = training.run, training.step, training.accelerator.scaler
    adapters = {learner.expert: adapter_state(learner.transformer, training.job.lora) for learner in training.trained}
    as_written = {
        learner.expert: with_lengths(adapters[learner.expert], "base", base_weights(learner.transformer)) for learner in training.trained
    }
    known = step in run.checkpoints() and all(lora_path(run, step, expert).exists() for expert in adapters)
    if step not in run.checkpoints():
        learnt = {learner.expert.name: Learnt(adapters[learner.expert], learner.optimizer.state_dict()) for learner in training.trained}
        with run.writing_checkpoint(step) as folder:
            save_state(folder, training.position, learnt, scaler.state_dict() if scaler else None)
    files = [_write_lora(training, expert, adapter) for expert, adapter in as_written.items()]
    if not known:
        run.event("checkpoint", step=step, lora=files[0].name, **({"loras": [file.name for file in files]} if files[1:] else {}))
    run.prune_checkpoints(training.job.checkpoints.keep_last)


def lora_path(run: Run, step: int, expert: Expert | None = None) -> Path:
    """Where the LoRA of a step is written: a new name for each, never overwritten."""
    name = expert.named(run.name) if expert else run.name
    return Path(run.job.loras_folder) / run.folder.name / f"{name}-{step:06d}.safetensors"


def _write_lora(training: Training, expert: Expert, adapter: Adapter) -> Path:
    path = lora_path(training.run, training.step, expert)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_lora(path, adapter, training.family, "native", _metadata(training, expert))
    return path


def _metadata(training: Training, expert: Expert) -> dict[str, str]:
    job = training.job
    return lora_metadata(
        name=expert.named(training.run.name),
        family=training.family,
        variant=training.variant,
        base=expert.path,
        expert=expert.name,
        rank=job.lora.rank,
        alpha=job.lora.alpha,
        step=training.step,
        trigger_words=job.trigger_words,
        job_hash=job.hash(),
    )


def _restore(training: Training) -> None:
    """Puts the training where it should go on: the latest checkpoint, another run's, a LoRA, or the beginning."""
    run, start = training.run, training.job.start
    if (step := run.latest_checkpoint()) is not None:
        _load_checkpoint(training, run.checkpoint_folder(step))
        save_checkpoint(training)
    elif start.extends:
        _load_checkpoint(training, _extended_folder(training.job))
    elif start.initial_lora:
        for learner in training.trained:
            path = lora_of(Path(start.initial_lora), learner.expert.name)
            load_adapter_state(learner.transformer, read_lora(path, training.family))


def _extended_folder(job: Job) -> Path:
    run, step = extended_run(job)
    return run.checkpoint_folder(step)


def _load_checkpoint(training: Training, folder: Path) -> None:
    position = read_position(folder)
    check_position(position, training.encoded.identity, training.samples.order.micro_per_step)
    for learner in training.trained:
        name = learner.expert.name
        load_adapter_state(learner.transformer, read_adapter(folder, training.job.lora.alpha or training.job.lora.rank, name))
        optimizer, scaler = read_optimizer(folder, name)
        learner.optimizer.load_state_dict(optimizer)
        if scaler and training.accelerator.scaler:
            training.accelerator.scaler.load_state_dict(scaler)
    training.step = position.step


def _accelerator(run: Run, device: torch.device, precision: str) -> Accelerator:
    """Accelerate's object for processes, loss scaling and trackers; autocast stays off (the adapter casts by itself)."""
    from accelerate import Accelerator
    from accelerate.utils import AutocastKwargs, ProjectConfiguration

    if device.type == "cuda" and torch.cuda.device_count() > 1 and not torch.distributed.is_initialized():
        torch.cuda.set_device(device)
    return Accelerator(
        cpu=device.type == "cpu",
        mixed_precision="fp16" if precision == "fp16" else "no",
        kwargs_handlers=[AutocastKwargs(enabled=False)],
        log_with=_trackers(run.job),
        project_config=ProjectConfiguration(project_dir=str(run.folder), logging_dir=str(run.folder / "tensorboard")),
    )


def _trackers(job: Job) -> list[str] | None:
    from accelerate.utils import is_tensorboard_available

    return ["tensorboard"] if job.tensorboard and is_tensorboard_available() else None


def _start_trackers(training: Training) -> None:
    options: dict[str, Any] = {"tensorboard": {"purge_step": training.step + 1}}
    training.accelerator.init_trackers("", init_kwargs=options)
