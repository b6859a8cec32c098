"""What a training step takes of its device, found by running it: the real model, batch, loss and backward pass on the meta device.

No family is described here a second time. The transformer is loaded without its tensors' values, gets its LoRA, and answers for
the largest batch of the job while every storage is counted from its making to its end. What of a GPU this does not show: what
kernels allocate for themselves (cuBLAS, cuDNN), and fragmentation of the caching allocator. `memory_plan` reserves for these.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain, count
from typing import Any

import torch
from torch import nn

from .batches import Batch
from .card_kernels import AMPERE, Kernels, imitated
from .family import Conditions, Family, TextRecord, Variant
from .live_bytes import LiveBytes, allocated_bytes
from .offload.activations import Arena
from .offload.arrangement import Arrangement
from .offload.blocks import Blocks
from .offload.chunks import in_chunks, rest_at_ends
from .offload.copies import HostCopies
from .offload.layout import BlockLayout, frozen_linears
from .offload.linear import FrozenLinear
from .predict import batch_loss
from .residency import blocks_of
from .sample import Solver, sample_latents

_META = torch.device("meta")


@dataclass(frozen=True)
class StepShape:
    """The batch of one forward pass: latents (C, F, H, W) of a sample, and rows and widths of what it is conditioned on.

    `extras` are the shapes of what the variant requires besides latents, by kind. `first_frame`: samples keep their first frame.
    """

    latents_CFHW: tuple[int, int, int, int]
    batch_size: int
    text_rows: int
    text_width: int
    pooled_width: int | None = None
    extras: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    first_frame: bool = False

    def batch(self, family: Family, dtype: torch.dtype) -> Batch:
        """The batch, without values."""
        latents = torch.empty(self.batch_size, *self.latents_CFHW, device=_META)
        pooled = None if self.pooled_width is None else torch.empty(self.pooled_width, device=_META)
        record = TextRecord(torch.empty(self.text_rows, self.text_width, device=_META), pooled)
        tensors = {kind: torch.empty(self.batch_size, *shape, device=_META) for kind, shape in self.extras.items()}
        kept = torch.ones(self.batch_size, dtype=torch.bool, device=_META) if self.first_frame else None
        return Batch(
            latents,
            torch.empty_like(latents),
            torch.empty(self.batch_size, device=_META),
            family.collate_text([record] * self.batch_size, _META, dtype),
            Conditions(tensors, kept, torch.empty(self.batch_size, device=_META)),
        )


@dataclass(frozen=True)
class Work:
    """What is computed: operations of matrix products and of attention, and bytes that everything else reads and writes."""

    product_flops: float
    attention_flops: float
    moved_bytes: float

    def plus(self, other: Work, times: float) -> Work:
        return Work(
            self.product_flops + times * other.product_flops,
            self.attention_flops + times * other.attention_flops,
            self.moved_bytes + times * other.moved_bytes,
        )


@dataclass(frozen=True)
class StepTrace:
    """What a forward and a backward pass take beside weights and LoRA, their batch and the gradients included.

    `peak_bytes` is the most at any moment. `inputs_bytes` are the inputs of all blocks, which are kept with checkpointing (on the
    device, as a part of the peak, or on the host).
    """

    peak_bytes: int
    inputs_bytes: int
    forward: Work
    backward: Work

    def extended(self, base: StepTrace, more: StepTrace, times: int, kept: bool) -> StepTrace:
        """With `times` blocks more, where `more` has one more than `base`. `kept`: their inputs stay on the device."""
        inputs = more.inputs_bytes - base.inputs_bytes
        peak = max(more.peak_bytes - base.peak_bytes, inputs if kept else 0)
        return StepTrace(
            self.peak_bytes + times * peak,
            self.inputs_bytes + times * inputs,
            self.forward.plus(more.forward.plus(base.forward, -1), times),
            self.backward.plus(more.backward.plus(base.backward, -1), times),
        )


@dataclass(frozen=True)
class ModelBytes:
    """What a model takes without a step.

    `blocks` are the bytes of each block that can be streamed, `block_weights` how many numbers they stand for together,
    `beside` all else that is frozen; `adapters`, `parameters` and `parameter_bytes` the trained layers and numbers of one
    transformer (no adapters: all weights). `trained`:
    how many transformers of this kind take turns on the device (two experts), each with parameters of its own.
    """

    blocks: tuple[int, ...]
    block_weights: int
    beside: int
    adapters: int
    parameters: int
    parameter_bytes: int
    trained: int = 1


@dataclass(frozen=True)
class Traces:
    """What a Tracer found, by batch and arrangement."""

    steps: dict[str, StepTrace] = field(default_factory=dict)
    sampled: dict[str, int] = field(default_factory=dict)


class Tracer:
    """One transformer with its LoRA on the meta device, asked again and again.

    Of each list of blocks only a few are traced, the last one among them, and then one more: the blocks between the first and
    the last are alike, so each that is left out takes what that one took more. `whole` traces all of them.
    """

    def __init__(
        self,
        family: Family,
        variant: Variant,
        transformer: nn.Module,
        inject: Callable[[nn.Module], object],
        dtype: torch.dtype,
        *,
        kernels: Kernels = AMPERE,
        accumulation: int = 1,
        whole: bool = False,
        known: Traces | None = None,
    ) -> None:
        """`transformer` lies on the meta device, frozen, its Linears as they will be kept; `inject` makes what is trained of it.

        `dtype` is what it computes in; with `accumulation`, gradients of an earlier pass are there already. `known`: results of
        an earlier tracer of the very same, added to.
        """
        self._family, self._variant, self._transformer, self._dtype = family, variant, transformer.train(), dtype
        self._kernels, self._accumulation = kernels, accumulation
        self._lists = {name: list(transformer.get_submodule(name).children()) for name in family.blocks}
        self._whole = whole
        known = known or Traces()
        self._known, self._sampled = known.steps, known.sampled
        self.model = self._model(inject)

    def step(self, shape: StepShape, arrangement: Arrangement) -> StepTrace:
        """What a step of this batch takes when the blocks run so. Where their weights are does not matter here."""
        arrangement = replace(arrangement, weights_bytes=None)
        key = f"{shape} {arrangement}"
        if key not in self._known:
            self._known[key] = self._step(shape, arrangement)
        return self._known[key]

    def sampling_bytes(self, shape: StepShape, cfg: float, chunks: int) -> int:
        """The most that one video of this shape takes beside weights while it is sampled, with all but attention in so many parts.

        Nothing is kept for a backward pass: a few blocks stand for all.
        """
        key = f"{shape} {cfg != 1.0} {chunks}"
        if key not in self._sampled:
            self._keep_blocks({name: _FEW for name, blocks in self._lists.items() if len(blocks) > _FEW and not self._whole})
            both = (self._family, self._variant)
            self._sampled[key] = trace_sampling(
                *both, self._transformer, shape, cfg, self._dtype, Arrangement(chunks=chunks), self._kernels
            )
        return self._sampled[key]

    def _step(self, shape: StepShape, arrangement: Arrangement) -> StepTrace:
        few = _FEW_WITH_ARENA if arrangement.activations == "host" else _FEW
        left_out = {name: len(blocks) - few for name, blocks in self._lists.items() if len(blocks) > few + 1 and not self._whole}
        counts = dict.fromkeys(left_out, few)
        whole = base = self._trace(shape, arrangement, counts)
        kept = arrangement.checkpointing and arrangement.activations == "device"
        for name, times in left_out.items():
            whole = whole.extended(base, self._trace(shape, arrangement, counts | {name: few + 1}), times, kept)
        return whole

    def _trace(self, shape: StepShape, arrangement: Arrangement, counts: Mapping[str, int]) -> StepTrace:
        """With so many blocks of the lists that are named, and all of the others."""
        self._keep_blocks(counts)
        batch = shape.batch(self._family, self._dtype)
        return trace_step(self._family, self._variant, self._transformer, batch, arrangement, self._kernels, self._accumulation)

    def _keep_blocks(self, counts: Mapping[str, int]) -> None:
        for name, blocks in self._lists.items():
            kept = [*blocks[: counts[name] - 1], blocks[-1]] if name in counts else blocks
            setattr(self._transformer, name, nn.ModuleList(kept))

    def _model(self, inject: Callable[[nn.Module], object]) -> ModelBytes:
        """Injects what is trained into the whole transformer, and counts."""
        modules = [block for listed in self._lists.values() for block in listed]
        blocks = tuple(BlockLayout.of(block).nbytes for block in modules)
        weights = sum(linear.out_features * linear.in_features for block in modules for linear in frozen_linears(block))
        inject(self._transformer)
        rest_at_ends(self._transformer, modules, self._family.chunked)
        trained = list(_trained(self._transformer))
        frozen = sum(map(allocated_bytes, _frozen(self._transformer)))
        adapters = sum("lora_A" in name for name, _ in self._transformer.named_parameters())
        numbers = sum(parameter.numel() for parameter in trained)
        return ModelBytes(blocks, weights, frozen - sum(blocks), adapters, numbers, sum(map(allocated_bytes, trained)))


_FEW, _FEW_WITH_ARENA = 2, 5
"""Blocks of a list that are traced at the least. With inputs on the host some are on their way when a block runs, and it takes
a few blocks until as many leave as come."""


def trace_step(
    family: Family,
    variant: Variant,
    transformer: nn.Module,
    batch: Batch,
    arrangement: Arrangement,
    kernels: Kernels = AMPERE,
    accumulation: int = 1,
) -> StepTrace:
    """Runs one forward and backward pass of a transformer with its LoRA, both on the meta device, and counts.

    With `accumulation`, gradients of an earlier pass are there already.
    """
    trained = list(_trained(transformer))
    counter = LiveBytes("meta", chain(transformer.parameters(), _frozen(transformer), _tensors_of(batch)))

    def forward() -> torch.Tensor:
        with imitated(kernels, counter):
            return batch_loss(family, variant, transformer, batch)

    with _blocks_run(transformer, family, arrangement, lambda: imitated(kernels, counter)) as (blocks, inputs), counter:
        if blocks.arena is not None:
            forward()  # its buffers are there from the first step on
        _set_gradients(trained, accumulation > 1)
        counter.restart()
        loss = forward()
        before = Work(counter.flops, counter.attention_flops, counter.moved_bytes)
        loss.backward()  # type: ignore[no-untyped-call]
    after = Work(counter.flops, counter.attention_flops, counter.moved_bytes)
    there = [*_tensors_of(batch), *(trained if accumulation > 1 else ())]  # the second ones stand for gradients
    _set_gradients(trained, False)
    peak = counter.peak + sum(map(allocated_bytes, there))
    return StepTrace(peak, inputs.total() if arrangement.checkpointing else 0, before, after.plus(before, -1))


def trace_sampling(
    family: Family,
    variant: Variant,
    transformer: nn.Module,
    shape: StepShape,
    cfg: float,
    dtype: torch.dtype,
    arrangement: Arrangement,
    kernels: Kernels = AMPERE,
) -> int:
    """The most bytes that sampling one video takes beside the weights, of a solver's step with guidance `cfg`. Everything lies on meta.

    The `extras` of the shape are those of an image that the video starts from; none: from noise alone.
    """
    counter = LiveBytes("meta", chain(transformer.parameters(), _frozen(transformer)))
    with (
        torch.no_grad(),
        _blocks_run(transformer, family, arrangement, lambda: imitated(kernels, counter)),
        counter,
        imitated(kernels, counter),
    ):
        noise_BCFHW = torch.empty(1, *shape.latents_CFHW, device=_META)
        pooled = None if shape.pooled_width is None else torch.empty(shape.pooled_width, device=_META)
        record = TextRecord(torch.empty(shape.text_rows, shape.text_width, device=_META), pooled)
        tensors = {kind: torch.empty(1, *size, device=_META) for kind, size in shape.extras.items()}
        guidance = family.sampling(variant).guidance
        conditions = Conditions(tensors, torch.ones(1, dtype=torch.bool, device=_META) if tensors else None, guidance=guidance)
        transformer.eval()
        try:
            solver = Solver((1.0, 0.0), cfg)
            sample_latents(family, variant, lambda _: transformer, noise_BCFHW, [record], record, solver, dtype, conditions=conditions)
        finally:
            transformer.train()
    return counter.peak


def _set_gradients(trained: list[nn.Parameter], there: bool) -> None:
    for parameter in trained:
        parameter.grad = torch.empty_like(parameter) if there else None


class _Inputs:
    """Which storages each block gets: what only one of them gets is kept for its backward pass."""

    def __init__(self) -> None:
        self._of_block: dict[int, dict[int, int]] = {}
        self._numbers: dict[int, tuple[weakref.ref[torch.UntypedStorage], int]] = {}
        self._count = count()

    def noted(self, index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if index not in self._of_block:
                found = [tensor.untyped_storage() for tensor in _tensors_in((args, kwargs))]
                self._of_block[index] = {self._number(storage): storage.nbytes() for storage in found}
            return forward(*args, **kwargs)

        return run

    def _number(self, storage: torch.UntypedStorage) -> int:
        """The storage's own, which one that is made at its address later does not get: inputs may be gone by then."""
        known, number = self._numbers.get(storage._cdata, (None, 0))
        if known is None or known() is not storage:
            number = next(self._count)
            self._numbers[storage._cdata] = weakref.ref(storage), number
        return number

    def total(self) -> int:
        blocks = list(self._of_block.values())
        return sum(size for block in blocks for storage, size in block.items() if sum(storage in other for other in blocks) == 1)


@contextmanager
def _blocks_run(
    transformer: nn.Module, family: Family, arrangement: Arrangement, kernels: Callable[[], AbstractContextManager[None]]
) -> Iterator[tuple[Blocks, _Inputs]]:
    """The blocks run as arranged and within `kernels`, in the backward pass too; their inputs are noted."""
    modules, inputs = blocks_of(transformer, family), _Inputs()
    random = any(isinstance(module, nn.Dropout) and module.p > 0 for module in transformer.modules())
    in_chunks(modules, family.chunked, arrangement.chunks, random)
    for index, module in enumerate(modules):
        module.forward = inputs.noted(index, _within(kernels, module.forward))
    blocks = Blocks(modules, checkpointing=arrangement.checkpointing)
    blocks.arena = Arena(HostCopies(), _META) if arrangement.activations == "host" else None
    try:
        yield blocks, inputs
    finally:
        blocks.close()
        in_chunks(modules, family.chunked, 1)


def _within(kernels: Callable[[], AbstractContextManager[None]], forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        with kernels():
            return forward(*args, **kwargs)

    return run


def _frozen(module: nn.Module) -> Iterator[torch.Tensor]:
    """Every tensor that is not trained: parameters, buffers, and what lies beside stored weights."""
    for part in module.modules():
        yield from (tensor for tensor in part._parameters.values() if tensor is not None and not tensor.requires_grad)
        yield from (tensor for tensor in part._buffers.values() if tensor is not None)
        if isinstance(part, FrozenLinear):
            yield from (tensor for name, tensor in part.stored_tensors().items() if name != "weight")


def _trained(module: nn.Module) -> Iterator[nn.Parameter]:
    return (parameter for parameter in module.parameters() if parameter.requires_grad)


def _tensors_of(batch: Batch) -> Iterator[torch.Tensor]:
    return _tensors_in([vars(part) for part in (batch, batch.text, batch.conditions)])


def _tensors_in(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, tuple | list):
        yield from chain.from_iterable(map(_tensors_in, value))
    elif isinstance(value, Mapping):
        yield from chain.from_iterable(map(_tensors_in, value.values()))
