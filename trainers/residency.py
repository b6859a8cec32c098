"""The frozen tensors of a transformer: mapped in host memory always, on the device as an `Arrangement` says while it is resident.

Nothing is copied back, since nothing of it changes. Trained parameters are not touched: they stay where they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import chain

import torch
from torch import nn

from .family import Family
from .offload.activations import Arena
from .offload.arrangement import Arrangement
from .offload.blocks import Blocks
from .offload.chunks import in_chunks, rest_at_ends
from .offload.compiled import compiled
from .offload.copies import Copies, copies_of
from .offload.host import HostWeights
from .offload.layout import BlockLayout, bind, frozen_linears
from .offload.pinned import PinnedMemory, give_back_pinned_cache
from .offload.placement import Placement, place
from .offload.stream import Stream
from .offload.upload import in_runs, upload


def blocks_of(transformer: nn.Module, family: Family) -> list[nn.Module]:
    """The transformer's blocks in the order they run."""
    return [block for name in family.blocks for block in transformer.get_submodule(name).children()]


@dataclass(frozen=True)
class HostSide:
    """What the transformers of a training share, since one of them at a time is on the device: host memory, and the queue of copies
    that their weights come by.

    It takes no memory before there is something to keep.
    """

    memory: PinnedMemory
    arena: Arena
    weights: HostWeights
    copies: Copies

    @classmethod
    def of(cls, memory: PinnedMemory) -> HostSide:
        arena = Arena(copies_of(memory.device), memory.device, memory)
        return cls(memory, arena, HostWeights(memory), copies_of(memory.device))

    def close(self) -> None:
        """Gives all of it back; no transformer may be on the device."""
        with ExitStack() as closing:
            closing.callback(give_back_pinned_cache, self.memory.device)
            closing.callback(self.weights.close_idle)
            closing.callback(self.arena.close)


class Residency:
    """One transformer's place on the device.

    `enter` puts it there, `leave` gives the device's memory back, `rearrange` changes how it is kept. Until it entered it must
    not be asked. Blocks run as the arrangement says from the first moment.
    """

    def __init__(
        self,
        transformer: nn.Module,
        family: Family,
        device: torch.device,
        arrangement: Arrangement,
        *,
        random: bool = False,
        host: HostSide | None = None,
    ) -> None:
        """`transformer` lies on the CPU; what it holds now is frozen. `random`: it draws dropout in training.

        `host`: host memory that is shared with transformers that are not on the device at the same time; None: its own.
        """
        self._device = device
        self._modules = blocks_of(transformer, family)
        self._chunked = family.chunked
        self._random = random
        self._host = HostSide.of(PinnedMemory(device)) if host is None else host
        self._layouts = [BlockLayout.of(block) for block in self._modules]
        self._others = list(_others(transformer, self._modules))
        in_chunks(self._modules, self._chunked, arrangement.chunks, random)
        rest_at_ends(transformer, self._modules, self._chunked)
        self._blocks = Blocks(self._modules, random=random)
        if arrangement.compile:
            self._blocks.run_with([compiled(block) for block in self._modules])
        self._entered = False
        self.is_whole = True
        """False after an `enter` that failed half way, until the next one."""
        self.arrangement = arrangement
        self._apply()

    @property
    def block_bytes(self) -> list[int]:
        """Bytes of each block's weights as they are streamed."""
        return [layout.nbytes for layout in self._layouts]

    @property
    def placement(self) -> Placement:
        """Which blocks stay on the device."""
        return place(self.block_bytes, self.arrangement.weights_bytes)

    @property
    def stream(self) -> Stream | None:
        return self._blocks.stream

    @property
    def arena(self) -> Arena | None:
        return self._blocks.arena

    def enter(self) -> None:
        """Copies to the device what stays there, and makes the ring for the rest."""
        self._entered, self.is_whole = True, False
        placement, kept, weights, copies = self.placement, self.arrangement, self._host.weights, self._host.copies
        resident = [self._layouts[index] for index in sorted(placement.resident)]
        largest, had_buffers = max(self.block_bytes, default=0), weights.idle_buffers > 0
        others = in_runs((tensor for *_, tensor in self._others), largest)
        found = upload([*resident, *others], copies, weights, largest)
        for layout, tensors in zip(resident, found, strict=False):
            bind(layout.by_linear(tensors))
        _hold(self._others, chain.from_iterable(found[len(resident) :]))
        if not placement.streamed and not had_buffers:
            weights.close_idle()  # those that this took: nothing comes by them any more
        if placement.streamed:
            self._blocks.stream = Stream(self._layouts, placement, kept.host, copies, self._device, weights, kept.most_pinned_bytes)
        self.is_whole = True

    def leave(self) -> None:
        """Gives the device's memory back."""
        self._entered = False
        stream, self._blocks.stream = self._blocks.stream, None
        with ExitStack() as leaving:
            leaving.callback(self._back_on_host)
            if self._blocks.arena is not None:
                leaving.callback(self._blocks.arena.reset)
            if stream is not None:
                leaving.callback(stream.close)

    def rearrange(self, arrangement: Arrangement) -> None:
        """Keeps the transformer otherwise from now on; between two steps only."""
        entered = self._entered
        self.leave()
        self.arrangement = arrangement
        self._apply()
        if entered:
            self.enter()

    def _back_on_host(self) -> None:
        _hold(self._others, [tensor for *_, tensor in self._others])
        for layout in self._layouts:
            bind(layout.on_host())

    def _apply(self) -> None:
        """What of the arrangement does not depend on being on the device."""
        wanted = self.arrangement
        self._blocks.checkpointing = wanted.checkpointing
        in_chunks(self._modules, self._chunked, wanted.chunks, self._random)
        if wanted.activations == "device" and self._blocks.arena is not None:
            self._host.arena.close()
        self._blocks.arena = self._host.arena if wanted.activations == "host" else None


def tighter(
    arrangement: Arrangement, block_bytes: list[int], can_stream: bool = True, kept: frozenset[str] = frozenset()
) -> Arrangement | None:
    """An arrangement that takes less of the device, by what costs the least time; None: there is none.

    Fields in `kept` change only when no other can.
    """
    found = dict(_less_by_field(arrangement, block_bytes, can_stream))
    return next((less for field, less in found.items() if field not in kept), next(iter(found.values()), None))


def _less_by_field(arrangement: Arrangement, block_bytes: list[int], can_stream: bool) -> Iterator[tuple[str, Arrangement]]:
    """First the inputs of blocks go to the host, then a tenth of the weights at a time, then the sequence is cut."""
    if not arrangement.checkpointing:
        yield "checkpointing", replace(arrangement, checkpointing=True)
        return
    if arrangement.activations == "device":
        yield "activations", replace(arrangement, activations="host")
    placement = place(block_bytes, arrangement.weights_bytes)
    smallest = place(block_bytes, 0).device_bytes
    if can_stream and placement.device_bytes > smallest:
        less = max(placement.device_bytes - max(sum(block_bytes) // 10, max(block_bytes)), smallest)
        yield "weights_bytes", replace(arrangement, weights_bytes=less)
    if arrangement.chunks < MOST_CHUNKS:
        yield "chunks", replace(arrangement, chunks=2 * arrangement.chunks)


MOST_CHUNKS = 16

_Holder = tuple[nn.Module, str, torch.Tensor]


def _others(transformer: nn.Module, blocks: list[nn.Module]) -> Iterator[_Holder]:
    """(module, attribute, tensor) of every frozen parameter and buffer but the stored weights of the blocks' Linears."""
    streamed = {linear for block in blocks for linear in frozen_linears(block)}
    for module in transformer.modules():
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            if not tensor.requires_grad and not (module in streamed and name in module.stored_tensors()):
                yield module, name, tensor.data


def _hold(holders: list[_Holder], tensors: Iterable[torch.Tensor]) -> None:
    """Lets the modules hold these tensors in place of theirs."""
    for (holder, name, _), tensor in zip(holders, tensors, strict=True):
        is_parameter = isinstance(getattr(holder, name), nn.Parameter)
        setattr(holder, name, nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor)
