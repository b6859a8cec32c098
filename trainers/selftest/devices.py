"""A GPU by its number, from every thread; and what CUDA itself takes of it."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch.nn.functional import conv3d, scaled_dot_product_attention

from ..machine import MIB, size_text
from ..offload.copies import use_device
from .lines import Bench, Check, Line

_GROUP = "the GPU by its number"
_CONTEXT_BYTES = 200 * MIB
"""Less than this is no context: other programs come and go."""


def _device(bench: Bench) -> Iterator[Line]:
    device, others = bench.device, [index for index in range(torch.cuda.device_count()) if index != bench.device.index]
    before = [torch.cuda.mem_get_info(index)[0] for index in others] if others else []
    torch.cuda.set_per_process_memory_fraction(1.0, device)
    with ThreadPoolExecutor(1, initializer=use_device, initargs=(device,)) as thread:
        made, current = thread.submit(lambda: (torch.ones(8, device="cuda").device, torch.cuda.current_device())).result()
    right = made == device and current == device.index
    yield Line("a thread's device", "ok" if right else "failed", f"a tensor of another thread lies on {made}, its device is {current}")
    if others:
        lost = sum(max(then - torch.cuda.mem_get_info(index)[0], 0) for then, index in zip(before, others, strict=True))
        remedy = "Start with CUDA_VISIBLE_DEVICES set to the one GPU."
        yield Line("other GPUs", "slow" if lost > _CONTEXT_BYTES else "ok", f"{size_text(lost)} of them taken meanwhile", remedy)


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
