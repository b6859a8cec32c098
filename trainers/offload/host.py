"""Where streamed weights wait in host memory, and how a block of them gets to the device: always in one copy.

    pinned   every block is copied once into pinned memory of its own: the card fetches it from there
    mapped   blocks stay in the mapped file; a thread gathers each into one of two pinned staging buffers first

Nothing is ever written back: the weights do not change.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal, Protocol

import torch

from .copies import Copies, use_device
from .layout import BlockLayout, Flat
from .pinned import Buffer, buffers, tell

STAGING_BUFFERS = 2
STAGING_LIMIT_BYTES = 2 << 30


class Master(Protocol):
    """The streamed blocks in host memory."""

    private_bytes: int
    """Memory of its own, beside mapped files."""

    def send(self, block: int, target: torch.Tensor, after: Any) -> Callable[[], Any]:
        """Queues the copy of a block into `target` after a mark; asked, the result waits until it is queued and gives its end."""

    def close(self) -> None:
        """Gives its memory back."""


def master_of(
    kind: Literal["mapped", "pinned"], layouts: Sequence[BlockLayout], streamed: Sequence[int], copies: Copies, device: torch.device
) -> Master:
    """The master of the `streamed` blocks. A system that lets too little memory be pinned gets "mapped", which is told."""
    if kind == "pinned":
        try:
            return PinnedMaster({block: layouts[block] for block in streamed}, copies, device)
        except (RuntimeError, MemoryError) as error:
            tell(f"{error} Streamed blocks wait in the mapped file.")
    return MappedMaster({block: layouts[block] for block in streamed}, copies, device)


class PinnedMaster:
    """A pinned copy of every block."""

    def __init__(self, layouts: dict[int, BlockLayout], copies: Copies, device: torch.device) -> None:
        """Raises PinningError when not all of them can be pinned, RuntimeError or MemoryError when there is no such memory."""
        self._copies = copies
        self._layouts = layouts
        self._buffers: dict[int, Buffer] = {}
        self.private_bytes = 0
        try:
            for block, layout in layouts.items():
                self._buffers[block] = Buffer(layout.nbytes, device)
                layout.write(self._buffers[block].bytes)
                self.private_bytes += layout.nbytes
        except (RuntimeError, MemoryError):
            self.close()
            raise

    def send(self, block: int, target: torch.Tensor, after: Any) -> Callable[[], Any]:
        end = self._copies.copy(target[: self._layouts[block].nbytes], self._buffers[block].bytes, after)
        return lambda: end

    def close(self) -> None:
        for buffer in self._buffers.values():
            buffer.close()
        self._buffers.clear()
        self.private_bytes = 0


class MappedMaster:
    """Blocks in the mapped file, gathered by a thread: it waits for the disk and for buffers, the trainer does not."""

    def __init__(self, layouts: Mapping[int, Flat], copies: Copies, device: torch.device) -> None:
        self._copies = copies
        self._layouts = layouts
        largest = max((layout.nbytes for layout in layouts.values()), default=0)
        count = STAGING_BUFFERS if STAGING_BUFFERS * largest <= STAGING_LIMIT_BYTES else 1
        self._free: deque[tuple[Buffer, Any]] = deque((buffer, None) for buffer in buffers(largest, count, device))
        self._thread = ThreadPoolExecutor(1, "video-trainer-weights", initializer=use_device, initargs=(device,))
        self.private_bytes = count * largest

    def send(self, block: int, target: torch.Tensor, after: Any) -> Callable[[], Any]:
        queued: Future[Any] = self._thread.submit(self._send, block, target, after)
        return queued.result

    def _send(self, block: int, target: torch.Tensor, after: Any) -> Any:
        layout = self._layouts[block]
        buffer, last = self._free.popleft()
        try:
            if last is not None:
                self._copies.finish(last)
            layout.write(buffer.bytes)
            last = self._copies.copy(target[: layout.nbytes], buffer.bytes[: layout.nbytes], after)
        finally:
            self._free.append((buffer, last))
        return last

    def close(self) -> None:
        self._thread.shutdown()
        for buffer, last in self._free:
            if last is not None:
                self._copies.finish(last)
            buffer.close()
        self._free.clear()
        self.private_bytes = 0
