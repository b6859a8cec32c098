"""Host memory that a card copies from and to by itself.

torch's own pinned tensors take up to twice their bytes (sizes are rounded up to powers of two), which for a model's weights
is too much: plain memory is registered with CUDA instead.
"""

from __future__ import annotations

from contextlib import suppress

import torch


class Buffer:
    """`nbytes` of host memory, `bytes` (uint8), pinned when it is for a card. `close` gives it back."""

    def __init__(self, nbytes: int, device: torch.device) -> None:
        """Raises RuntimeError when the system lets no such amount be pinned."""
        self.bytes = torch.empty(nbytes, dtype=torch.uint8, device="meta" if device.type == "meta" else "cpu")
        self._registered = False
        if device.type == "cuda" and nbytes > 0:
            failed = torch.cuda.cudart().cudaHostRegister(self.bytes.data_ptr(), nbytes, 0)  # type: ignore[no-untyped-call]
            if int(failed):
                with suppress(RuntimeError):
                    torch.zeros((), device=device)  # CUDA tells its last error once more, to whoever launches next
                raise RuntimeError(f"{nbytes / 2**30:.1f} GiB of host memory cannot be pinned (CUDA error {int(failed)}, out of memory)")
            self._registered = True

    def close(self) -> None:
        """Every copy from and to it must be done."""
        if self._registered:
            self._registered = False
            torch.cuda.check_error(int(torch.cuda.cudart().cudaHostUnregister(self.bytes.data_ptr())))  # type: ignore[no-untyped-call]
        self.bytes = torch.empty(0, dtype=torch.uint8)
