"""Which device a job runs on, and in which precision."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch

from .errors import JobError, Problem
from .family import Family, PrecisionName
from .job import DEVICE_PATTERN, Job

DTYPES: dict[PrecisionName, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

LARGEST_ON_CPU = 2e9
"""Parameters of the largest model that "auto" trains on the CPU: a step of a larger one takes minutes to hours."""

NO_FP16 = ("1660", "1650", "1630", "T500", "T550", "T600", "MX550", "MX450", "CMP 30HX", "T2000", "T1000", "T1200")
"""In the names of Turing GPUs whose fp16 gives not-a-number (ComfyUI's list: comfy/model_management.py, should_use_fp16)."""


def pick_device(job: Job) -> torch.device:
    """The job's device; "auto" is the first CUDA GPU, else the CPU. Raises JobError when the device is not there."""
    return find_device(job.device)


def find_device(name: str) -> torch.device:
    """The device of a name, as `pick_device`. Raises JobError when there is none of that name."""
    if name == "auto":
        name = "cuda:0" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(DEVICE_PATTERN, name):
        raise JobError(Problem(f"device is {name!r}", "known are auto, cpu, cuda, cuda:1 and so on, mps", 'Use "auto".'))
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        found = f"{torch.cuda.device_count()} CUDA GPUs are visible"
        raise JobError(Problem(f"device is {name!r}", f"it must exist ({found})", 'Use "auto", or "cpu".'))
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise JobError(Problem('device is "mps"', "it needs Apple's Metal, which is not here", 'Use "auto", or "cpu".'))
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device


@dataclass(frozen=True)
class Hardware:
    """What a job computes on. `kind` is the type of a torch device, `fast` are the precisions that it computes in at full speed."""

    kind: str
    name: str
    fast: tuple[PrecisionName, ...]

    @classmethod
    def cuda(cls, name: str, has_bf16: bool) -> Hardware:
        """A CUDA GPU; those of compute capability 8.0 and above have bf16.

        Below, PyTorch emulates it: products are no faster than in float32, and no fused attention takes it, so that all scores are
        in memory (PyTorch's sdp_utils.cpp). On those in NO_FP16 fp16 gives not-a-number.
        """
        if has_bf16:
            return cls("cuda", name, ("bf16", "fp16", "fp32"))
        return cls("cuda", name, ("fp32",) if any(part in name for part in NO_FP16) else ("fp16", "fp32"))

    @classmethod
    def of(cls, device: torch.device) -> Hardware:
        """A device of this machine."""
        if device.type != "cuda":
            return cls(device.type, "the CPU" if device.type == "cpu" else "Apple's GPU", ("fp32",))
        return cls.cuda(torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device) >= (8, 0))


@dataclass(frozen=True)
class Precision:
    """What the base computes in, why, and what that costs; `reason` begins small, after a colon."""

    name: PrecisionName
    reason: str

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.name]

    def __str__(self) -> str:
        return f"Computes in {self.name}: {self.reason}"


def pick_precision(job: Job, family: Family, hardware: Hardware) -> Precision:
    """What the base computes in. "auto": the family's best of those that the hardware computes in at full speed."""
    fast = [name for name in family.precisions if name in hardware.fast]
    if job.precision == "auto":
        name = fast[0] if fast else family.precisions[-1]
        return Precision(name, f"{_why(name, family, hardware)}.{_cost(name, hardware)}")
    return Precision(job.precision, f"the job says so.{_cost(job.precision, hardware)}")


def precision_problem(job: Job, family: Family, hardware: Hardware) -> Problem | None:
    """Why the job's precision cannot be had."""
    if job.precision == "fp16" and hardware.kind != "cuda":
        return Problem(f"precision is fp16 on {hardware.name}", "loss scaling needs a CUDA GPU", "Use auto, bf16 or fp32.")
    if job.precision == "auto" or job.precision in family.precisions:
        return None
    others = " and ".join(family.precisions)
    rule = f"{family.title} computes in {others}, as in ComfyUI: in others its values overflow"
    best = pick_precision(job.model_copy(update={"precision": "auto"}), family, hardware).name
    return Problem(f"precision is {job.precision}", rule, f'Use "auto", which is {best} on {hardware.name}.')


def _why(name: PrecisionName, family: Family, hardware: Hardware) -> str:
    if hardware.kind != "cuda":
        return f"nothing else is faster on {hardware.name}"
    if name == "bf16":
        return f"it is what {family.title} is best trained in, and {hardware.name} has it"
    without_bf16 = f"{hardware.name} has no bf16 (its compute capability is below 8.0)"
    if name == "fp16":
        return f"{without_bf16}. The loss is scaled, so that gradients do not vanish"
    if "fp16" in hardware.fast:
        return f"{without_bf16}, and {family.title} does not work in fp16"
    return f"{without_bf16}, and its fp16 gives not-a-number"


def _cost(name: PrecisionName, hardware: Hardware) -> str:
    """What a choice costs that is not the fastest; "" for others."""
    if hardware.kind == "mps":
        return " Nothing is streamed there: the whole model stays in memory, and no plan says whether it fits."
    if hardware.kind != "cuda":
        return "" if name in hardware.fast else " It is slower there than fp32."
    if name not in hardware.fast:
        return f" {hardware.name} only emulates it: slower than fp32, and attention needs memory for the scores of all pairs of tokens."
    if name == "fp32":
        return " A step takes several times as long as in half precision, and twice the memory."
    return ""


def no_gpu_problem(job: Job, parameters: int, file_name: str) -> Problem | None:
    """Why a model of so many `parameters` does not start: the job leaves the device open, and no GPU is found.

    A smaller one is trained on the CPU.
    """
    if job.device != "auto" or parameters <= LARGEST_ON_CPU or pick_device(job).type != "cpu":
        return None
    value = f"device is auto, and PyTorch {torch.__version__} finds no GPU for {file_name} ({parameters / 1e9:.1f} billion parameters)"
    remedy = f'{_how_to_find_a_gpu()} Or set device to "cpu" to train on the CPU anyway, which takes minutes to hours a step.'
    rule = f"above {LARGEST_ON_CPU / 1e9:g} billion parameters the CPU is used only when the job says so"
    return Problem(value, rule, remedy)


def _how_to_find_a_gpu() -> str:
    if torch.backends.mps.is_available():
        return 'Set device to "mps" to use Apple\'s GPU.'
    xpu = getattr(torch, "xpu", None)
    if xpu is not None and xpu.is_available():
        return "The Intel GPU of this machine cannot be used: training needs an NVIDIA or AMD GPU."
    if torch.version.cuda or torch.version.hip:
        tool = "nvidia-smi" if torch.version.cuda else "rocm-smi"
        return f"Check that {tool} lists the GPU, its driver is new enough for PyTorch, and CUDA_VISIBLE_DEVICES does not hide it."
    return "This PyTorch is built for the CPU: install the build for your GPU (pytorch.org; an AMD GPU needs the ROCm build)."


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
