"""Environment variables: what this process says to libraries, and what a worker inherits. Nothing else reads or sets them."""

from __future__ import annotations

import os
import platform
import re
import socket
import sys

_ALLOCATOR_SETTINGS = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
"""Which of them counts when several are set depends on torch's version."""

_COMFYUI_ALLOCATOR = re.compile(r"(?:^|,)\s*backend\s*:\s*cudaMallocAsync\s*(?=,|$)")

_OTHER_TRAININGS = re.compile(
    "ACCELERATE_|FSDP_|PMI_|OMPI_COMM_|MV2_COMM_|(RANK|LOCAL_RANK|WORLD_SIZE|LOCAL_WORLD_SIZE|MASTER_ADDR|MASTER_PORT)$"
)
"""A pack that uses several GPUs inside ComfyUI sets these there; a worker that finds them waits for processes that never come."""


def go_offline() -> None:
    """The network is never used: call this before anything imports diffusers, transformers or huggingface_hub.

    Child processes inherit it.
    """
    socket.has_ipv6 = False  # or urllib3 opens one when it is imported, to find out
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", DO_NOT_TRACK="1")


def allow_determinism() -> None:
    """Call this before CUDA is used: cuBLAS repeats itself only with a workspace of fixed size (PyTorch's notes on randomness)."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def environment_of_worker() -> dict[str, str]:
    """This process's environment without what ComfyUI, or a pack in it, set there for itself alone.

    ComfyUI puts `backend:cudaMallocAsync` into the settings of torch's allocator, which is a default of its own and not what its
    user chose. That allocator has no expandable segments, and its limit does not count memory that is reserved and unused.
    """
    found = {name: value for name, value in os.environ.items() if not _OTHER_TRAININGS.match(name)}
    for name in _ALLOCATOR_SETTINGS:
        rest = _COMFYUI_ALLOCATOR.sub("", found.pop(name, "")).strip(" ,")
        if rest:
            found[name] = rest
    return found


def use_memory_without_gaps() -> None:
    """Call this before CUDA is used: the allocator then grows its pieces in place, and little lies free between them.

    It is torch's `expandable_segments` (its notes on CUDA), which Windows does not have. Under WSL the first allocation may end in
    "CUDA driver error: unknown error" with it (pytorch issue 192330). A user's own settings are kept.
    """
    if sys.platform != "linux" or "microsoft" in platform.release().lower():
        return
    wanted = "expandable_segments:True"
    for name in [name for name in _ALLOCATOR_SETTINGS if name in os.environ] or _ALLOCATOR_SETTINGS[:1]:
        users = os.environ.get(name, "").strip(" ,")
        if "expandable_segments" not in users:
            os.environ[name] = f"{users},{wanted}" if users else wanted


def started_processes() -> int:
    """As one of how many this process was started: what torchrun, accelerate launch and MPI's launchers tell it, as accelerate reads it."""
    counts = (os.environ.get(name, "") for name in ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"))
    return max((int(number) for number in counts if number.isdigit()), default=1)
