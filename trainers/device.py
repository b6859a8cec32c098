"""Which device a job runs on, and in which precision."""

from __future__ import annotations

import re
from typing import Any

import torch

from .errors import JobError, Problem
from .job import DEVICE_PATTERN, Job

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def pick_device(job: Job) -> torch.device:
    """The job's device; "auto" is the first CUDA card, else the CPU. Raises JobError when the device is not there."""
    return find_device(job.device)


def find_device(name: str) -> torch.device:
    """The device of a name, as `pick_device`. Raises JobError when there is none of that name."""
    if name == "auto":
        name = "cuda:0" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(DEVICE_PATTERN, name):
        raise JobError(Problem(f"device is {name!r}", "known are auto, cpu, cuda, cuda:1 and so on, mps", 'Use "auto".'))
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        found = f"{torch.cuda.device_count()} CUDA cards are visible"
        raise JobError(Problem(f"device is {name!r}", f"it must exist ({found})", 'Use "auto", or "cpu".'))
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise JobError(Problem('device is "mps"', "it needs Apple's Metal, which is not here", 'Use "auto", or "cpu".'))
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device


def pick_precision(job: Job, device: torch.device) -> str:
    """What the base computes in: "bf16", "fp16" or "fp32". "auto" takes the best that the device does in hardware."""
    if job.precision != "auto":
        return job.precision
    if device.type != "cuda":
        return "fp32"
    return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"


def allocator(device: torch.device) -> str:
    """Which allocator gives a GPU's memory, "" for another device. Ask once something lies on the GPU."""
    if device.type != "cuda":
        return ""
    backend: str = torch.cuda.get_allocator_backend()
    if backend != "native":  # which lists no segments
        return backend
    segments: list[dict[str, Any]] = torch.cuda.memory_snapshot()  # type: ignore[no-untyped-call]
    grow = any(segment.get("is_expandable") for segment in segments)  # what was asked for may not be what the driver can do
    return f"{backend}, expandable segments" if grow else backend
