"""Host memory that a card copies from and to by itself.

torch's own pinned tensors take up to twice their bytes (sizes are rounded up to powers of two), which for a model's weights
is too much: plain memory is registered with CUDA instead, in whole pages that nothing else lies in.
"""

from __future__ import annotations

import mmap
import warnings
from contextlib import suppress
from functools import cache

import torch


class PinningError(RuntimeError):
    """The system lets no such amount of host memory be pinned. The card is not full: what waits in host memory can wait otherwise."""


class Buffer:
    """`nbytes` of host memory, `bytes` (uint8), pinned when it is for a card. `close` gives it back."""

    def __init__(self, nbytes: int, device: torch.device, *, plain: bool = False) -> None:
        """Raises PinningError when the system lets no such amount be pinned. `plain`: it is not, and copies are slower."""
        self._pages = _pages(nbytes, device)
        self.bytes = self._pages[:nbytes]
        self._registered = nbytes > 0 and not plain and register(self._pages, device)

    def close(self) -> None:
        """Every copy from and to it must be done."""
        if self._registered:
            self._registered = False
            unregister(self._pages)
        self._pages = self.bytes = torch.empty(0, dtype=torch.uint8)


def buffers(nbytes: int, count: int, device: torch.device) -> list[Buffer]:
    """`count` buffers: pinned, or plain ones where the system refuses, which is told."""
    made: list[Buffer] = []
    try:
        for _ in range(count):
            made.append(Buffer(nbytes, device))
    except PinningError as error:
        tell(f"{error} Copies go through memory that is not pinned, which is slower.")
    return made + [Buffer(nbytes, device, plain=True) for _ in range(count - len(made))]


@cache
def tell(message: str) -> None:
    """Warns of a refusal: once for the same message, however often experts take turns."""
    warnings.warn(message, stacklevel=2)


def register(pages: torch.Tensor, device: torch.device) -> bool:
    """Pins whole pages for a card; False: the device is none and needs nothing pinned. Raises PinningError."""
    if device.type != "cuda":
        return False
    failed = int(torch.cuda.cudart().cudaHostRegister(pages.data_ptr(), pages.nbytes, 0))  # type: ignore[no-untyped-call]
    if failed:
        _forget_error(device)
        raise PinningError(
            f"{pages.nbytes / 2**30:.2f} GiB more of host memory cannot be pinned (CUDA error {failed}): "
            f'lower memory.ram_gib, or set memory.host to "mapped".'
        )
    return True


def unregister(pages: torch.Tensor) -> None:
    torch.cuda.check_error(int(torch.cuda.cudart().cudaHostUnregister(pages.data_ptr())))  # type: ignore[no-untyped-call]


def _forget_error(device: torch.device) -> None:
    """CUDA tells its last error once more, to whoever launches next: here."""
    with suppress(RuntimeError):
        torch.zeros((), device=device)


def _pages(nbytes: int, device: torch.device) -> torch.Tensor:
    """Whole pages of at least `nbytes`, as registered memory must be: two registered ranges cannot share a page."""
    if device.type == "meta":
        return torch.empty(nbytes, dtype=torch.uint8, device="meta")
    whole = -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = torch.empty(whole + mmap.PAGESIZE, dtype=torch.uint8)
    start = -memory.data_ptr() % mmap.PAGESIZE
    return memory[start : start + whole]
