"""Blocks through a ring of slots on the device: each is there when it is computed, and the next one is on its way.

A training step goes through the blocks forward, then in reverse (each is computed again for its gradients), and the next step
forward again. What was used last is needed first after a turn, so it stays: with S slots and n streamed blocks a step copies
2 (n - S) blocks, all to the device, none back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any, Literal

import torch

from .copies import Copies
from .host import HostWeights, master_of
from .layout import BlockLayout, bind
from .placement import Placement

Way = Literal["forward", "turning", "backward"]
"""Forward with nothing after it (sampling), forward with a backward pass to come, and that."""


class Stream:
    """The streamed blocks of a transformer. `bytes_to_device` counts what was copied."""

    def __init__(
        self,
        layouts: Sequence[BlockLayout],
        placement: Placement,
        host: Literal["mapped", "pinned"],
        copies: Copies,
        device: torch.device,
        weights: HostWeights,
        most_pinned_bytes: int | None = None,
    ) -> None:
        """Takes the device's memory for the slots, and the host's for the master: `most_pinned_bytes` of it pinned blocks."""
        self._layouts, self._placement, self._copies = layouts, placement, copies
        # Slots first: when the GPU is full, that is known before gigabytes of host memory are copied and pinned.
        self._slots = [torch.empty(placement.slot_bytes, dtype=torch.uint8, device=device) for _ in range(placement.slots)]
        self._master = master_of(host, layouts, placement.streamed, copies, weights, most_pinned_bytes)
        self._holds: list[int | None] = [None] * placement.slots
        self._arrival: list[Callable[[], Any]] = [lambda: None] * placement.slots
        self._in_use: int | None = None
        self._released: list[Any] = [copies.mark()] * placement.slots
        self.bytes_to_device = 0
        for block in placement.streamed:
            bind(layouts[block].absent())

    @property
    def private_bytes(self) -> int:
        """Host memory of its own."""
        return self._master.private_bytes

    @property
    def pinned_blocks(self) -> int:
        """Streamed blocks with pinned memory of their own; the others come from the file."""
        return self._master.pinned_blocks

    def fetch(self, block: int, way: Way) -> None:
        """Makes a block's weights there for what is computed from now on, and sends for those that come next.

        The block that was fetched before is computed by then: its slot may be written over.
        """
        self._release()
        if block not in self._placement.resident:
            slot = self._slot_of(block)
            if slot is None:
                slot = self._send(block, {block})
            self._copies.wait(self._arrival[slot]())
            bind(self._layouts[block].views(self._slots[slot]))
            self._in_use = slot
        self._send_ahead(block, way)

    def close(self) -> None:
        """Gives all memory back; the Linears have the host's tensors again."""
        try:
            for arrival in self._arrival:
                with suppress(OSError, RuntimeError):  # of a block that could not be sent: nobody wants it any more
                    if (end := arrival()) is not None:
                        self._copies.wait(end)
                        self._copies.finish(end)
        finally:
            self._master.close()
            self._slots.clear()
            for block in self._placement.streamed:
                bind(self._layouts[block].on_host())

    def _release(self) -> None:
        """Lets the slot in use be written when what is queued so far is computed."""
        if self._in_use is not None:
            self._released[self._in_use] = self._copies.mark()
            self._in_use = None

    def _send_ahead(self, block: int, way: Way) -> None:
        """Fills the other slots with the blocks that are needed next."""
        wanted = [] if block in self._placement.resident else [block]
        for following in self._following(block, way):
            if len(wanted) == len(self._slots):
                break
            if following not in wanted:
                wanted.append(following)
        for following in wanted:
            if self._slot_of(following) is None:
                self._send(following, set(wanted))

    def _following(self, block: int, way: Way) -> Iterator[int]:
        """The streamed blocks in the order in which they are needed after `block`."""
        streamed = self._placement.streamed
        if way == "backward":
            yield from (other for other in reversed(streamed) if other < block)
        else:
            yield from (other for other in streamed if other > block)
        yield from reversed(streamed) if way == "turning" else streamed

    def _slot_of(self, block: int) -> int | None:
        return self._holds.index(block) if block in self._holds else None

    def _send(self, block: int, kept: set[int]) -> int:
        """Sends a block to a slot whose block is not in `kept`."""
        slot = next(slot for slot, held in enumerate(self._holds) if held not in kept)
        held = self._holds[slot]
        if held is not None:
            bind(self._layouts[held].absent())
        self._holds[slot] = block
        self._arrival[slot] = self._master.send(block, self._slots[slot], self._released[slot])
        self.bytes_to_device += self._layouts[block].nbytes
        return slot
