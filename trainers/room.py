"""Room on the device: the largest sample is tried before the first step, and a step for which there is none is done again with less.

What is done again are the forward and backward passes: a function of (job, data, number of the step), they change nothing but
gradients. The optimizer's step comes after them, and is not repeated.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import cycle, islice
from statistics import median
from typing import TYPE_CHECKING, TypeVar

import torch

from .data.order import MicroBatch
from .errors import Problem, RunError
from .family import IMAGE_TEXT
from .flow import derived_seed
from .job import Job
from .job_memory import largest_size
from .lora_keys import listed
from .memory_plan import optimizer_bytes
from .memory_report import reasons
from .offload.arrangement import Arrangement
from .offload.placement import place
from .predict import batch_loss
from .residency import tighter
from .shortage import GOOD_STEPS

if TYPE_CHECKING:
    from .data.cache import Cache
    from .training import Training

Result = TypeVar("Result")

_GIB = 2**30
_MARGIN = 0.03
"""Of the budget: what is left free after the probe, for longer captions and the allocator's changing fragments."""

MOST_WAITS = 60
FIRST_WAIT_SECONDS = 0.5

_LOOKED_AT = 1000
"""Clips whose captions are measured: the data set may have many thousands."""

_OUT_OF_MEMORY_MESSAGES = (
    "out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUSOLVER_STATUS_ALLOC_FAILED",
    "unable to find an engine to execute this computation",  # a convolution: PyTorch goes on when one engine has no memory, to this
)


_FREE_UNTIL_LOADED = "what is free when a run is planned must stay free until it is loaded"


class AskedToEnd(Exception):
    """The run was asked to pause or stop while it waited for GPU memory."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the device's memory is used up: PyTorch's own, or a library's that allocates by itself."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(message in str(error) for message in _OUT_OF_MEMORY_MESSAGES)


@contextmanager
def saying_what_is_full(device: torch.device, during: str = "the model was loaded", rule: str = _FREE_UNTIL_LOADED) -> Iterator[None]:
    """While nothing can be given up, as when a model is loaded: an error of a full device becomes a RunError."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        value = f"out of memory on {device} while {during}"
        if device.type == "cuda":
            free, total = torch.cuda.mem_get_info(device)
            value += f" ({free / _GIB:.1f} of {total / _GIB:.1f} GiB are free)"
        remedy = "Close other programs that use the GPU, or set a smaller memory.vram_gib, and start the run again; nothing was lost."
        raise RunError(str(Problem(value, rule, remedy))) from error


def with_room(training: Training, work: Callable[[], Result]) -> Result:
    """What `work` returns: done again, with less of the model on the device, as often as the device has no room for it.

    `work` must leave nothing behind when it is broken off but gradients, which are dropped. Raises RunError when the least
    there is does not fit, and AskedToEnd when the run is asked to pause or stop while it waits for memory.
    """
    waits = _waits(training.step)
    return until_it_fits(work, lambda: _make_room(training, waits))


def until_it_fits(work: Callable[[], Result], make_room: Callable[[], None]) -> Result:
    """What `work` returns: done again after `make_room` as often as the device is full. `make_room` raises what ends it."""
    full = False
    while True:
        try:
            if full:  # not in the except clause: until its end the error holds the tensors of the frames that it came through
                make_room()
            return work()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            full = True


def _make_room(training: Training, waits: Iterator[float]) -> None:
    """Keeps less on the device; when nothing more can be given up, waits for other programs, and in the end raises RunError."""
    _drop_gradients(training)
    residency, step = training.learners[0].residency, training.step
    arrangement = training.shortages.less(
        residency.arrangement, lambda now: tighter(now, residency.block_bytes, training.method.can_stream, kept_by(training.job)), step
    )
    if arrangement is None:
        _wait(training, next(waits, None))
        return
    training.rearrange(arrangement)
    again = (
        f"The previous settings are tried again in {GOOD_STEPS} steps"
        if training.shortages.will_go_back
        else "The run keeps these settings"
    )
    less = f"Out of GPU memory at step {step}. The step is repeated with less on the GPU: {describe_offload(training)}"
    message = ". ".join([less, *_not_kept(training), again])
    training.run.event("memory", step=step, message=message)


def _wait(training: Training, seconds: float | None) -> None:
    if seconds is None:
        raise RunError(
            f"Out of GPU memory at step {training.step}, and everything that can be offloaded already is. {training.run.what_is_kept()} "
            "Use smaller or shorter clips, a smaller batch_size, memory.quantise, or a larger GPU."
        )
    if training.asked_to_end():
        raise AskedToEnd
    if seconds == FIRST_WAIT_SECONDS:
        message = "Out of GPU memory, and everything that can be offloaded already is. Waiting for other programs to free memory."
        training.run.event("memory", step=training.step, message=message)
    time.sleep(seconds)
    if training.resident and not training.resident.residency.is_whole:
        training.rearrange(training.resident.residency.arrangement)


def _waits(step: int) -> Iterator[float]:
    """Seconds between attempts: half a minute in all before the first step, where a job may be too large, later 9 minutes."""
    for attempt in range(MOST_WAITS):
        yield FIRST_WAIT_SECONDS if not step else min(FIRST_WAIT_SECONDS * 1.12**attempt, 15.0)


def go_back(training: Training) -> None:
    """Between two steps: tries again what was used before the GPU was full, with the largest sample, when it is time."""
    since, now = training.shortages.step, training.learners[0].residency.arrangement
    before = training.shortages.again(now, training.step)
    if before is None:
        return
    waiting = [before]  # when the GPU is full again, what makes room takes its place

    def attempt() -> None:
        if waiting:
            training.rearrange(waiting.pop())
        _run_largest(training)

    with_room(training, attempt)
    _drop_gradients(training)
    if training.learners[0].residency.arrangement == before:
        cost = _seconds_lost(training, since)
        training.run.event(
            "memory", step=training.step, message=f"Back to the settings from before step {since}: {describe_offload(training)}{cost}"
        )


def _seconds_lost(training: Training, since: int) -> str:
    """What a step took before and after `since`, in words; nothing where no step was measured."""
    seconds = {line["step"]: line["seconds"] for line in training.run.read_metrics()}
    less = [taken for step, taken in seconds.items() if step > since]
    before = [taken for step, taken in seconds.items() if since - GOOD_STEPS <= step < since]
    if not (less and before):
        return ""
    return f"; with less on the GPU a step took {median(less):.3g} s, before {median(before):.3g} s"


def kept_by(job: Job) -> frozenset[str]:
    """The fields of an arrangement about which the job says something: they are given up last."""
    memory = job.memory
    said = {
        "checkpointing": not job.gradient_checkpointing,
        "activations": memory.activations != "auto",
        "weights_bytes": memory.stream == "never",
        "chunks": memory.chunks is not None,
    }
    return frozenset(field for field, given in said.items() if given)


def _not_kept(training: Training) -> list[str]:
    """Which settings of the job are not kept to, as a sentence; none: all are."""
    job, residency = training.job, training.learners[0].residency
    now, memory = residency.arrangement, job.memory
    broken = {
        "gradient_checkpointing = false": now.checkpointing and not job.gradient_checkpointing,
        'memory.activations = "device"': now.activations == "host" and memory.activations == "device",
        'memory.stream = "never"': bool(residency.placement.streamed) and memory.stream == "never",
        f"memory.chunks = {memory.chunks}": memory.chunks is not None and now.chunks != memory.chunks,
    }
    if not (names := [name for name, is_broken in broken.items() if is_broken]):
        return []
    return [f"{listed(names)} could not be applied: not enough GPU memory"]


def describe_offload(training: Training) -> str:
    """How the blocks are kept now, in words."""
    residency = training.learners[0].residency
    arrangement, placement = residency.arrangement, residency.placement
    blocks = len(residency.block_bytes)
    words = [f"{len(placement.resident)} of {blocks} blocks stay on the GPU" if placement.streamed else "all blocks stay on the GPU"]
    if residency.stream and arrangement.host == "pinned":
        words.append(f"{residency.stream.pinned_blocks} of {len(placement.streamed)} streamed blocks are pinned")
    if arrangement.activations == "host":
        words.append("their inputs are in host memory")
    if arrangement.chunks > 1:
        words.append(f"all but attention runs in {arrangement.chunks} chunks")
    return ", ".join(words)


def _drop_gradients(training: Training) -> None:
    for learner in training.trained:
        learner.optimizer.zero_grad(set_to_none=True)
    give_back(training.device)


def give_back(device: torch.device) -> None:
    """Lets the device have what nothing refers to any more."""
    if device.type == "cuda":
        with suppress(RuntimeError):
            torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


@dataclass(frozen=True)
class Meter:
    """What the device's memory was used for: for tests, another than the card's own."""

    start: Callable[[], None]
    peak_bytes: Callable[[], int]


def meter_of(device: torch.device) -> Meter | None:
    """The card's own; None for a device that counts nothing."""
    if device.type != "cuda":
        return None

    def start() -> None:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)

    return Meter(start, lambda: torch.cuda.max_memory_reserved(device))


def probe(training: Training, budget_bytes: int | None = None, meter: Meter | None = None) -> None:
    """Runs the largest sample forward and back, without learning from it, and corrects how much of the model stays on the device.

    `budget_bytes` None: the plan's. Nothing of the training changes by it: gradients are dropped, and every step seeds its
    draws anew. The run is told what was planned and what was found.
    """
    meter = meter or meter_of(training.device)
    if meter is None:
        return
    if training.plan is not None:
        budget_bytes = training.plan.machine.free_bytes if budget_bytes is None else budget_bytes
        planned = f"{training.plan.price.device_bytes / _GIB:.1f} GiB are planned."
        training.run.event("memory", step=training.step, message=" ".join([planned, *reasons(training.plan)]))
    with_room(training, lambda: _try_largest(training, meter))
    _drop_gradients(training)
    peak = meter.peak_bytes() + unmade_bytes(training)
    if budget_bytes is not None and (corrected := _corrected(training, budget_bytes, peak)):
        waiting = [corrected]  # tried once: if the device is full then, what makes room takes its place
        with_room(training, lambda: training.rearrange(waiting.pop()) if waiting else None)
        training.host.weights.close_idle()
    limit = f" of {budget_bytes / _GIB:.1f}" if budget_bytes is not None else ""
    message = ". ".join([f"the largest sample takes {peak / _GIB:.1f}{limit} GiB; {describe_offload(training)}", *_not_kept(training)])
    training.run.event("memory", step=training.step, message=message)


def unmade_bytes(training: Training) -> int:
    """What optimizers will take that have made no step yet."""
    waiting = [learner for learner in training.trained if not learner.optimizer.state]
    parameters = [parameter for learner in waiting for parameter in learner.parameters]
    numbers, byte_count = sum(parameter.numel() for parameter in parameters), sum(parameter.nbytes for parameter in parameters)
    return optimizer_bytes(training.job.optimizer.kind, numbers, byte_count)


def _corrected(training: Training, budget_bytes: int, peak_bytes: int) -> Arrangement | None:
    """More or fewer blocks on the device for what the plan had wrong, or what else takes less where the job wants all of them there.

    None: it was right to within a block.
    """
    residency = training.learners[0].residency
    arrangement, block_bytes = residency.arrangement, residency.block_bytes
    free = int(budget_bytes * (1 - _MARGIN)) - peak_bytes
    if not training.method.can_stream or not sum(block_bytes) or not arrangement.checkpointing:
        return None
    if training.job.memory.stream == "always":
        return None
    if arrangement.weights_bytes is None and peak_bytes <= budget_bytes:
        return None
    if training.job.memory.stream == "never" and free < 0:
        less = tighter(arrangement, block_bytes, kept=kept_by(training.job))
        return less if peak_bytes > budget_bytes else None
    if -min(block_bytes) < free < max(block_bytes):
        return None
    now = place(block_bytes, arrangement.weights_bytes).device_bytes
    return replace(arrangement, weights_bytes=max(now + free, 0))


def _try_largest(training: Training, meter: Meter) -> None:
    meter.start()
    _run_largest(training)


def _run_largest(training: Training) -> None:
    """With accumulation twice: then the gradients of the pass before are there too."""
    learner, _ = training.take_turn(max(training.step, 1))
    torch.manual_seed(derived_seed(training.job.seed, "probe"))
    batch = training.samples.batch(max(training.step, 1), largest(training), learner.sigmas).to(training.device)
    for _ in range(min(training.job.accumulation, 2)):
        loss = batch_loss(training.family, training.variant, learner.transformer, batch)
        training.accelerator.backward(loss)


def largest(training: Training) -> MicroBatch:
    """The largest micro-batch there is, with the longest captions of its size."""
    items, encoded = training.samples.items, training.encoded
    spec = training.family.latent(training.variant)
    size, count = largest_size(items, spec, training.job.batch_size)
    clips = [index for index, item in enumerate(items) if (item.num_frames, item.height, item.width) == size]
    clips = sorted(clips[:_LOOKED_AT], key=lambda index: _rows(encoded.cache, items[index].text), reverse=True)
    return MicroBatch(tuple(islice(cycle(clips), count)), 0, 0)


def _rows(cache: Cache, text: str) -> int:
    """How many rows an encoded caption has."""
    return cache.shapes(IMAGE_TEXT, text)["embeds_LD"][0]
