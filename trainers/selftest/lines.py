"""What a check says, and what it is given."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from ..device import DTYPES, Hardware
from ..errors import VideoTrainerError
from ..family import Family
from ..measurements import Measurements

State = Literal["ok", "slow", "failed", "skipped"]
LIMIT_SECONDS = 60.0


@dataclass(frozen=True)
class Line:
    """One thing that was checked. `remedy`: what a user can do, where the state is not "ok"."""

    name: str
    state: State
    text: str
    remedy: str = ""


def error_text(error: Exception) -> str:
    """What is said of an error that no check expects."""
    text = " ".join(str(error).split())
    return text if isinstance(error, VideoTrainerError) else f"{type(error).__name__}: {text}"


@dataclass
class Bench:
    """What is checked: a device, and the model's file where there is one. `runs_folder` is where runs are made."""

    device: torch.device
    base: Path | None
    runs_folder: Path
    kept: Measurements
    limit_seconds: float = LIMIT_SECONDS
    started: float = field(default_factory=time.monotonic)

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        """The best that the device computes in at full speed."""
        return DTYPES[Hardware.of(self.device).fast[0]]

    def dtypes_of(self, family: Family) -> list[torch.dtype]:
        """What a training of the family may compute in here, the best first."""
        fast = Hardware.of(self.device).fast
        return [DTYPES[name] for name in family.precisions if name in fast] or [torch.float32]

    @property
    def seconds_left(self) -> float:
        return self.limit_seconds - (time.monotonic() - self.started)


@dataclass(frozen=True)
class Check:
    """A part of `check`: `run` gives its lines as it finds them. `needs_seconds`: it is left out when less is left of the minute."""

    group: str
    name: str
    run: Callable[[Bench], Iterable[Line]]
    gpu_only: bool = False
    needs_seconds: float = 1.0
