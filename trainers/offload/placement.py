"""Which blocks stay on the device, and which come through a ring of slots, when their weights may take so many bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

SLOTS = 2
"""Blocks on the device at once of those that are streamed: one computes while the next arrives."""


@dataclass(frozen=True)
class Placement:
    """`resident` blocks stay on the device; `streamed` ones, in their order, share `slots` places of `slot_bytes` there."""

    resident: frozenset[int]
    streamed: tuple[int, ...]
    slots: int
    slot_bytes: int
    device_bytes: int
    """What both take together."""

    @property
    def copied_per_way(self) -> int:
        """Blocks copied to the device on one way through all of them, forward or back: the last ones of the other way are there."""
        return len(self.streamed) - self.slots


def place(block_bytes: Sequence[int], budget_bytes: int | None, slots: int = SLOTS) -> Placement:
    """The placement that streams the fewest blocks of the given sizes within the budget (None: no limit).

    Streamed blocks lie evenly among the others, so that each copy has as much computing as any other to hide behind. When
    nothing fits, the smallest placement there is, one slot through which all blocks go: compare `device_bytes`.
    """
    count = len(block_bytes)
    ways = [(streamed, slots) for streamed in range(count + 1)] + [(count, ring) for ring in range(slots - 1, 0, -1)]
    placements = [found for way in ways if (found := _placed(block_bytes, *way))]
    fitting = (found for found in placements if budget_bytes is None or found.device_bytes <= budget_bytes)
    return next(fitting, placements[-1])


def _placed(block_bytes: Sequence[int], count: int, slots: int) -> Placement | None:
    """`count` blocks streamed through `slots`; None where as many slots as blocks would save nothing."""
    if 0 < count <= slots:
        return None
    streamed = tuple((2 * i + 1) * len(block_bytes) // (2 * count) for i in range(count))
    resident = frozenset(range(len(block_bytes))) - set(streamed)
    slot_bytes = max((block_bytes[i] for i in streamed), default=0)
    ring = slots if streamed else 0
    return Placement(resident, streamed, ring, slot_bytes, sum(block_bytes[i] for i in resident) + ring * slot_bytes)
