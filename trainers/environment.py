"""What this process says to libraries, and is told by its starter, through environment variables; nothing else reads them."""

from __future__ import annotations

import os
import socket
import sys


def go_offline() -> None:
    """The network is never used: call this before anything imports diffusers, transformers or huggingface_hub.

    Child processes inherit it.
    """
    socket.has_ipv6 = False  # or urllib3 opens one when it is imported, to find out
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", DO_NOT_TRACK="1")


def allow_determinism() -> None:
    """Call this before CUDA is used: cuBLAS repeats itself only with a workspace of fixed size (PyTorch's notes on randomness)."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def use_memory_without_gaps() -> None:
    """Call this before CUDA is used: the allocator then grows its pieces in place, and little lies free between them.

    It is torch's `expandable_segments` (its notes on CUDA), which Windows has not. What the user set is left as it is.
    """
    if sys.platform == "linux" and not os.environ.keys() & {"PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"}:
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"


def started_processes() -> int:
    """As one of how many this process was started: what torchrun, accelerate launch and MPI's launchers tell it, as accelerate reads it."""
    told = (os.environ.get(name, "") for name in ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"))
    return max((int(number) for number in told if number.isdigit()), default=1)
