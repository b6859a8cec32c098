"""A queue of copies that does each at the worst moment a card could: for tests of order without a card.

What is computed here is computed at once, so a copy may come too late, too early, or over what is still in use:

    late    bytes arrive only when someone waits for them; until then the target holds 0xFF, not-a-number in every dtype
    early   a copy that begins after a mark is refused if its target was used after that mark
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch


class Adversary:
    """Copies for tests (see `trainers.offload.copies`)."""

    def __init__(self) -> None:
        self.clock = 0
        self.used: dict[int, int] = {}
        self.copied: list[tuple[str, int]] = []
        self.waiting: list[Callable[[], None]] = []
        self.lock = threading.RLock()

    def mark(self) -> int:
        self.clock += 1
        return self.clock

    def uses(self, memory: torch.Tensor) -> None:
        """The computing that is queued now reads or writes `memory`."""
        self.used[memory.untyped_storage().data_ptr()] = self.clock + 1

    def copy(self, target: torch.Tensor, source: torch.Tensor, after: int | None) -> Callable[[], None]:
        with self.lock:
            last_use = self.used.get(target.untyped_storage().data_ptr(), 0)
            assert last_use <= (after or 0), "a copy may write over what is still computed with"
            target.view(-1).view(torch.uint8).fill_(0xFF)
            done = False

            def end() -> None:
                nonlocal done
                with self.lock:
                    if done:
                        return
                    for earlier in self.waiting[: self.waiting.index(end)]:
                        earlier()
                    done = True
                    target.copy_(source)
                    self.waiting.remove(end)

            self.waiting.append(end)
            self.copied.append(("copy", target.nbytes))
            return end

    def wait(self, end: Callable[[], None]) -> None:
        end()

    def finish(self, end: Callable[[], None]) -> None:
        end()
