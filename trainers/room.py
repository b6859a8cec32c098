"""Room on the device: the largest sample is tried before the first step, and a step for which there is none is done again with less.

What is done again are the forward and backward passes: a function of (job, data, number of the step), they change nothing but
gradients. The optimizer's step comes after them, and is not repeated.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import cycle, islice
from typing import TYPE_CHECKING, TypeVar

import torch

from .data.order import MicroBatch
from .errors import RunError
from .family import IMAGE_TEXT
from .flow import derived_seed
from .job_memory import largest_size
from .memory_plan import OPTIMIZER_BYTES
from .memory_report import reasons
from .offload.arrangement import Arrangement
from .offload.placement import place
from .predict import batch_loss
from .residency import tighter

if TYPE_CHECKING:
    from .data.cache import Cache
    from .training import Training

Result = TypeVar("Result")

_GIB = 2**30
_MARGIN = 0.03
"""Of the budget: what is left free after the probe, for longer captions and the allocator's changing fragments."""

_LOOKED_AT = 1000
"""Clips whose captions are measured: the data set may have many thousands."""

_TOLD_BY_LIBRARIES = (
    "out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUSOLVER_STATUS_ALLOC_FAILED",
    "unable to find an engine to execute this computation",  # a convolution: PyTorch goes on when one engine has no memory, to this
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the device's memory is used up: PyTorch's own, or a library's that allocates by itself."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(told in str(error) for told in _TOLD_BY_LIBRARIES)


def with_room(training: Training, work: Callable[[], Result]) -> Result:
    """What `work` returns: done again, with less of the model on the device, as often as the device has no room for it.

    `work` must leave nothing behind when it is broken off but gradients, which are dropped. Raises RunError when the least
    there is does not fit.
    """
    return until_it_fits(work, lambda: _make_room(training))


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


def _make_room(training: Training) -> None:
    _drop_gradients(training)
    learner = training.learners[0]
    arrangement = tighter(learner.residency.arrangement, learner.residency.block_bytes, training.method.can_stream)
    if arrangement is None:
        raise RunError(
            f"Out of GPU memory at step {training.step}, and everything that can be offloaded already is. {training.run.what_is_kept()} "
            "Use smaller or shorter clips, a smaller batch_size, memory.quantise, or a larger GPU."
        )
    training.rearrange(arrangement)
    training.run.event(
        "memory", step=training.step, message=f"the device was full at step {training.step}: {told(training)}; the step is done again"
    )


def told(training: Training) -> str:
    """How the blocks are kept now, in words."""
    residency = training.learners[0].residency
    arrangement, placement = residency.arrangement, residency.placement
    blocks = len(residency.block_bytes)
    words = [f"{len(placement.resident)} of {blocks} blocks stay on the device" if placement.streamed else "all blocks stay on the device"]
    if residency.stream and arrangement.host == "pinned":
        words.append(f"{residency.stream.pinned_blocks} of {len(placement.streamed)} streamed blocks are pinned")
    if arrangement.activations == "host":
        words.append("their inputs wait in host memory")
    if arrangement.chunks > 1:
        words.append(f"all but attention runs in {arrangement.chunks} parts")
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
    training.run.event("memory", step=training.step, message=f"the largest sample takes {peak / _GIB:.1f}{limit} GiB; {told(training)}")


def unmade_bytes(training: Training) -> int:
    """What optimizers will take that have made no step yet."""
    waiting = [learner for learner in training.trained if not learner.optimizer.state]
    each = OPTIMIZER_BYTES[training.job.optimizer.kind]
    return int(each * sum(parameter.numel() for learner in waiting for parameter in learner.parameters))


def _corrected(training: Training, budget_bytes: int, peak_bytes: int) -> Arrangement | None:
    """More or fewer blocks on the device for what the plan had wrong; None: it was right to within a block."""
    residency = training.learners[0].residency
    arrangement, block_bytes = residency.arrangement, residency.block_bytes
    free = int(budget_bytes * (1 - _MARGIN)) - peak_bytes
    if not training.method.can_stream or not sum(block_bytes) or not arrangement.checkpointing:
        return None
    if training.job.memory.stream == "always":
        return None
    if arrangement.weights_bytes is None and peak_bytes <= budget_bytes:
        return None
    if -min(block_bytes) < free < max(block_bytes):
        return None
    now = place(block_bytes, arrangement.weights_bytes).device_bytes
    return replace(arrangement, weights_bytes=max(now + free, 0))


def _try_largest(training: Training, meter: Meter) -> None:
    """With accumulation twice: then the gradients of the pass before are there too."""
    meter.start()
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
