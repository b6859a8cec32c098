"""What NVIDIA's driver says of a GPU that PyTorch does not: asked of the program nvidia-smi, which comes with it."""

from __future__ import annotations

import platform
import sys

import psutil

from .launch import answer_of


def has_time_limit(model: str, display: str, system: str = sys.platform) -> bool:
    """Whether the system ends a kernel that runs for seconds: WDDM always (in WSL, too), elsewhere where a screen is attached."""
    on_windows = system == "win32" or "microsoft" in platform.release().lower()
    return (on_windows and model != "TCC") or display == "Enabled"


def ends_long_kernels(uuid: str, system: str = sys.platform) -> bool:
    """`has_time_limit` of a GPU; where the driver does not answer (ROCm), only under Windows."""
    model, display = smi("driver_model.current,display_active", uuid) or ("", "")
    return has_time_limit(model, display, system)


def smi(fields: str, uuid: str = "") -> list[str]:
    """What nvidia-smi says of a GPU (the first, if none is named); empty when it is not there."""
    which = [f"--id=GPU-{uuid.removeprefix('GPU-')}"] if uuid else []
    answer = answer_of(["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits", *which], 5.0)
    lines = answer.strip().splitlines()
    found = [field.strip() for field in lines[0].split(",")] if lines else []
    return found if len(found) == len(fields.split(",")) else []


BUSY_PERCENT = 20
"""Of the time of the last second; a desktop that is drawn takes less."""


def is_used_by_others(uuid: str) -> bool:
    """Whether another process computes on a GPU while this one does not; False where nvidia-smi is missing.

    That there is one is not enough: ComfyUI, which started this one, keeps the GPU open.
    """
    (percent,) = smi("utilization.gpu", uuid) or ("",)
    return percent.isdigit() and int(percent) >= BUSY_PERCENT and bool(smi_processes())


def smi_processes() -> list[str]:
    """The processes that compute on GPUs, but this one. Windows names also those that only draw."""
    answer = answer_of(["nvidia-smi", "--query-compute-apps=pid", "--format=csv,noheader"], 5.0)
    return [line for line in answer.split() if line.isdigit() and int(line) != psutil.Process().pid]
