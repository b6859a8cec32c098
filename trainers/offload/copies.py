"""Copies beside the computing: on a card on a stream of their own, on the CPU at once.

Computing and copies are two queues. `mark` is a place in the queue of computing, `copy` puts a copy into the other one, which
begins after a mark; `wait` lets the computing that is queued from then on begin after a copy. Nothing here makes Python wait.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch


class Copies(Protocol):
    """A queue of copies."""

    def mark(self) -> Any:
        """The end of all computing that is queued so far."""

    def copy(self, target: torch.Tensor, source: torch.Tensor, after: Any) -> Any:
        """Copies `source` when the computing before the mark `after` (None: nothing) is done; the end of the copy."""

    def wait(self, end: Any) -> None:
        """What is computed from now on comes after the end of a copy."""

    def finish(self, end: Any) -> None:
        """Returns when a copy is done."""


class HostCopies:
    """Everything happens when it is asked for: for the CPU."""

    def mark(self) -> Any:
        return None

    def copy(self, target: torch.Tensor, source: torch.Tensor, after: Any) -> Any:
        target.copy_(source)

    def wait(self, end: Any) -> None:
        pass

    def finish(self, end: Any) -> None:
        pass


class CudaCopies:
    """Copies between host memory and a card, on one stream.

    Copies from and to memory that is not pinned keep the stream's order too, but Python waits in `copy`: until the bytes lie
    in the driver's own staging memory, or have come back from the card (cudaMemcpyAsync, CUDA's "API synchronization behavior").
    """

    def __init__(self, device: torch.device, flush: bool = sys.platform == "win32") -> None:
        """`flush`: Windows' driver collects launches and may hold back a copy until something asks for it. To ask costs little."""
        self._device, self._flush = device, flush
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def mark(self) -> torch.cuda.Event:
        return self._recorded(torch.cuda.current_stream(self._device))

    def copy(self, target: torch.Tensor, source: torch.Tensor, after: torch.cuda.Event | None) -> torch.cuda.Event:
        if after is not None:
            self._stream.wait_event(after)
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
            return self._recorded(self._stream)

    def wait(self, end: torch.cuda.Event) -> None:
        torch.cuda.current_stream(self._device).wait_event(end)

    def finish(self, end: torch.cuda.Event) -> None:
        end.synchronize()

    def _recorded(self, stream: Any) -> torch.cuda.Event:
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(stream)
        if self._flush:
            event.query()  # type: ignore[no-untyped-call]
        return event


def copies_of(device: torch.device) -> Copies:
    """A new queue of copies to and from a device."""
    return CudaCopies(device) if device.type == "cuda" else HostCopies()


def use_device(device: torch.device) -> None:
    """To be called first in a thread: a new thread's device is GPU 0, and using it costs a CUDA context (300 to 500 MiB) there."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


@contextmanager
def on_device(device: torch.device) -> Iterator[None]:
    """What is done within it computes on this GPU; the thread's own is left alone, where it was not used before, and kept."""
    if device.type != "cuda":
        yield
        return
    with torch.cuda.device(device):
        yield
