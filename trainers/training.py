"""What a run needs in memory: the frozen model, the adapter, the optimizer, the data; made, restored and saved here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .attention import use_attention
from .attention_by_heads import limit_attention
from .batches import Samples
from .checkpoint import Checkpoint
from .data.encoded import Encoded
from .device import Hardware, Precision, pick_device, pick_precision
from .errors import LoraError, RunError
from .experts import Expert, Turn, expert_at, experts_of, turn_of
from .family import Detection, Family, Variant, detect
from .job import Job
from .job_memory import check_chunks, plan_memory
from .load import load_transformer
from .memory_plan import MemoryPlan
from .method import Method, method_of
from .offload.arrangement import Arrangement
from .offload.pinned import PinnedMemory
from .offload.placement import SLOTS
from .optimizers import build_optimizer, load_optimizer_state
from .prefetch import Batches
from .preflight import check, extended_run
from .residency import HostSide, Residency
from .room import saying_what_is_full
from .run import Run
from .run_status import Request
from .shortage import Shortages
from .state import Learnt, Position, check_position, read_optimizer, read_position, read_tensors, save_state
from .trackers import start_trackers, trackers_of

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
    method: Method
    learners: tuple[Learner, ...]
    encoded: Encoded
    samples: Samples
    batches: Batches
    total_steps: int
    device: torch.device
    """With an index where it is CUDA; `accelerator.device` has none."""
    dtype: torch.dtype
    host: HostSide
    plan: MemoryPlan | None = None
    """The GPU memory plan; None without a GPU."""
    step: int = 0
    skipped_steps: int = 0
    """How many of the last steps a loss scaler skipped, one after the other."""
    resident: Learner | None = None
    shortages: Shortages[Arrangement] = field(default_factory=Shortages)
    unsaved: str = ""
    """Why the files of the latest checkpoint are not there; "" when they are."""
    cannot_pause: bool = False
    """Whether it should pause and could not, since its state could not be saved."""

    @property
    def position(self) -> Position:
        return Position(self.step, self.encoded.identity, self.samples.order.micro_per_step, self.skipped_steps)

    def asked_to_end(self) -> Request | None:
        """What the run is asked to do. A pause for which its state could not be saved waits for the next checkpoint."""
        request = self.run.requested()
        self.cannot_pause = self.cannot_pause and request == "pause"
        return None if self.cannot_pause and self.step not in self.run.checkpoints() else request

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

    def make_way(self) -> None:
        """Gives the device's memory back that frozen weights take; they come again when a transformer is asked for."""
        resident, self.resident = self.resident, None
        if resident:
            resident.residency.leave()

    def close(self) -> None:
        """Ends the batch thread and gives back the device's memory and all pinned memory."""
        with ExitStack() as closing:
            closing.callback(self.host.close)
            closing.callback(self.make_way)
            closing.callback(self.batches.close)

    def _make_resident(self, learner: Learner) -> None:
        if self.resident is learner:
            return
        self.make_way()
        try:
            learner.residency.enter()
        except BaseException:
            learner.residency.leave()  # what came of it before the device was full
            raise
        self.resident = learner


def open_training(run: Run) -> Training:
    """Loads what the run needs, and restores its latest checkpoint, `start.extends` or `start.initial_lora`.

    Raises VideoTrainerError with all that is wrong before anything is loaded, and RunError when the GPU is full while the
    model is loaded. Then nothing is left in use.
    """
    check(run.job, started=run.latest_checkpoint() is not None)
    with saying_what_is_full(pick_device(run.job)), ExitStack() as undo:
        training = _loaded(run)
        undo.callback(training.close)
        _restore(training)
        start_trackers(training)
        undo.pop_all()
    return training


def _loaded(run: Run) -> Training:
    """Everything in memory, at its beginning."""
    job = run.job
    device = pick_device(job)
    base = Checkpoint.open(job.base.transformer)
    detection = detect(base, job.base.variant)
    precision = pick_precision(job, detection.family, Hardware.of(device))
    run.event("precision", precision=precision.name, message=str(precision))
    torch.use_deterministic_algorithms(job.deterministic)
    # Would fill all new memory, tens of GB on the host for a large model: what is allocated here is written before it is read.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    accelerator = _accelerator(run, device, precision)
    method = method_of(job, base, detection)
    experts = experts_of(job, detection.variant)
    encoded = Encoded.open(Path(job.encoded), job.encoded_identity)
    samples = Samples.of(job, detection.family, detection.variant, encoded, device, precision.dtype)
    plan = _planned(job, detection, samples)
    limit_attention(plan.machine if plan else None)
    arrangement = plan.arrangement if plan else arrangement_of(job)
    host = HostSide.of(_pinned_memory(run, job, device, plan))
    samples = replace(samples, memory=host.memory)
    learners = tuple(_learner(expert, job, method, accelerator, device, precision.dtype, arrangement, host) for expert in experts)
    return Training(
        run=run,
        job=job,
        accelerator=accelerator,
        family=detection.family,
        variant=detection.variant,
        method=method,
        learners=learners,
        encoded=encoded,
        samples=samples,
        batches=Batches(samples, _sigmas_at(job, learners, samples.total_steps)),
        total_steps=samples.total_steps,
        device=device,
        dtype=precision.dtype,
        host=host,
        plan=plan,
    )


def _planned(job: Job, detection: Detection, samples: Samples) -> MemoryPlan | None:
    """The plan for the card as it is now. The training cannot take more of it than the plan was given, whatever comes."""
    if samples.device.type != "cuda":
        return None
    plan = plan_memory(job, detection, samples, samples.device, samples.dtype)
    share = min(plan.machine.free_bytes / plan.machine.total_bytes, 1.0)
    torch.cuda.set_per_process_memory_fraction(share, samples.device)
    return plan


def _pinned_memory(run: Run, job: Job, device: torch.device, plan: MemoryPlan | None) -> PinnedMemory:
    """What the training may pin: as much as the plan allows, unless the job asks for "pinned" by itself. Refusals are events."""
    limit_bytes = plan.machine.pinnable_bytes if plan and job.memory.host != "pinned" else None
    return PinnedMemory(device, limit_bytes, lambda message: run.event("memory", message=message))


def arrangement_of(job: Job) -> Arrangement:
    """How a job asks for its blocks to be kept, where nothing is planned."""
    memory = job.memory
    return Arrangement(
        weights_bytes=0 if memory.stream == "always" else None,
        host="pinned" if memory.host == "pinned" else "mapped",
        checkpointing=job.gradient_checkpointing,
        activations="host" if memory.activations == "host" else "device",
        chunks=memory.chunks or 1,
        compile=job.speed.compile,
    )


def _sigmas_at(job: Job, learners: Sequence[Learner], total_steps: int) -> Callable[[int], tuple[float, float]]:
    """Between which noise levels a step trains: those of the expert whose turn it is."""
    trained = [learner for learner in learners if learner.expert.trained]
    return lambda step: trained[turn_of(step, total_steps, job.experts.turn_steps, len(trained)).index].sigmas


def _learner(
    expert: Expert,
    job: Job,
    method: Method,
    accelerator: Accelerator,
    device: torch.device,
    dtype: torch.dtype,
    arrangement: Arrangement,
    host: HostSide,
) -> Learner:
    """An expert with what is trained of it and its optimizer. It waits in host memory for its turn."""
    checkpoint = Checkpoint.open(expert.path)
    detection = detect(checkpoint, job.base.variant)
    can_stream = method.can_stream and (device.type != "cpu" or arrangement.weights_bytes is not None)
    how, keep_stored = job.memory.quantise, method.keep_stored
    transformer: Any = load_transformer(
        checkpoint, detection, device, dtype, keep_stored, resident=False, all_frozen=can_stream, quantise=how
    )
    check_chunks(job, transformer, detection.family)
    use_attention(transformer, job.speed.attention)
    parameters = method.inject(transformer, device) if expert.trained else []
    residency = Residency(transformer, detection.family, device, arrangement, random=job.lora.dropout > 0, host=host)
    if arrangement.weights_bytes == 0:  # all blocks are streamed, as the job says: through a whole ring
        residency.rearrange(replace(arrangement, weights_bytes=SLOTS * max(residency.block_bytes, default=0)))
    rate = job.optimizer.learning_rate
    if expert.name == "low" and job.experts.learning_rate_low:
        rate = job.experts.learning_rate_low
    if not expert.trained:
        return Learner(expert, transformer, residency, parameters, None, rate)
    optimizer = accelerator.prepare_optimizer(build_optimizer(job.optimizer, parameters))
    return Learner(expert, transformer, residency, parameters, optimizer, rate)


def save_checkpoint(training: Training) -> None:
    """Writes the checkpoint of the present step, then its LoRA or model files, and drops the oldest checkpoints.

    What cannot be written (the disk is full, another program holds a file) is no reason to lose the training: the run's events
    and `training.unsaved` say it, and the next checkpoint is another chance.
    """
    run, step, last = training.run, training.step, training.step == training.total_steps
    files = [lora_path(run, step, learner.expert) for learner in training.trained]
    known = step in run.checkpoints() and all(file.exists() for file in files)
    training.unsaved = ""
    if not known and not _written(training, f"the checkpoint of step {step}", lambda: _write_state(training)) and not last:
        return  # a LoRA without its checkpoint would be in the way of this step's LoRA after a resume
    if not known and not _written(training, f"{files[0].name} in {files[0].parent}", lambda: _write_outputs(training, files)):
        return
    training.unsaved = ""  # of the last step, what was trained for is there; only `start.extends` cannot begin at it
    run.prune_checkpoints(training.job.checkpoints.keep_last)


def check_saved(training: Training) -> None:
    """Raises RunError when what the last step should have left is not there: such a run is not done."""
    if training.unsaved:
        raise RunError(
            f"All {training.step} steps are done, but {training.unsaved}. Free disk space, or close the program that holds the file, then "
            f"resume the run: it starts from step {training.run.latest_checkpoint() or 0}."
        )


def _written(training: Training, what: str, write: Callable[[], None]) -> bool:
    """Whether `write` could write; if not, the run's events and `training.unsaved` say why."""
    try:
        write()
    except (OSError, LoraError) as error:
        why = error.__cause__ if isinstance(error, LoraError) else error
        if not isinstance(why, OSError):
            raise
        training.unsaved = f"{what} could not be saved: {why}"
        good = training.run.latest_checkpoint() or 0
        training.run.event("warning", step=training.step, message=f"{training.unsaved}; a resume would start from step {good}")
        return False
    return True


def _write_state(training: Training) -> None:
    run, step, method, scaler = training.run, training.step, training.method, training.accelerator.scaler
    if step in run.checkpoints():
        return
    learnt = {
        learner.expert.name: Learnt(method.tensors(learner.transformer), learner.optimizer.state_dict()) for learner in training.trained
    }
    with run.writing_checkpoint(step) as folder:
        save_state(folder, training.position, method.state_file, learnt, scaler.state_dict() if scaler else None)


def _write_outputs(training: Training, files: Sequence[Path]) -> None:
    run, step, method = training.run, training.step, training.method
    for file, learner in zip(files, training.trained, strict=True):
        file.parent.mkdir(parents=True, exist_ok=True)
        method.write(file, learner.transformer, learner.expert, learner.expert.named(run.name), step)
    names = [file.name for file in files]
    run.event("checkpoint", step=step, **{method.event_field: names[0]}, **({"loras": names} if names[1:] else {}))


def lora_path(run: Run, step: int, expert: Expert | None = None) -> Path:
    """Where the LoRA (or the model) of a step is written: a new name for each, never overwritten."""
    name = expert.named(run.name) if expert else run.name
    return run.job.output_folder / run.folder.name / f"{name}-{step:06d}.safetensors"


def _restore(training: Training) -> None:
    """Puts the training where it should go on: the latest checkpoint, another run's, a LoRA, or the beginning."""
    run, start = training.run, training.job.start
    if (step := run.latest_checkpoint()) is not None:
        _load_checkpoint(training, run.checkpoint_folder(step))
        save_checkpoint(training)
    elif start.extends:
        _load_checkpoint(training, _extended_folder(training.job))
    else:
        for learner in training.trained:
            training.method.begin(learner.transformer, learner.expert)


def _extended_folder(job: Job) -> Path:
    run, step = extended_run(job)
    return run.checkpoint_folder(step)


def _load_checkpoint(training: Training, folder: Path) -> None:
    position = read_position(folder)
    check_position(position, training.encoded.identity, training.samples.order.micro_per_step)
    for learner in training.trained:
        name = learner.expert.name
        training.method.load_tensors(learner.transformer, read_tensors(folder, training.method.state_file, name))
        optimizer, scaler = read_optimizer(folder, name)
        load_optimizer_state(learner.optimizer, optimizer)
        if scaler and training.accelerator.scaler:
            training.accelerator.scaler.load_state_dict(scaler)
    training.step, training.skipped_steps = position.step, position.skipped_steps


def _accelerator(run: Run, device: torch.device, precision: Precision) -> Accelerator:
    """Accelerate's object for loss scaling and trackers; autocast stays off (the adapter casts by itself)."""
    from accelerate import Accelerator
    from accelerate.utils import AutocastKwargs, ProjectConfiguration

    if device.type == "cuda" and torch.cuda.device_count() > 1:
        torch.cuda.set_device(device)
    return Accelerator(
        cpu=device.type == "cpu",
        mixed_precision="fp16" if precision.name == "fp16" else "no",
        kwargs_handlers=[AutocastKwargs(enabled=False)],
        log_with=trackers_of(run.job),
        project_config=ProjectConfiguration(project_dir=str(run.folder), logging_dir=str(run.folder / "tensorboard")),
    )
