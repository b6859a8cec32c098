"""Host memory that a GPU copies from and to by itself, and how much of it a training may pin.

torch's own pinned tensors take up to twice their bytes (sizes are rounded up to powers of two), which for a model's weights
is too much: plain memory is registered with CUDA instead, in whole pages that nothing else lies in.
"""

from __future__ import annotations

import mmap
import warnings
import weakref
from collections.abc import Callable
from contextlib import suppress
from functools import cache

import torch

_PORTABLE = 1
"""cudaHostRegisterPortable: pinned for every GPU of the process, as ComfyUI registers its memory."""
PROBE_BYTES = 256 << 20


class PinningError(RuntimeError):
    """The system does not allow so much host memory to be pinned. The GPU is not full: what was to be pinned can stay unpinned."""


@cache
def warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=2)


class PinnedMemory:
    """All that one training pins for its device: at most `limit_bytes` in buffers (None: what the system allows).

    `report` gets each refusal once, in words for the user. It may be called from the thread that prepares batches.
    """

    def __init__(self, device: torch.device, limit_bytes: int | None = None, report: Callable[[str], None] = warn_once) -> None:
        self.device, self.limit_bytes = device, limit_bytes
        self.used_bytes = 0
        self._report = report
        self._reported: set[str] = set()
        self._batches_pinned = True

    def buffer(self, nbytes: int) -> Buffer:
        """A pinned buffer. Raises PinningError at the limit, or when the system refuses."""
        return Buffer(nbytes, self.device, self)

    def plain_buffer(self, nbytes: int) -> Buffer:
        """A buffer that is not pinned: copies from and to it are slower, and the host waits for them."""
        return Buffer(nbytes, self.device, plain=True)

    def pinned_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        """A pinned copy of a tensor of a batch, or after a refusal the tensor itself."""
        if self._batches_pinned:
            try:
                return pinned_copy(tensor, self.device)
            except PinningError as error:
                self._batches_pinned = False
                self.report(f"{error} Batches go to the GPU through memory that is not pinned, which is a little slower.")
        return tensor

    def report(self, message: str) -> None:
        """Reports a refusal, unless it was reported before."""
        if message not in self._reported:
            self._reported.add(message)
            self._report(message)

    def take(self, nbytes: int) -> None:
        """Counts `nbytes` that are about to be pinned. Raises PinningError when that is more than the limit."""
        if self.limit_bytes is not None and self.used_bytes + nbytes > self.limit_bytes:
            gib = self.limit_bytes / 2**30
            raise PinningError(f"Pinned memory is limited to {gib:.2f} GiB on this computer, and {nbytes / 2**30:.2f} GiB more do not fit.")
        self.used_bytes += nbytes

    def give_back(self, nbytes: int) -> None:
        self.used_bytes -= nbytes


class Buffer:
    """`nbytes` of host memory, `bytes` (uint8), pinned when it is for a GPU. `close` gives it back, and so does its collection."""

    def __init__(self, nbytes: int, device: torch.device, memory: PinnedMemory | None = None, *, plain: bool = False) -> None:
        """Raises PinningError when the system does not allow so much to be pinned. `memory` counts it, `plain`: it is not pinned."""
        self.holds: object = None
        """What was written into it last, for whoever wants it again."""
        self.plain = plain
        self._pages = _pages(nbytes, device)
        self.bytes = self._pages[:nbytes]
        self._memory = memory
        self._leaked: weakref.finalize[..., Buffer] | None = None
        if nbytes and not plain:
            self._pin(device, memory)

    def close(self) -> None:
        """Every copy from and to it must be done."""
        pages, self._pages = self._pages, torch.empty(0, dtype=torch.uint8)
        self.bytes, self.holds = self._pages, None
        if self._leaked is not None and self._leaked.detach():
            _unpin(pages, self._memory)

    def _pin(self, device: torch.device, memory: PinnedMemory | None) -> None:
        if memory is not None:
            memory.take(self._pages.nbytes)
        try:
            registered = register(self._pages, device)
        except BaseException:
            if memory is not None:
                memory.give_back(self._pages.nbytes)
            raise
        if registered:  # pages that are freed while CUDA has them registered could never be pinned again
            self._leaked = weakref.finalize(self, _unpin_leaked, self._pages, memory, device)
            self._leaked.atexit = False
        elif memory is not None:
            memory.give_back(self._pages.nbytes)


def _unpin(pages: torch.Tensor, memory: PinnedMemory | None) -> None:
    if memory is not None:
        memory.give_back(pages.nbytes)
    unregister(pages)


def _unpin_leaked(pages: torch.Tensor, memory: PinnedMemory | None, device: torch.device) -> None:
    """Of a buffer that was never closed, on the way of an error: nobody knows whether its copies are done."""
    if device.type == "cuda":
        with suppress(RuntimeError):
            torch.cuda.synchronize(device)
    _unpin(pages, memory)


def register(pages: torch.Tensor, device: torch.device) -> bool:
    """Pins whole pages for a GPU; False: the device is none and needs nothing pinned. Raises PinningError."""
    if device.type != "cuda":
        return False
    failed = int(torch.cuda.cudart().cudaHostRegister(pages.data_ptr(), pages.nbytes, _PORTABLE))  # type: ignore[no-untyped-call]
    if failed:
        forget_error(device)
        raise PinningError(f"The system does not pin {pages.nbytes / 2**30:.2f} GiB more of host memory (CUDA error {failed}).")
    return True


def unregister(pages: torch.Tensor) -> None:
    torch.cuda.check_error(int(torch.cuda.cudart().cudaHostUnregister(pages.data_ptr())))  # type: ignore[no-untyped-call]


def pinned_copy(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy in torch's own pinned memory. Raises PinningError: torch reports a refusal in the same words as a full GPU."""
    try:
        return tensor.pin_memory()
    except RuntimeError as error:
        forget_error(device)
        raise PinningError(f"The system does not pin {tensor.nbytes / 2**20:.1f} MiB more of host memory.") from error


def give_back_pinned_cache(device: torch.device) -> None:
    """Gives back pinned memory that torch keeps for the next tensor of the same size, where nothing holds it any more."""
    if device.type == "cuda":
        torch._C._host_emptyCache()


def pinnable_bytes(device: torch.device, most_bytes: int) -> int:
    """How much can be pinned now, found by pinning pieces of 256 MiB and giving them back; no more than `most_bytes` are tried."""
    pieces: list[Buffer] = []
    try:
        while (len(pieces) + 1) * PROBE_BYTES <= most_bytes:
            pieces.append(Buffer(PROBE_BYTES, device))
    except (PinningError, MemoryError):
        pass
    finally:
        for piece in pieces:
            piece.close()
    return len(pieces) * PROBE_BYTES


def forget_error(device: torch.device) -> None:
    """Takes the error of a refused call, which CUDA returns once more to whoever launches or waits next.

    A refused registration can also come back later, when the GPU gets to it (ComfyUI found that): so this waits, too.
    """
    with suppress(RuntimeError):
        torch.zeros((), device=device).add_(1)
    with suppress(RuntimeError):
        torch.cuda.synchronize(device)


def _pages(nbytes: int, device: torch.device) -> torch.Tensor:
    """Whole pages of at least `nbytes`, as registered memory must be: two registered ranges cannot share a page."""
    if device.type == "meta":
        return torch.empty(nbytes, dtype=torch.uint8, device="meta")
    whole = -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = torch.empty(whole + mmap.PAGESIZE, dtype=torch.uint8)
    start = -memory.data_ptr() % mmap.PAGESIZE
    return memory[start : start + whole]
