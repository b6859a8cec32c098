"""Which clips a step sees: a function of (seed, step), so that a resume needs only the step's number.

An epoch is every training clip, repeats counted, in micro-batches of one bucket (equal latent shape). The micro-batches
of all epochs form one endless row; a step takes the next `accumulation` of them.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch

from ..flow import generator


@dataclass(frozen=True)
class MicroBatch:
    """Indices of the clips of one forward pass; `first` is the first one's index in the step's global batch."""

    clips: tuple[int, ...]
    first: int
    epoch: int


@dataclass(frozen=True, eq=False)
class Order:
    """The order of a run.

    `buckets[i]` is the bucket of clip i and `repeats[i]` how often an epoch shows it. `micro_per_step` is the job's accumulation.
    """

    buckets: Sequence[Hashable]
    repeats: Sequence[int]
    batch_size: int
    micro_per_step: int
    seed: int

    def step(self, step: int) -> list[MicroBatch]:
        """The micro-batches of `step` (counted from 1)."""
        assert step >= 1
        batches, first = [], 0
        for index in range((step - 1) * self.micro_per_step, step * self.micro_per_step):
            epoch, position = divmod(index, self.micro_per_epoch)
            clips = self._epoch(epoch)[position]
            batches.append(MicroBatch(clips, first, epoch))
            first += len(clips)
        return batches

    def steps(self, epochs: int) -> int:
        """How many steps show the data set `epochs` times."""
        return math.ceil(epochs * self.micro_per_epoch / self.micro_per_step)

    @cached_property
    def micro_per_epoch(self) -> int:
        return sum(math.ceil(len(members) / self.batch_size) for members in self._members.values())

    @cached_property
    def _members(self) -> dict[Hashable, list[int]]:
        members: dict[Hashable, list[int]] = defaultdict(list)
        for clip, (bucket, repeats) in enumerate(zip(self.buckets, self.repeats, strict=True)):
            members[bucket].extend([clip] * repeats)
        return members

    @cached_property
    def _epoch(self):  # type: ignore[no-untyped-def]  # an lru_cache of the method, one for each instance
        return lru_cache(maxsize=2)(self._shuffled_epoch)

    def _shuffled_epoch(self, epoch: int) -> list[tuple[int, ...]]:
        chance = generator(self.seed, "order", epoch)
        batches: list[tuple[int, ...]] = []
        for members in self._members.values():
            shuffled = [members[i] for i in torch.randperm(len(members), generator=chance).tolist()]
            batches.extend(tuple(shuffled[i : i + self.batch_size]) for i in range(0, len(shuffled), self.batch_size))
        return [batches[i] for i in torch.randperm(len(batches), generator=chance).tolist()]
