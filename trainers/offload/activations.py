"""The inputs of blocks, kept for the backward pass in pinned host memory instead of on the device.

One arena serves all transformers of a training, since one of them at a time is on the device.

The last block's input stays on the device: it would come straight back. The others are taken back in reverse: a stack. Each
of its levels has a buffer that is kept from step to step, so that memory is pinned once (as much as the largest sample needs,
which is why it should come first).
"""

from __future__ import annotations

from collections import deque
from contextlib import ExitStack
from typing import Any

import torch

from .copies import Copies
from .pinned import Buffer, PinnedMemory, PinningError

_LEAVING = 2
"""Tensors on their way to the host at once: a third one makes computing wait, rather than the device's memory fill up."""


class Arena:
    """A stack of tensors in host memory. `bytes_to_host` and `bytes_to_device` count what was copied."""

    def __init__(self, copies: Copies, device: torch.device, memory: PinnedMemory | None = None) -> None:
        """`memory` is what the training pins; None: the arena is alone."""
        self._copies, self._device, self._memory = copies, device, memory or PinnedMemory(device)
        self._buffers: list[Buffer] = []
        self._plain = False
        self._last: list[Any] = []
        self._kept: list[tuple[torch.Tensor, Any]] = []
        self._leaving: deque[tuple[torch.Tensor, Any]] = deque()
        self._coming: dict[int, tuple[torch.Tensor, Any]] = {}
        self.bytes_to_host = self.bytes_to_device = 0

    @property
    def private_bytes(self) -> int:
        """Host memory of its own."""
        return sum(buffer.bytes.numel() for buffer in self._buffers)

    def push(self, tensor: torch.Tensor) -> int:
        """Sends a tensor to the host; its level, by which `pop` asks for it. The caller drops the tensor."""
        level = len(self._kept)
        source = tensor.detach().contiguous()
        place = self._place(level, source)
        end = self._copies.copy(place, source, self._copies.mark())
        self._last[level] = end
        self._kept.append((place, end))
        self._leaving.append((source, end))
        self.bytes_to_host += source.nbytes
        while len(self._leaving) > _LEAVING:
            self._let_go()
        return level

    def pop(self, level: int) -> torch.Tensor:
        """The tensor of the highest level, on the device; the one below it is sent for."""
        assert level == len(self._kept) - 1, "tensors come back in reverse"
        self._let_all_go()
        tensor, end = self._coming.pop(level) if level in self._coming else self._send(level)
        self._copies.wait(end)
        self._kept.pop()
        if level:
            self._coming[level - 1] = self._send(level - 1)
        return tensor

    def turn(self) -> None:
        """Sends for the highest level: the backward pass begins with a block whose input stayed on the device."""
        self._let_all_go()
        if self._kept:
            top = len(self._kept) - 1
            self._coming[top] = self._send(top)

    def reset(self) -> None:
        """Forgets all tensors: a backward pass was broken off, or never came."""
        self._let_all_go()
        for _, end in self._coming.values():
            self._copies.wait(end)
        self._coming.clear()
        self._kept.clear()

    def close(self) -> None:
        """Gives the host's memory back, until there is something to keep again."""
        with ExitStack() as closing:
            closing.callback(self._last.clear)
            closing.callback(self._buffers.clear)
            for level in range(len(self._buffers)):
                closing.callback(self._close, level)
            self.reset()

    def _let_all_go(self) -> None:
        while self._leaving:
            self._let_go()

    def _let_go(self) -> None:
        """Frees the oldest tensor that left, for computing that comes after its copy."""
        _, end = self._leaving.popleft()
        self._copies.wait(end)

    def _send(self, level: int) -> tuple[torch.Tensor, Any]:
        place, _ = self._kept[level]
        target = torch.empty_like(place, device=self._device)
        self.bytes_to_device += target.nbytes
        self._last[level] = end = self._copies.copy(target, place, self._copies.mark())
        return target, end

    def _place(self, level: int, tensor: torch.Tensor) -> torch.Tensor:
        """The level's buffer, as a tensor of the same shape and dtype."""
        if level == len(self._buffers):
            self._buffers.append(self._buffer(tensor.nbytes))
            self._last.append(None)
        elif self._buffers[level].bytes.numel() < tensor.nbytes:
            self._close(level)
            self._buffers[level] = self._buffer(tensor.nbytes)
        return self._buffers[level].bytes[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)

    def _buffer(self, nbytes: int) -> Buffer:
        """Pinned, until the system refuses; what follows is plain memory then."""
        if not self._plain:
            try:
                return self._memory.buffer(nbytes)
            except PinningError as error:
                self._plain = True
                self._memory.report(f"{error} Inputs of blocks use memory that is not pinned, which is slower.")
        return self._memory.plain_buffer(nbytes)

    def _close(self, level: int) -> None:
        """Gives a level's memory back when the last copy from or to it is done: computing may be far behind."""
        try:
            if self._last[level] is not None:
                self._copies.finish(self._last[level])
                self._last[level] = None
        finally:
            self._buffers[level].close()
