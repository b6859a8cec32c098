"""How much of a machine's memory a training may take: of the GPU beside what CUDA itself still loads, and pinned on the host."""

from __future__ import annotations

import platform
import sys
from typing import Literal

import torch
from torch.nn.functional import conv3d, scaled_dot_product_attention

from .offload.pinned import pinnable_bytes as pinnable_by_trying

GIB = 2**30
System = Literal["windows", "wsl", "linux"]

WINDOWS_PINNED_SHARE = 0.4
"""Of all RAM: Windows refuses at about half, and ComfyUI stays at this share (comfy/model_management.py, MAX_PINNED_MEMORY)."""
LINUX_PINNED_SHARE = 0.9
LINUX_KEPT_BYTES = 4 * GIB
LINUX_KEPT_WITH_SWAP_BYTES = 16 * GIB
"""Linux pins whatever it has, and then ends processes for lack of memory. ComfyUI (same place) pins at most 0.9 of RAM, all but 4
GiB, and all but 16 GiB of RAM and swap together, and 0.4 of RAM where that is more."""
STAGING_SHARE = 0.25
"""Of what is available: so much may always be pinned, for the buffers that weights pass through on their way to the GPU."""
WSL_TRIED_BYTES = 4 * GIB
"""WSL 2 was reported to refuse at 0.75 to 1 GiB, whatever its RAM. Where so much can be pinned, there is no such limit."""
CONTEXT_SHARE = 0.03
CONTEXT_BYTES = 256 * 2**20
"""CUDA loads kernels when they are first used, and libraries take workspaces, beside PyTorch's allocator: 150 to 400 MiB in all. Most of
it is there after the warm-up; this much of what is free then stays free, or that share if it is more."""


def this_system() -> System:
    if sys.platform == "win32":
        return "windows"
    return "wsl" if "microsoft" in platform.release().lower() else "linux"


def pinnable_bytes(system: System, ram_bytes: int, swap_bytes: int, available_bytes: int) -> int:
    """What may be pinned of a machine with so much RAM, of which so much is available; of WSL what there is to try."""
    share = WINDOWS_PINNED_SHARE * ram_bytes
    if system != "windows":
        all_but = min(ram_bytes - LINUX_KEPT_BYTES, ram_bytes + swap_bytes - LINUX_KEPT_WITH_SWAP_BYTES)
        share = max(share, min(LINUX_PINNED_SHARE * ram_bytes, all_but))
    return int(max(min(share, available_bytes - LINUX_KEPT_BYTES), STAGING_SHARE * available_bytes))


def pinnable_here(device: torch.device, available_bytes: int) -> int | None:
    """What may be pinned for a device of this machine; None: nothing is pinned for it. In WSL it is tried, which takes a second."""
    import psutil

    if device.type != "cuda":
        return None
    system = this_system()
    allowed = pinnable_bytes(system, psutil.virtual_memory().total, psutil.swap_memory().total, available_bytes)
    if system != "wsl":
        return allowed
    tried = min(allowed, WSL_TRIED_BYTES)
    found = pinnable_by_trying(device, tried)
    return found if found + GIB // 4 <= tried else allowed


def free_after_warm_up(device: torch.device, dtype: torch.dtype) -> tuple[int, int]:
    """(bytes of a GPU that are free once its libraries are loaded, all its bytes)."""
    for _ in range(2):  # the second time shows what the first one left cached
        _warm_up(device, dtype)
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    return free, total


def context_headroom(free_bytes: int) -> int:
    """What stays free of a GPU for CUDA itself."""
    return min(max(CONTEXT_BYTES, int(CONTEXT_SHARE * free_bytes)), free_bytes)


def _warm_up(device: torch.device, dtype: torch.dtype) -> None:
    """One product, attention and convolution, forward and backward, as small as they may be: what they load does not depend on it."""
    with torch.inference_mode(False), torch.enable_grad():
        left = torch.ones(1, 2, 128, 64, device=device, dtype=dtype, requires_grad=True)
        attention = scaled_dot_product_attention(left, left @ left.mT @ left / 64, left)
        video = torch.ones(1, 16, 3, 16, 16, device=device, requires_grad=True)
        convolution = conv3d(video, torch.ones(16, 16, 3, 3, 3, device=device))
        torch.autograd.backward(attention.float().mean() + convolution.mean())
