"""Where streamed weights wait in host memory, and how a block of them gets to the device: always in one copy.

    pinned   a block is copied once into pinned memory of its own: the GPU fetches it from there
    mapped   a block stays in the mapped file; a thread gathers it into one of two pinned staging buffers first

"pinned" pins as many blocks as may be pinned, and the others are staged. Nothing is ever written back: the weights do not
change. The buffers belong to the training: a transformer that leaves the device hands them to the next one.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any, Literal

import torch

from .copies import Copies, use_device
from .layout import BlockLayout, Flat
from .pinned import Buffer, PinnedMemory, PinningError

STAGING_BUFFERS = 2
STAGING_LIMIT_BYTES = 2 << 30
_TRIED_BLOCKS = 4


class HostWeights:
    """The buffers of a training's streamed weights. They are pinned once, and stay when transformers alternate or are rearranged."""

    def __init__(self, memory: PinnedMemory) -> None:
        self.memory = memory
        self.filling = Filling()
        self._idle: list[Buffer] = []

    def take_filled(self, layout: BlockLayout) -> Buffer | None:
        """An idle buffer that still holds a block."""
        found = next((buffer for buffer in self._idle if buffer.holds is layout), None)
        if found is not None:
            self._idle.remove(found)
        return found

    def take(self, nbytes: int) -> Buffer:
        """The smallest idle buffer that is large enough, or else a new one.

        Raises PinningError, or MemoryError or RuntimeError when there is no such memory.
        """
        if large := [buffer for buffer in self._idle if buffer.bytes.numel() >= nbytes]:
            found = min(large, key=lambda buffer: buffer.bytes.numel())
            self._idle.remove(found)
            return found
        try:
            return self.memory.buffer(nbytes)
        except (RuntimeError, MemoryError):
            if not self._idle:
                raise
            self.close_idle()
            return self.memory.buffer(nbytes)

    def put_back(self, buffer: Buffer) -> None:
        """Keeps a buffer for the next transformer. Every copy from it must be done."""
        if buffer.plain:
            buffer.close()
        else:
            self._idle.append(buffer)

    @property
    def idle_buffers(self) -> int:
        return len(self._idle)

    def close_idle(self) -> None:
        """Gives back the memory that nobody uses now."""
        with ExitStack() as closing:
            for buffer in self._idle:
                closing.callback(buffer.close)
            self._idle = []


class Filling:
    """Fills buffers by the quicker of two ways: reading from the model's file, or copying from its mapping.

    Where a file that is not in memory comes slowly page by page (Windows, WSL, network drives), reading it in one piece is
    several times as fast; of one that is in memory both are about equal. So both are timed, four blocks each by turns.
    """

    def __init__(self) -> None:
        self.from_file: bool | None = None
        """The way that was found quicker; None: both are being tried."""
        self._tried: dict[bool, list[float]] = {True: [], False: []}

    def fill(self, buffer: Buffer, layout: Flat) -> None:
        """Writes a block into a buffer that no copy uses."""
        from_file = layout.in_file and (len(self._tried[True]) <= len(self._tried[False]) if self.from_file is None else self.from_file)
        buffer.holds = None
        started = time.perf_counter()
        layout.write(buffer.bytes, from_file)
        if layout.in_file and self.from_file is None:
            self._note(from_file, (time.perf_counter() - started) / layout.nbytes)

    def _note(self, from_file: bool, seconds_per_byte: float) -> None:
        self._tried[from_file].append(seconds_per_byte)
        if min(map(len, self._tried.values())) == _TRIED_BLOCKS:
            self.from_file = sum(self._tried[True]) <= sum(self._tried[False])


class Master:
    """The streamed blocks of one transformer in host memory: `pinned_blocks` of them in buffers of their own, the others staged."""

    def __init__(
        self,
        kind: Literal["mapped", "pinned"],
        layouts: Mapping[int, BlockLayout],
        copies: Copies,
        weights: HostWeights,
        most_pinned_bytes: int | None = None,
    ) -> None:
        """`most_pinned_bytes` is what blocks may take of pinned memory (None: as much as is allowed). Reports a refusal."""
        self._layouts, self._copies, self._weights = layouts, copies, weights
        self._pinned: dict[int, Buffer] = {}
        self._staging: Staging | None = None
        with ExitStack() as undo:
            undo.callback(self.close)
            if kind == "pinned":
                self._pin(most_pinned_bytes)
            if staged := {block: layout for block, layout in layouts.items() if block not in self._pinned}:
                self._staging = Staging(staged, copies, weights)
            for block, buffer in self._pinned.items():
                if buffer.holds is not layouts[block]:
                    weights.filling.fill(buffer, layouts[block])
                    buffer.holds = layouts[block]
            undo.pop_all()

    @property
    def pinned_blocks(self) -> int:
        return len(self._pinned)

    @property
    def private_bytes(self) -> int:
        """Memory of its own, beside mapped files."""
        staging = self._staging.private_bytes if self._staging else 0
        return staging + sum(buffer.bytes.numel() for buffer in self._pinned.values())

    def send(self, block: int, target: torch.Tensor, after: Any) -> Callable[[], Any]:
        """Queues the copy of a block into `target` after a mark; asked, the result waits until it is queued and gives its end."""
        if block not in self._pinned:
            assert self._staging is not None, "a block is pinned or staged"
            return self._staging.send(block, target, after)
        nbytes = self._layouts[block].nbytes
        end = self._copies.copy(target[:nbytes], self._pinned[block].bytes[:nbytes], after)
        return lambda: end

    def close(self) -> None:
        """Hands its buffers on. Every copy from pinned blocks must be done."""
        pinned, self._pinned = self._pinned, {}
        staging, self._staging = self._staging, None
        with ExitStack() as closing:
            for buffer in pinned.values():
                closing.callback(self._weights.put_back, buffer)
            if staging is not None:
                closing.callback(staging.close)

    def _pin(self, most_bytes: int | None) -> None:
        """Takes buffers for as many blocks as go: those that are there already, then the first ones."""
        left = sum(layout.nbytes for layout in self._layouts.values()) if most_bytes is None else most_bytes
        for block, layout in self._layouts.items():
            if layout.nbytes <= left and (filled := self._weights.take_filled(layout)):
                self._pinned[block] = filled
                left -= layout.nbytes
        for block, layout in self._layouts.items():
            if block in self._pinned:
                continue
            if layout.nbytes > left:
                return  # as planned
            try:
                self._pinned[block] = self._weights.take(layout.nbytes)
            except (RuntimeError, MemoryError) as error:
                self._go_on_mixed(error)
                return
            left -= layout.nbytes

    def _go_on_mixed(self, error: Exception) -> None:
        """The last blocks make way for the staging buffers, through which the others come."""
        self._weights.close_idle()
        for _ in range(min(STAGING_BUFFERS, len(self._pinned))):
            self._weights.put_back(self._pinned.popitem()[1])
        reason = str(error) if isinstance(error, PinningError) else "There is no more host memory."
        self._weights.memory.report(
            f"{len(self._pinned)} of {len(self._layouts)} streamed blocks are pinned. {reason} The others are read from the model's "
            "file, which is slower. Close programs that use much RAM to pin more."
        )


class Staging:
    """Blocks in the mapped file, gathered by a thread: it waits for the disk and for buffers, the trainer does not."""

    def __init__(self, layouts: Mapping[int, Flat], copies: Copies, weights: HostWeights, least_bytes: int = 0) -> None:
        """`least_bytes` of each buffer: for whom it is handed on to."""
        self._layouts, self._copies, self._weights = layouts, copies, weights
        largest = max(least_bytes, *(layout.nbytes for layout in layouts.values()))
        count = staging_buffers(largest)
        self._free: deque[tuple[Buffer, Any]] = deque()
        with ExitStack() as undo:
            undo.callback(self._hand_on)
            for _ in range(count):
                self._free.append((self._buffer(largest), None))
            undo.pop_all()
        self._thread = ThreadPoolExecutor(1, "video-trainer-weights", initializer=use_device, initargs=(weights.memory.device,))
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
            self._weights.filling.fill(buffer, layout)
            last = self._copies.copy(target[: layout.nbytes], buffer.bytes[: layout.nbytes], after)
        finally:
            self._free.append((buffer, last))
        return last

    def close(self) -> None:
        self._thread.shutdown()
        self._hand_on()

    def _hand_on(self) -> None:
        with ExitStack() as closing:
            while self._free:
                buffer, last = self._free.pop()
                closing.callback(self._weights.put_back, buffer)
                if last is not None:
                    closing.callback(self._copies.finish, last)

    def _buffer(self, nbytes: int) -> Buffer:
        """Pinned, or where the system refuses a plain one."""
        try:
            return self._weights.take(nbytes)
        except PinningError as error:
            self._weights.memory.report(f"{error} Streamed blocks go through memory that is not pinned, which is slower.")
            return self._weights.memory.plain_buffer(nbytes)


def staging_buffers(largest_bytes: int) -> int:
    """How many staging buffers there are for blocks of at most so many bytes."""
    return STAGING_BUFFERS if STAGING_BUFFERS * largest_bytes <= STAGING_LIMIT_BYTES else 1


def master_of(
    kind: Literal["mapped", "pinned"],
    layouts: Sequence[BlockLayout],
    streamed: Sequence[int],
    copies: Copies,
    weights: HostWeights,
    most_pinned_bytes: int | None = None,
) -> Master:
    """The master of the `streamed` blocks."""
    return Master(kind, {block: layouts[block] for block in streamed}, copies, weights, most_pinned_bytes)
