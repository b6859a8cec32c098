"""What a run needs in memory: the frozen model, the adapter, the optimizer, the data; made, restored and saved here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .adapter import Adapter
from .batches import Samples
from .checkpoint import Checkpoint
from .data.encoded import Encoded
from .device import DTYPES, pick_device, pick_precision
from .family import Family, Variant, detect
from .job import Job
from .load import load_transformer
from .lora import adapter_state, inject, load_adapter_state
from .lora_format import read_lora, write_lora
from .lora_metadata import lora_metadata
from .optimizers import build_optimizer
from .preflight import check, extended_run
from .run import Run
from .state import Position, check_position, read_adapter, read_optimizer, read_position, save_state

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass
class Training:
    """A run in memory. `step` counts the optimizer steps that are done; everything else stays as it is."""

    run: Run
    job: Job
    accelerator: Accelerator
    family: Family
    variant: Variant
    transformer: torch.nn.Module
    parameters: list[torch.nn.Parameter]
    optimizer: torch.optim.Optimizer
    encoded: Encoded
    samples: Samples
    total_steps: int
    device: torch.device
    dtype: torch.dtype
    step: int = 0

    @property
    def position(self) -> Position:
        return Position(self.step, self.encoded.identity, self.samples.order.micro_per_step)


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
    checkpoint = Checkpoint.open(job.base.transformer)
    detection = detect(checkpoint, job.base.variant)
    transformer: Any = load_transformer(checkpoint, detection, accelerator.device, DTYPES[precision])
    parameters = inject(transformer, detection.family, job.lora, job.seed)
    if job.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    transformer.train()
    optimizer = accelerator.prepare_optimizer(build_optimizer(job.optimizer, parameters))
    encoded = Encoded.open(Path(job.encoded), job.encoded_identity)
    samples = Samples.of(job, detection.family, encoded, accelerator.num_processes, accelerator.device, DTYPES[precision])
    training = Training(
        run=run,
        job=job,
        accelerator=accelerator,
        family=detection.family,
        variant=detection.variant,
        transformer=transformer,
        parameters=parameters,
        optimizer=optimizer,
        encoded=encoded,
        samples=samples,
        total_steps=samples.total_steps,
        device=accelerator.device,
        dtype=DTYPES[precision],
    )
    _restore(training)
    _start_trackers(training)
    return training


def save_checkpoint(training: Training) -> None:
    """Writes the checkpoint of the present step, then its LoRA file, and drops the oldest checkpoints."""
    run, adapter = training.run, adapter_state(training.transformer, training.job.lora)
    scaler, known = training.accelerator.scaler, training.step in run.checkpoints() and lora_path(run, training.step).exists()
    if training.step not in run.checkpoints():
        with run.writing_checkpoint(training.step) as folder:
            save_state(folder, training.position, adapter, training.optimizer.state_dict(), scaler.state_dict() if scaler else None)
    lora = _write_lora(training, adapter)
    if not known:
        run.event("checkpoint", step=training.step, lora=lora.name)
    run.prune_checkpoints(training.job.checkpoints.keep_last)


def lora_path(run: Run, step: int) -> Path:
    """Where the LoRA of a step is written: a new name for each, never overwritten."""
    return Path(run.job.loras_folder) / run.folder.name / f"{run.folder.name}-{step:06d}.safetensors"


def _write_lora(training: Training, adapter: Adapter) -> Path:
    path = lora_path(training.run, training.step)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_lora(path, adapter, training.family, "native", _metadata(training))
    return path


def _metadata(training: Training) -> dict[str, str]:
    job = training.job
    return lora_metadata(
        name=training.run.name,
        family=training.family,
        variant=training.variant,
        base=job.base.transformer,
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
        load_adapter_state(training.transformer, read_lora(Path(start.initial_lora), training.family))


def _extended_folder(job: Job) -> Path:
    run, step = extended_run(job)
    return run.checkpoint_folder(step)


def _load_checkpoint(training: Training, folder: Path) -> None:
    position = read_position(folder)
    check_position(position, training.encoded.identity, training.samples.order.micro_per_step)
    load_adapter_state(training.transformer, read_adapter(folder, training.job.lora.alpha or training.job.lora.rank))
    optimizer, scaler = read_optimizer(folder)
    training.optimizer.load_state_dict(optimizer)
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
