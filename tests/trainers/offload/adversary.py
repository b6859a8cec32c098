"""A queue of copies that does each at the worst moment a card could: for tests of order without a card.

What is computed here is computed at once, so a copy may come too late, too early, or over what is still in use:

    late    bytes arrive only when someone waits for them; until then the target holds 0xFF, not-a-number in every dtype
    early   a copy that begins after a mark is refused if its target or source was used after that mark; a `strict` queue
            refuses every mark but the newest
    freed   memory that is freed before its copy was waited for is an error: the next tensor may lie there
    host    on a card Python runs ahead, and `wait` only queues. Until a copy, or one queued after it, is `finish`ed, the host
            must not write or close its memory: `refuse_unfinished` says so of every queue (conftest.py asks it everywhere)
"""

from __future__ import annotations

import threading
import weakref

import torch
from torch.multiprocessing.reductions import StorageWeakRef


class Adversary:
    """Copies for tests (see `trainers.offload.copies`)."""

    def __init__(self, *, strict: bool = False) -> None:
        self.strict = strict
        self.clock = 0
        self.used: dict[int, int] = {}
        self.copied: list[tuple[str, int]] = []
        self.waiting: list[Pending] = []
        self.unfinished: list[Pending] = []
        self.lock = threading.RLock()
        _queues.add(self)

    def mark(self) -> int:
        with self.lock:
            self.refuse_freed()
            self.clock += 1
            return self.clock

    def uses(self, memory: torch.Tensor) -> None:
        """The computing that is queued now reads or writes `memory`."""
        self.used[_address(memory)] = self.clock + 1

    def copy(self, target: torch.Tensor, source: torch.Tensor, after: int | None) -> Pending:
        with self.lock:
            self.refuse_freed()
            for memory in (target, source):
                assert self.used.get(_address(memory), 0) <= (after or 0), "a copy may write over what is still computed with"
            assert not self.strict or after == self.clock > 0, "a copy may begin before its bytes are computed"
            target.view(-1).view(torch.uint8).fill_(0xFF)
            end = Pending(target, source)
            self.waiting.append(end)
            self.unfinished.append(end)
            self.copied.append(("copy", target.nbytes))
            return end

    def wait(self, end: Pending) -> None:
        with self.lock:
            self.refuse_freed()
            while end in self.waiting:
                self.waiting.pop(0).arrive()

    def finish(self, end: Pending) -> None:
        with self.lock:
            self.wait(end)
            while end in self.unfinished:
                self.unfinished.pop(0)

    def refuse_freed(self) -> None:
        freed = any(memory.freed for end in self.waiting for memory in (end.target, end.source))
        assert not freed, "memory was freed before its copy was waited for"


class Pending:
    """A copy that is queued. It keeps neither its target nor its source."""

    def __init__(self, target: torch.Tensor, source: torch.Tensor) -> None:
        self.target, self.source = Weak(target), Weak(source)

    def arrive(self) -> None:
        self.target.tensor().copy_(self.source.tensor())


class Weak:
    """A tensor whose memory may be freed meanwhile, whatever becomes of the Python object."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.address = _address(tensor)
        self._storage = StorageWeakRef(tensor.untyped_storage())
        self._dtype, self._view = tensor.dtype, (tensor.storage_offset(), tensor.shape, tensor.stride())

    @property
    def freed(self) -> bool:
        return self._storage.expired()

    def tensor(self) -> torch.Tensor:
        storage = torch.UntypedStorage._new_with_weak_ptr(self._storage.cdata)
        assert storage is not None, "memory was freed before its copy was waited for"
        return torch.empty(0, dtype=self._dtype).set_(storage, *self._view)


_queues: weakref.WeakSet[Adversary] = weakref.WeakSet()


def refuse_unfinished(memory: torch.Tensor) -> None:
    """The host is about to write or close `memory`: refused while any queue may still copy from or to it."""
    for queue in list(_queues):
        with queue.lock:
            pending = {copy.address for end in queue.unfinished for copy in (end.target, end.source) if not copy.freed}
            assert memory.numel() == 0 or _address(memory) not in pending, "the host touches memory of a copy that is not finished"


def _address(memory: torch.Tensor) -> int:
    return memory.untyped_storage().data_ptr()
