"""A GPU by its number, from every thread; and what CUDA itself takes of it."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch.nn.functional import conv3d, scaled_dot_product_attention

from ..machine import MIB, size_text
from ..nvidia_smi import smi
from ..offload.copies import use_device
from .lines import Bench, Check, Line

_GROUP = "the GPU by its number"
_CONTEXT_BYTES = 200 * MIB
"""Less than this is no context: other programs come and go."""


def _device(bench: Bench) -> Iterator[Line]:
    device = bench.device
    others = [index for index in range(torch.cuda.device_count()) if index != device.index]
    before = _used_bytes(others)
    torch.cuda.set_per_process_memory_fraction(1.0, device)
    with ThreadPoolExecutor(1, initializer=use_device, initargs=(device,)) as thread:
        made, current = thread.submit(lambda: (torch.ones(8, device="cuda").device, torch.cuda.current_device())).result()
    right = made == device and current == device.index
    yield Line("a thread's device", "ok" if right else "failed", f"a tensor of another thread lies on {made}, its device is {current}")
    if others:
        yield _others(before, _used_bytes(others))


def _others(before: list[int], after: list[int]) -> Line:
    if not before or not after:
        return Line("other GPUs", "skipped", "nvidia-smi does not say how much of them is used")
    taken = sum(max(now - then, 0) for then, now in zip(before, after, strict=True))
    remedy = "Start with CUDA_VISIBLE_DEVICES set to the one GPU."
    return Line("other GPUs", "slow" if taken > _CONTEXT_BYTES else "ok", f"{size_text(taken)} of their memory taken meanwhile", remedy)


def _used_bytes(indices: list[int]) -> list[int]:
    """Of these GPUs, in all programs; empty when nvidia-smi does not answer. To ask PyTorch would itself make a context on each."""
    names = [str(getattr(torch.cuda.get_device_properties(index), "uuid", "")) for index in indices]
    found = [smi("memory.used", name) for name in names if name]
    known = len(found) == len(indices) and all(used and used[0].isdigit() for used in found)
    return [int(used[0]) * MIB for used in found] if known else []


def _context(bench: Bench) -> Iterator[Line]:
    """Before anything else computes: libraries load their kernels at the first call."""
    device = bench.device
    before = _taken_beside_torch(device)
    left = torch.ones(1, 2, 128, 64, device=device, requires_grad=True)
    mixed = scaled_dot_product_attention(left, left @ left.mT @ left / 64, left)
    video = torch.ones(1, 16, 3, 16, 16, device=device, requires_grad=True)
    torch.autograd.backward(mixed.mean() + conv3d(video, torch.ones(16, 16, 3, 3, 3, device=device)).mean())
    grown = max(_taken_beside_torch(device) - before, 0)
    text = f"{size_text(grown)} more after the first product, attention and convolution, {size_text(before)} before (of all programs)"
    yield Line("CUDA's own memory", "ok", text)


def _taken_beside_torch(device: torch.device) -> int:
    torch.cuda.synchronize(device)
    free, total = torch.cuda.mem_get_info(device)
    return total - free - torch.cuda.memory_reserved(device)


CHECKS = (
    Check(_GROUP, "a thread's device", _device, gpu_only=True),
    Check(_GROUP, "CUDA's own memory", _context, gpu_only=True),
)
