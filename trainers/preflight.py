"""Everything that is wrong with a job, found by reading headers only, before anything is loaded."""

from __future__ import annotations

import importlib.util
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .adherence import find_clip_problems
from .attention import check_attention
from .batches import Samples
from .checkpoint import Checkpoint
from .condition_problems import clip_problems, condition_problems, preview_problems
from .data.encoded import Encoded
from .device import Hardware, no_gpu_problem, pick_device, pick_precision, precision_problem
from .errors import JobError, Problem, ProblemsError, RunError, VideoTrainerError
from .even_blocks import block_problem
from .family import Detection, Family, detect, detect_vae, family_of
from .full import full_problems
from .job import Job, LoraSpec
from .lora import dora_problem
from .lora_description import describe
from .optimizers import check_optimizer
from .path_lengths import path_problem
from .quantise import check_quantiser, quantise_problems
from .run import Run, find_run

if TYPE_CHECKING:
    from .memory_plan import MemoryPlan


def check(job: Job, started: bool = False, elsewhere: Hardware | None = None) -> MemoryPlan | None:
    """Raises JobError with every problem of the job; when it can run, how it would on its GPU if nothing else were there.

    None: there is no GPU, or the job is for hardware that is `elsewhere`: then this machine's is not asked. A run that has
    `started` goes on from its own checkpoints: what it began with may be gone.
    """
    if problems := list(find_problems(job, started, elsewhere)):
        raise JobError(problems, subject=f"The job {job.name} cannot run")
    if elsewhere is not None:
        return None
    try:
        return _plan_of_empty_card(job)
    except JobError as error:
        raise JobError(error.problems, subject=f"The job {job.name} cannot run") from None


def _plan_of_empty_card(job: Job) -> MemoryPlan | None:
    """Reads headers, computes nothing. Raises JobError when the job does not fit."""
    device = pick_device(job)
    if device.type != "cuda":
        return None
    from .job_memory import plan_memory  # with all that a step is made of: not while ComfyUI starts
    from .machine import empty_card

    detection = detect(Checkpoint.open(job.base.transformer), job.base.variant)
    dtype = pick_precision(job, detection.family, Hardware.of(device)).dtype
    encoded = Encoded.open(Path(job.encoded), job.encoded_identity)
    samples = Samples.of(job, detection.family, detection.variant, encoded, device, dtype)
    return plan_memory(job, detection, samples, device, dtype, empty_card(device))


def check_settings(job: Job, started: bool = False) -> None:
    """Raises JobError with every problem that can be found before the data set is there: device, packages, where it starts."""
    problems = list(_setting_problems(job, started))
    base, detection = _quietly(job)
    if job.base.variant:
        problems += condition_problems(job, *family_of(job.base.variant))
    if base and detection:
        problems += _hardware_problems(job, started, base, detection.family, _hardware(job))
    if problems:
        raise JobError(problems, subject=f"The job {job.name} cannot run")


def find_problems(job: Job, started: bool = False, elsewhere: Hardware | None = None) -> Iterator[Problem]:
    """Each problem of the job. Reads headers, never tensors."""
    detection = encoded = None
    hardware = elsewhere or _hardware(job)
    try:
        base = Checkpoint.open(job.base.transformer)
        detection = detect(base, job.base.variant)
    except VideoTrainerError as error:
        yield from _problems("base.transformer", error)
    try:
        encoded = Encoded.open(Path(job.encoded), job.encoded_identity)
    except VideoTrainerError as error:
        yield from _problems("encoded", error)
    if detection:
        yield from full_problems(job, base, detection, hardware)
        yield from _dora_problems(job, detection.family)
        yield from condition_problems(job, detection.family, detection.variant)
        yield from _hardware_problems(job, started, base, detection.family, hardware, elsewhere is not None)
    yield from _setting_problems(job, started, detection.family if detection else None, elsewhere is not None)
    if encoded:
        yield from _data_problems(job, encoded, detection)
    if detection:
        yield from _block_problems(job)
        yield from _expert_problems(job, detection)
    if detection and job.previews.every_steps:
        yield from _preview_problems(job, detection, encoded)


def _hardware(job: Job) -> Hardware | None:
    """What the job runs on; None: it is not there, which is a problem of its own."""
    try:
        return Hardware.of(pick_device(job))
    except JobError:
        return None


def _quietly(job: Job) -> tuple[Checkpoint | None, Detection | None]:
    """The base's header and what it is; None where that cannot be read, which is said when the job is handed over."""
    with suppress(VideoTrainerError):
        base = Checkpoint.open(job.base.transformer)
        return base, detect(base, job.base.variant)
    return None, None


def _hardware_problems(
    job: Job, started: bool, base: Checkpoint, family: Family, hardware: Hardware | None, is_elsewhere: bool = False
) -> Iterator[Problem]:
    """What of this model cannot be done on the hardware. A run that has `started` in a precision goes on in it."""
    if hardware is None:
        return
    if not started and (problem := precision_problem(job, family, hardware)):
        yield problem
    if not is_elsewhere and (problem := no_gpu_problem(job, base.parameters, base.path.name)):
        yield problem
    if hardware.kind == "mps":
        yield from _mps_problems(job, base)


def _mps_problems(job: Job, base: Checkpoint) -> Iterator[Problem]:
    """What Apple's GPU cannot hold, or has no use for."""
    if base.is_fp8:
        yield Problem(f"{base.path.name} is stored as fp8", "Apple's GPU has no fp8", "Give the bf16 or fp16 file of the model.")
    if job.memory.quantise != "none":
        value, remedy = f"memory.quantise is {job.memory.quantise}", 'Set it to "none".'
        yield Problem(value, "Apple's GPU has no fp8, and bitsandbytes no kernels for it", remedy)
    if job.memory.stream == "always":
        yield Problem("memory.stream is always", "nothing is streamed to Apple's GPU, whose memory is the machine's", 'Set it to "auto".')


def _dora_problems(job: Job, family: Family) -> Iterator[Problem]:
    if job.method == "full":
        return  # lora.dora is a problem of its own
    for path in filter(None, (job.base.transformer, job.base.transformer_low_noise)):
        with suppress(VideoTrainerError):
            if problem := dora_problem(Checkpoint.open(path), family, job.lora):
                yield problem


def _block_problems(job: Job) -> Iterator[Problem]:
    for path in filter(None, (job.base.transformer, job.base.transformer_low_noise)):
        with suppress(VideoTrainerError):
            if problem := block_problem(Checkpoint.open(path)):
                yield Problem(f"{Path(path).name}: {problem.value}", problem.rule, problem.remedy)


def _expert_problems(job: Job, detection: Detection) -> Iterator[Problem]:
    """What is wrong with the files of a model of two experts, or with a second file for a model of one."""
    low, train, title = job.base.transformer_low_noise, job.experts.train, detection.variant.title
    if detection.variant.boundary is None:
        if low:
            yield Problem(f"base.transformer_low_noise is {Path(low).name}", f"{title} has one transformer", "Leave it out.")
        return
    if low is None:
        if train == "both":
            which = detection.expert or "the one that base.transformer is (high or low)"
            remedy = f"Give base.transformer_low_noise too, or set experts.train to {which}."
            yield Problem("experts.train is both, and one file is given", f"{title} has two experts, each a file", remedy)
        elif detection.expert not in (None, train):
            value = f"experts.train is {train}, base.transformer is the {detection.expert}-noise expert by its name"
            yield Problem(value, "the file must be the expert that is trained", f"Use {detection.expert}, or the other file.")
        return
    try:
        other = detect(Checkpoint.open(low), detection.variant.id)
    except VideoTrainerError as error:
        yield from _problems("base.transformer_low_noise", error)
        return
    if Path(low) == Path(job.base.transformer):
        yield Problem("base.transformer and base.transformer_low_noise are one file", "each expert has its own", "Give both files.")
    elif detection.expert == "low" or other.expert == "high":
        value = f"base.transformer is {Path(job.base.transformer).name}, base.transformer_low_noise is {Path(low).name}"
        yield Problem(value, "the first is the high-noise expert, the second the low-noise one", "Exchange them.")


def _setting_problems(job: Job, started: bool, family: Family | None = None, is_elsewhere: bool = False) -> Iterator[Problem]:
    if problem := path_problem(job):
        yield problem
    yield from quantise_problems(job)
    yield from _memory_problems(job)
    checks: list[Callable[[], object]] = [lambda: check_optimizer(job), lambda: check_quantiser(job.memory.quantise)]
    if not is_elsewhere:
        yield from _compile_problems(job)
        checks += [lambda: pick_device(job), lambda: check_attention(job, family)]
    if not started:
        checks.append(lambda: _check_start(job, family))
    for attempt in checks:
        try:
            attempt()
        except VideoTrainerError as error:
            yield from _problems("", error)


def _memory_problems(job: Job) -> Iterator[Problem]:
    """What of memory.* this job cannot have."""
    memory = job.memory
    if memory.stream == "always" and job.lora.dora:
        rule = "DoRA measures every row of the base, so all of it stays on the device"
        yield Problem("memory.stream is always and lora.dora is true", rule, "Set memory.stream to auto, or lora.dora to false.")
    if job.gradient_checkpointing:
        return
    wanted = (
        ("activations", memory.activations, memory.activations == "host", "auto"),
        ("chunks", memory.chunks, memory.chunks is not None and memory.chunks > 1, "1"),
        ("stream", memory.stream, memory.stream == "always" and job.method == "lora", "auto"),
    )
    for field, value, needs_it, default in wanted:
        if needs_it:
            remedy = f"Set gradient_checkpointing to true, or memory.{field} to {default}."
            rule = "it needs blocks that are computed again in the backward pass"
            yield Problem(f"memory.{field} is {value} and gradient_checkpointing is false", rule, remedy)


def _compile_problems(job: Job) -> Iterator[Problem]:
    """Why blocks cannot be compiled here."""
    if not job.speed.compile:
        return
    if job.lora.dropout:
        rule = "a block is computed twice, and compiled it is not known to draw the same both times"
        yield Problem(f"speed.compile is true, lora.dropout is {job.lora.dropout:g}", rule, "Set one of them to its default.")
    on_card = job.device.startswith("cuda") or (job.device == "auto" and torch.cuda.is_available())
    if on_card and importlib.util.find_spec("triton") is None:
        remedy = "Install it (pip install triton; on Windows triton-windows), or set speed.compile to false."
        yield Problem("speed.compile is true", "compiling for a card needs the package triton", remedy)
    elif not on_card and not any(map(shutil.which, ("c++", "g++", "clang++", "cl"))):
        yield Problem("speed.compile is true", "compiling for a CPU needs a C++ compiler", "Install one, or set speed.compile to false.")


def _data_problems(job: Job, encoded: Encoded, detection: Detection | None) -> Iterator[Problem]:
    if detection and not _same_latents(encoded.variant, detection):
        yield Problem(
            f"the data set was encoded for {encoded.variant}, the base is {detection.variant.id}",
            "latents belong to one VAE",
            "Encode it again for this base.",
        )
    elif detection:
        yield from clip_problems(job, detection.family, detection.variant, encoded)
        yield from _text_problems(encoded, detection)
    yield from encoded.problems()
    if job.caption_dropout and "" not in encoded.prompts and not all(item.text_without_caption for item in encoded.items):
        yield Problem(f"caption_dropout is {job.caption_dropout}", 'the empty caption "" must be encoded', "Encode the data set again.")
    if not any(not item.held_out for item in encoded.items):
        yield Problem(
            "the data set has no clip to train on", "at least one clip must not be held out", "Add clips, or lower the held-out share."
        )


def _text_problems(encoded: Encoded, detection: Detection) -> Iterator[Problem]:
    keys = {item.text for item in encoded.items} | set(encoded.prompts.values())
    wanted, key = detection.family.text_width(detection.config), min(filter(encoded.cache.has_text, keys), default=None)
    if key and (width := encoded.cache.text_width(key)) != wanted:
        rule, remedy = f"{detection.variant.title} takes {wanted}", "Encode it again with the model's own text encoder."
        yield Problem(f"the captions were encoded as rows {width} wide", rule, remedy)


def _same_latents(variant_id: str, detection: Detection) -> bool:
    """Whether latents made for a variant are those of the detected one; a variant that is not known here has others."""
    try:
        family, variant = family_of(variant_id)
    except VideoTrainerError:
        return False
    if family is not detection.family or family.latent(variant) != family.latent(detection.variant):
        return False
    return variant == detection.variant or any(vae.fits(variant) and vae.fits(detection.variant) for vae in family.vaes)


def _preview_problems(job: Job, detection: Detection, encoded: Encoded | None) -> Iterator[Problem]:
    spec = job.previews
    if not spec.prompts:
        yield Problem(
            f"previews.every_steps is {spec.every_steps}", "previews need prompts", "Give previews.prompts, or set every_steps to 0."
        )
    if job.base.vae is None:
        yield Problem("base.vae is missing", "previews must be decoded", "Give base.vae, or set previews.every_steps to 0.")
    else:
        try:
            detect_vae(Checkpoint.open(job.base.vae, "vae"), detection.family, detection.variant)
        except VideoTrainerError as error:
            yield from _problems("base.vae", error)
    yield from detection.family.latent(detection.variant).problems(spec.num_frames, spec.height, spec.width)
    if spec.clip_folder is not None:
        yield from find_clip_problems("previews.clip_folder", Path(spec.clip_folder))
    yield from preview_problems(job, detection.family, detection.variant, encoded)


def _check_start(job: Job, family: Family | None) -> None:
    if job.start.extends:
        other, step = extended_run(job)
        problems = [
            Problem(f"{name} is {mine}, in {other.name} it is {theirs}", "extends goes on exactly", f"Use {theirs}, or {_afresh(job)}.")
            for name, mine, theirs in _same_in_both(job, other.job)
            if mine != theirs
        ]
        if job.steps is not None and job.steps <= step:
            problems.append(Problem(f"steps is {job.steps}", f"{step} of them are done", f"Use more than {step}."))
        if problems:
            raise JobError(problems)
    if job.start.initial_lora and job.method == "lora":
        _check_initial(job.lora, Path(job.start.initial_lora), family)


def _afresh(job: Job) -> str:
    """How a new run begins with what another one has learnt."""
    return "start.initial_lora" if job.method == "lora" else "that run's model as base.transformer"


def _check_initial(spec: LoraSpec, path: Path, family: Family | None) -> None:
    """Raises LoraError or JobError unless a job can begin with the LoRA."""
    found = describe(path, family)
    if found.kind not in ("LoRA", "DoRA") or found.also:
        what = f"{path.name} is {' with '.join([found.kind, *found.also])}"
        raise JobError(Problem(what, "a run begins with a plain LoRA or DoRA", "Use another file."))
    problems = []
    if found.ranks != (spec.rank,):
        ranks = " and ".join(map(str, found.ranks))
        problems.append(Problem(f"lora.rank is {spec.rank}", f"{path.name} has rank {ranks}, and a run goes on with it", f"Use {ranks}."))
    if found.kind == "DoRA" and not spec.dora:
        problems.append(Problem("lora.dora is false", f"{path.name} is a DoRA, and a run goes on with it", "Set lora.dora to true."))
    if problems:
        raise JobError(problems)


def _same_in_both(job: Job, other: Job) -> list[tuple[str, object, object]]:
    """(name, here, there) of what must not change when a run goes on exactly."""
    return [
        ("method", job.method, other.method),
        *([("precision", job.precision, other.precision)] if job.method == "full" else []),
        ("lora.rank", job.lora.rank, other.lora.rank),
        ("lora.alpha", job.lora.alpha, other.lora.alpha),
        ("lora.targets", job.lora.targets, other.lora.targets),
        ("experts.train", job.experts.train, other.experts.train),
        ("experts.turn_steps", job.experts.turn_steps, other.experts.turn_steps),
        ("lora.dora", job.lora.dora, other.lora.dora),
        ("optimizer.kind", job.optimizer.kind, other.optimizer.kind),
        ("batch_size", job.batch_size, other.batch_size),
        ("accumulation", job.accumulation, other.accumulation),
        ("seed", job.seed, other.seed),
    ]


def extended_run(job: Job) -> tuple[Run, int]:
    """The run and the step that `start.extends` names. Raises JobError when the checkpoint is not there."""
    assert job.start.extends is not None
    value, remedy = f"start.extends is {job.start.extends!r}", f"Use a checkpoint that is there, or {_afresh(job)}."
    name, _, step = job.start.extends.rpartition("@")
    if not name or not step.isdigit():
        raise JobError(Problem(value, "it must be RUN@STEP", "Write it as in my-run@500."))
    try:
        other = find_run(Path(job.runs_folder), name)
    except RunError as error:
        raise JobError(Problem(value, f"the run must be there ({error})", remedy)) from None
    if int(step) not in other.checkpoints():
        there = ", ".join(str(s) for s in other.checkpoints()) or "none"
        raise JobError(Problem(value, f"that run keeps checkpoints of steps {there}", remedy))
    return other, int(step)


def _problems(field: str, error: VideoTrainerError) -> list[Problem]:
    if isinstance(error, ProblemsError):
        return list(error.problems)
    told = re.fullmatch(r"(.*?); (.*?)\. (.*)", str(error), re.DOTALL)
    if told:
        return [Problem(f"{field}: {told[1]}" if field else told[1], told[2], told[3])]
    return [Problem(f"{field}: {error}" if field else str(error), "it must be usable", "Fix it and try again.")]
