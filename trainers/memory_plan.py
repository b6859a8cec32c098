"""Chooses how a model is kept and run on a machine, and says what that takes and why.

Arrangements get a price, in bytes and in seconds; of those that fit, the quickest is taken, and of equals the one that copies
least. What is predicted is the most that PyTorch allocates at once (`torch.cuda.max_memory_allocated`); what of
the device stays free besides is `reserve_bytes`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Literal, Protocol

from .errors import Problem
from .job import Job, MemorySpec
from .machine import GIB, MIB, Machine, size_text
from .memory_trace import ModelBytes, StepShape, StepTrace, Work
from .offload.arrangement import Arrangement
from .offload.host import STAGING_BUFFERS, STAGING_LIMIT_BYTES
from .offload.placement import SLOTS, Placement, place

if TYPE_CHECKING:
    from .preview_memory import PreviewPlan

WORKSPACE_BYTES = 40 * MIB
"""cuBLAS keeps 32 MiB on Hopper and 8 elsewhere for its stream; a little more for index tensors and norms."""
ROUNDING = 0.06
"""Share of what comes and goes that the caching allocator cannot use again: sizes are rounded up (to 512 bytes, beyond 1 MiB to 2
MiB), and free pieces lie between others. A stated guess: it depends on the order of sizes, and needs a card to be measured."""
HOST_PROCESS_BYTES = 3 * GIB
"""What Python, PyTorch and CUDA's libraries take of the host for themselves."""
ATTENTION_EFFICIENCY = 0.6
"""Of the rate of a large matrix product: flash attention 2 reaches some 70 % forward and 55 % backward on an A100 (its table 1)."""
PRODUCT_EFFICIENCY = 0.85
"""Of the measured rate: products of a model are smaller than the measured one, and there is a LoRA of two thin ones beside each."""
NEARLY_EQUAL = 1.02
"""Arrangements within two percent of the quickest step count as equally quick."""
UNPINNED_SHARE = 0.25
"""Of the rate of copies from pinned memory: 3 to 6 GB/s against 12 to 25, through the driver's own staging memory."""
CHUNKS = (1, 2, 4, 8)


def optimizer_bytes(kind: str, numbers: int, byte_count: int) -> int:
    """What an optimizer's state takes for trained numbers that take `byte_count` themselves; those in bf16 and float32 may be mixed.

    adamw keeps two numbers more of their dtype, prodigy four; adamw8bit two of 8 bits with a scale for each 256 of them. adamw_kahan
    keeps two, and for a number in bf16 a third.
    """
    in_bf16 = max(4 * numbers - byte_count, 0) // 2
    found = {"adamw": 2 * byte_count, "adamw8bit": int(2.1 * numbers), "adamw_kahan": 2 * (byte_count + in_bf16), "prodigy": 4 * byte_count}
    return found[kind]


class Traced(Protocol):
    """Answers what a step takes, shape by shape and arrangement by arrangement. Where weights are does not matter to it."""

    @property
    def model(self) -> ModelBytes: ...

    @property
    def shape(self) -> StepShape:
        """The largest batch of the job."""

    def step(self, shape: StepShape, arrangement: Arrangement) -> StepTrace: ...


@dataclass(frozen=True)
class Price:
    """What an arrangement takes: bytes of the device and of the host's memory, and seconds.

    `device_bytes` is predicted to be allocated at the most: `weights_bytes` and `trained_bytes` (LoRA and optimizer) always, the
    rest while a step runs. `copy_seconds` go on beside `compute_seconds`, both of one forward and backward pass.
    """

    arrangement: Arrangement
    placement: Placement
    weights_bytes: int
    trained_bytes: int
    step_bytes: int
    host_bytes: int
    compute_seconds: float
    copy_seconds: float
    step_seconds: float
    unhindered_seconds: float
    """Of a step, if nothing had to be waited for."""
    pinned_blocks: int = 0
    """Streamed blocks that wait in pinned memory; the others wait in the mapped file."""

    @property
    def device_bytes(self) -> int:
        return self.weights_bytes + self.trained_bytes + self.step_bytes

    @property
    def reserve_bytes(self) -> int:
        """What must be free besides."""
        return WORKSPACE_BYTES + int(ROUNDING * self.step_bytes)

    def fits(self, machine: Machine) -> bool:
        return self.device_bytes + self.reserve_bytes <= machine.free_bytes and self.host_bytes <= machine.ram_bytes


@dataclass(frozen=True)
class MemoryPlan:
    """The arrangement of a run on a machine, and what it takes. `fits` False: it is the one that takes least, and too much."""

    job: Job
    machine: Machine
    model: ModelBytes
    price: Price
    fits: bool
    previews: PreviewPlan | None = None
    """What the job's previews take; None: there are none, or they were not looked at."""

    @property
    def arrangement(self) -> Arrangement:
        return self.price.arrangement


def choose(job: Job, traced: Traced, machine: Machine) -> MemoryPlan:
    """The quickest arrangement that fits; of those nearly as quick the one that copies least.

    What `memory.*` and `gradient_checkpointing` of the job say is kept to. When nothing fits, the plan of the least memory.
    """
    machine = machine.with_limits(job.memory.vram_gib, job.memory.ram_gib)
    prices: list[Price] = []
    for base in _arrangements(job, machine):
        prices += _placed(job, traced, machine, base)
        fitting = [price for price in prices if price.fits(machine)]
        if any(price.copy_seconds == 0 for price in fitting):
            break
        hidden = [price for price in fitting if price.step_seconds <= NEARLY_EQUAL * prices[0].unhindered_seconds]
        if hidden and (base.activations == "host" or job.memory.activations != "auto"):
            break  # to cut the sequence would only take longer
    if not fitting:
        least = min(prices, key=lambda price: max(price.device_bytes - machine.free_bytes, price.host_bytes - machine.ram_bytes))
        return MemoryPlan(job, machine, traced.model, least, fits=False)
    quickest = min(price.step_seconds for price in fitting)
    nearly = [price for price in fitting if price.step_seconds <= NEARLY_EQUAL * quickest]
    return MemoryPlan(job, machine, traced.model, min(nearly, key=lambda price: price.copy_seconds), fits=True)


def _arrangements(job: Job, machine: Machine) -> Iterator[Arrangement]:
    """Every way to run the blocks, what does least first; where their weights are is left open."""
    compiled = job.speed.compile
    if not job.gradient_checkpointing or (job.method == "full" and machine.device != "cuda"):
        yield Arrangement(checkpointing=job.gradient_checkpointing, compile=compiled)
        return
    on_card, spec = machine.device == "cuda", job.memory
    places: tuple[Literal["device", "host"], ...] = ("device", "host") if spec.activations == "auto" else (spec.activations,)
    for chunks in (CHUNKS if on_card else (1,)) if spec.chunks is None else (spec.chunks,):
        for activations in places if on_card or spec.activations != "auto" else ("device",):
            yield Arrangement(activations=activations, chunks=chunks, compile=compiled)


def _placed(job: Job, traced: Traced, machine: Machine, base: Arrangement) -> Iterator[Price]:
    """The arrangement with all weights on the device, or else with as few of them streamed as the device allows."""
    spec, blocks, step = job.memory, traced.model.blocks, traced.step(traced.shape, base)
    can_stream = base.checkpointing and sum(blocks) > 0 and (machine.device == "cuda" or spec.stream == "always")
    if spec.stream != "always" or not can_stream:
        resident = _priced(job, traced.model, machine, base, step)
        yield resident
        if not can_stream or spec.stream == "never" or resident.device_bytes + resident.reserve_bytes <= machine.free_bytes:
            return
    nothing = _priced(job, traced.model, machine, replace(base, weights_bytes=0), step)
    left = machine.free_bytes - nothing.device_bytes - nothing.reserve_bytes + nothing.placement.device_bytes
    budget = max(min(left, SLOTS * max(blocks)) if spec.stream == "always" else left, 0)
    streamed = replace(base, weights_bytes=budget)
    if spec.host != "auto":
        yield _priced(job, traced.model, machine, replace(streamed, host=spec.host), step)
        return
    inputs = step.inputs_bytes if base.activations == "host" else 0
    pinned = _within_limit(replace(streamed, host="pinned"), traced.model, machine, inputs)
    for arrangement in (pinned, streamed) if pinned else (streamed,):
        yield _priced(job, traced.model, machine, arrangement, step)


def _within_limit(arrangement: Arrangement, model: ModelBytes, machine: Machine, inputs_bytes: int) -> Arrangement | None:
    """The arrangement with as many blocks pinned as the machine allows beside inputs of blocks; None: not one."""
    if machine.pinnable_bytes is None:
        return arrangement
    placement, left = place(model.blocks, arrangement.weights_bytes), machine.pinnable_bytes - inputs_bytes
    if sum(model.blocks[index] for index in placement.streamed) <= left:
        return arrangement
    mixed = replace(arrangement, most_pinned_bytes=max(left - _staging_bytes(placement), 0))
    return mixed if _pinned(model, mixed, placement) else None


def _pinned(model: ModelBytes, arrangement: Arrangement, placement: Placement) -> list[int]:
    """The streamed blocks that are pinned: the first ones, as many as go."""
    if arrangement.host != "pinned":
        return []
    sizes = accumulate(model.blocks[index] for index in placement.streamed)
    most = arrangement.most_pinned_bytes
    return [index for index, total in zip(placement.streamed, sizes, strict=True) if most is None or total <= most]


def _staging_bytes(placement: Placement) -> int:
    return min(STAGING_BUFFERS * placement.slot_bytes, STAGING_LIMIT_BYTES) if placement.streamed else 0


def _priced(job: Job, model: ModelBytes, machine: Machine, arrangement: Arrangement, step: StepTrace) -> Price:
    placement = place(model.blocks, arrangement.weights_bytes)
    streamed = sum(model.blocks[index] for index in placement.streamed)
    on_host = arrangement.activations == "host"
    host = HOST_PROCESS_BYTES + model.parameter_bytes * model.trained + (step.inputs_bytes if on_host else 0)
    pinned = _pinned(model, arrangement, placement)
    pinned_bytes = sum(model.blocks[index] for index in pinned)
    host += pinned_bytes + (_staging_bytes(placement) if len(pinned) < len(placement.streamed) else 0)
    from_file = _mapped_rate(machine, model, host)
    way = 0.0
    if placement.streamed:
        share = pinned_bytes / streamed
        way = placement.copied_per_way * placement.slot_bytes * (share / machine.copy_rate + (1 - share) / from_file)
    inputs = _inputs_seconds(step.inputs_bytes, machine, job) if on_host else 0.0
    forward, backward = (_seconds(work, machine) for work in (step.forward, step.backward))
    side_by_side = max(forward, way, inputs) + max(backward, way + inputs)
    one_pass = forward + backward + 2 * way + inputs if placement.slots == 1 else side_by_side
    state = optimizer_bytes(job.optimizer.kind, model.parameters, model.parameter_bytes)
    updated = (16 * model.parameters + 2 * state) / machine.memory_rate
    read_anew = placement.device_bytes + model.beside + pinned_bytes
    change = read_anew / from_file / job.experts.turn_steps if model.trained > 1 else 0.0
    return Price(
        arrangement,
        placement,
        weights_bytes=placement.device_bytes + model.beside,
        trained_bytes=model.trained * (model.parameter_bytes + state),
        step_bytes=max(step.peak_bytes, model.parameter_bytes),
        host_bytes=host,
        compute_seconds=forward + backward,
        copy_seconds=2 * way + 2 * inputs,
        step_seconds=job.accumulation * one_pass + updated + change,
        unhindered_seconds=job.accumulation * (forward + backward) + updated + change,
        pinned_blocks=len(pinned),
    )


def _inputs_seconds(nbytes: int, machine: Machine, job: Job) -> float:
    """How long inputs of blocks take one way: what may not be pinned goes slower."""
    limited = machine.pinnable_bytes is not None and job.memory.host != "pinned"
    unpinned = max(nbytes - (machine.pinnable_bytes or 0), 0) if limited else 0
    return (nbytes - unpinned) / machine.copy_rate + unpinned / (UNPINNED_SHARE * machine.copy_rate)


def _mapped_rate(machine: Machine, model: ModelBytes, host_bytes: int) -> float:
    """Bytes per second at which weights come to the device from a file: one that is in memory, or else from the disk."""
    cached = host_bytes + sum(model.blocks) <= machine.ram_bytes
    return min(machine.copy_rate, machine.host_copy_rate if cached else machine.disk_rate)


def _seconds(work: Work, machine: Machine) -> float:
    """How long the device computes: matrix products, attention, and what only reads and writes memory, one after the other."""
    products = work.product_flops / (PRODUCT_EFFICIENCY * machine.flops_rate)
    attention = work.attention_flops / (ATTENTION_EFFICIENCY * machine.flops_rate)
    return products + attention + work.moved_bytes / machine.memory_rate


def too_large(plan: MemoryPlan, traced: Traced) -> Problem:
    """What is wrong when nothing fits, and what would: less of one thing at a time."""
    price, machine, job = plan.price, plan.machine, plan.job
    needed = price.device_bytes + price.reserve_bytes
    where = f"{machine.name} has {size_text(machine.free_bytes)} for it"
    if needed <= machine.free_bytes:
        needed, where = price.host_bytes, f"{size_text(machine.ram_bytes)} of the machine's memory are free"
    remedies = list(_remedies(plan, traced))
    remedy = f"Use {' or '.join(remedies)}." if remedies else "Use a smaller model, or a larger card."
    return Problem(f"the largest batch of {job.name} takes {size_text(needed)} at the least", where, remedy)


def _remedies(plan: MemoryPlan, traced: Traced) -> Iterator[str]:
    """Sentences' parts: each change alone makes it fit."""
    job, shape = plan.job, traced.shape

    base = replace(plan.arrangement, weights_bytes=None)

    def fits(smaller: StepShape = shape, model: ModelBytes = traced.model) -> bool:
        return any(price.fits(plan.machine) for price in _placed(job, _Other(traced, model, smaller), plan.machine, base))

    memory = MemorySpec(vram_gib=job.memory.vram_gib, ram_gib=job.memory.ram_gib, quantise=job.memory.quantise)
    relaxed = job.model_copy(update={"memory": memory, "gradient_checkpointing": True})
    if relaxed != job and choose(relaxed, traced, plan.machine).fits:
        yield "gradient_checkpointing = true and memory.* as the plan chooses"
        return
    if shape.batch_size > 1 and fits(replace(shape, batch_size=1)):
        yield "batch_size 1 with more accumulation"
    channels, frames, height, width = shape.latents_CFHW
    smaller_clips = [(channels, count, height, width) for count in _halves(frames)]
    if found := next((size for size in smaller_clips if fits(_of_size(shape, size))), None):
        yield f"clips of at most {found[1]} latent frames (now {frames})"
    smaller_pictures = [(channels, frames, int(height * by) // 2 * 2, int(width * by) // 2 * 2) for by in (0.75, 0.5, 0.35)]
    if found := next((size for size in smaller_pictures if min(size) > 1 and fits(_of_size(shape, size))), None):
        yield f"{found[2] / height:.0%} of the width and height"
    for how in _denser(plan):
        share = _PACKED_BYTES[how] * traced.model.block_weights / sum(traced.model.blocks)
        packed = tuple(int(share * size) for size in traced.model.blocks)
        if fits(model=replace(traced.model, blocks=packed)):
            yield f'memory.quantise = "{how}"'
            break
    if job.method == "lora" and job.lora.rank > 4 and fits(model=_smaller(traced.model, 4 / job.lora.rank)):
        yield "lora.rank 4"


_PACKED_BYTES = {"fp8": 1.0, "nf4": 0.5625}
"""Of each number, scales included."""


def _denser(plan: MemoryPlan) -> list[str]:
    """Ways to keep the blocks' weights in fewer bytes than now."""
    if plan.job.lora.dora or not plan.model.block_weights:
        return []
    now = sum(plan.model.blocks) / plan.model.block_weights
    return [how for how, size in _PACKED_BYTES.items() if size < 0.9 * now]


def _smaller(model: ModelBytes, share: float) -> ModelBytes:
    return replace(model, parameters=int(model.parameters * share), parameter_bytes=int(model.parameter_bytes * share))


def _halves(count: int) -> list[int]:
    """Smaller counts, down to 1."""
    return [value for value in (count * 3 // 4, count // 2, count // 4, 1) if 0 < value < count]


def _of_size(shape: StepShape, latents_CFHW: tuple[int, int, int, int]) -> StepShape:
    """The shape with other latents; what has the shape of latents changes with them."""
    extras = {
        kind: (size[0], min(size[1], latents_CFHW[1]), *latents_CFHW[2:]) if len(size) == 4 else size for kind, size in shape.extras.items()
    }
    return replace(shape, latents_CFHW=latents_CFHW, extras=extras)


@dataclass(frozen=True)
class _Other:
    """The same transformer with another largest batch, or other bytes."""

    traced: Traced
    model: ModelBytes
    shape: StepShape

    def step(self, shape: StepShape, arrangement: Arrangement) -> StepTrace:
        return self.traced.step(shape, arrangement)
