"""What is installed, which GPU there is and who else uses it."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version

import psutil
import torch

from ..device import allocator
from ..machine import available_ram, size_text
from ..nvidia_smi import has_time_limit, smi, smi_processes
from .lines import Bench, Check, Line

_GROUP = "versions and environment"
_PACKAGES = ("diffusers", "transformers", "peft", "accelerate", "safetensors", "av", "opencv-python", "einops", "pydantic")
_OTHER_NAMES = {"opencv-python": ("opencv-python-headless", "opencv-contrib-python", "opencv-contrib-python-headless")}
_GPU_BUILD = "Install a PyTorch with CUDA (pytorch.org/get-started), into the Python that runs this."
_BUSY_SHARE = 0.2
"""Of a GPU's memory: where other programs hold more, models are streamed that could stay."""


def _system(bench: Bench) -> Iterator[Line]:
    memory = psutil.virtual_memory()
    kind = "WSL" if "microsoft" in platform.release().lower() else platform.system()
    text = f"{kind} {platform.release()}, {platform.machine()}, {psutil.cpu_count()} cores, Python {platform.python_version()}"
    yield Line("system", "ok", text)
    state, remedy = ("ok", "") if available_ram() > 8 * 2**30 else ("slow", "Close other programs: streamed weights are kept in RAM.")
    yield Line("RAM", state, f"{size_text(available_ram())} of {size_text(memory.total)} are free", remedy)  # type: ignore[arg-type]


def _packages(bench: Bench) -> Iterator[Line]:
    yield _torch()
    missing = [name for name in _PACKAGES if _version(name) is None]
    text = ", ".join(f"{name} {_version(name) or 'missing'}" for name in _PACKAGES)
    yield Line("packages", "failed" if missing else "ok", text, f"pip install {' '.join(missing)}" if missing else "")


def _torch() -> Line:
    text = f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}"
    if torch.version.hip:
        text += f", ROCm {torch.version.hip}"
    if not torch.cuda.is_available() and (found := smi("name,driver_version")):
        rule = (
            "this PyTorch is built without CUDA"
            if torch.version.cuda is None
            else "this PyTorch cannot use it: is its CUDA newer than the driver?"
        )
        return Line("PyTorch", "failed", f"{text}; the machine has {found[0]} with driver {found[1]}, but {rule}", _GPU_BUILD)
    return Line("PyTorch", "ok", text)


def _gpu(bench: Bench) -> Iterator[Line]:
    properties = torch.cuda.get_device_properties(bench.device)
    free, total = torch.cuda.mem_get_info(bench.device)
    capability = f"compute capability {properties.major}.{properties.minor}"
    text = f"{properties.name}, {capability}, {size_text(free)} of {size_text(total)} are free"
    busy = total - free > _BUSY_SHARE * total
    remedy = "Close what else uses the GPU; in ComfyUI, press Unload Models." if busy else ""
    yield Line("GPU", "slow" if busy else "ok", f"{text}; number {bench.device.index} of {torch.cuda.device_count()}", remedy)
    yield _driver(bench)
    there = torch.ones(1, device=bench.device)  # asked before, the allocator says only what was wanted
    yield Line("allocator", "ok", f"{allocator(there.device)} in this process; a worker leaves ComfyUI's cudaMallocAsync out")


def _driver(bench: Bench) -> Line:
    found = smi(
        "driver_version,driver_model.current,display_active", str(getattr(torch.cuda.get_device_properties(bench.device), "uuid", ""))
    )
    if not found:
        return Line("driver", "skipped", "nvidia-smi does not answer for this GPU")
    driver, model, display = found
    users = len(smi_processes())
    text = f"{driver}, display {display.lower()}{'' if model.startswith('[') else f', {model}'}, {users} other programs compute on it"
    if has_time_limit(model, display):
        return Line("driver", "ok", f"{text}; a kernel that runs for seconds is ended")
    return Line("driver", "ok", text)


def _version(package: str) -> str | None:
    for name in (package, *_OTHER_NAMES.get(package, ())):
        with suppress(PackageNotFoundError):
            return version(name)
    return None


CHECKS = (
    Check(_GROUP, "system", _system),
    Check(_GROUP, "packages", _packages),
    Check(_GROUP, "GPU", _gpu, gpu_only=True),
)
