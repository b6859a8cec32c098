"""What a job trains in a transformer, and the files it becomes: a LoRA (here), or all weights of a small model (`full`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from .checkpoint import Checkpoint
from .dora import with_lengths
from .experts import Expert, lora_of
from .family import Detection, Family, Variant
from .full import FullMethod
from .job import Job
from .lora import adapter_state, base_weights, inject, load_adapter_state
from .lora_format import read_lora, write_lora
from .lora_metadata import lora_metadata
from .state import adapter_of, adapter_tensors


class Method(Protocol):
    """What differs between a LoRA and all weights. One object serves all experts of a job."""

    state_file: str
    """Name of a checkpoint's file of trained tensors, without its ending."""
    event_field: str
    """What the event of a checkpoint calls the written file."""

    @property
    def keep_stored(self) -> bool | None:
        """How the base is loaded: as `load_transformer` takes it."""

    @property
    def can_stream(self) -> bool:
        """Whether blocks may wait in host memory and come when they are used."""

    def inject(self, transformer: nn.Module, device: torch.device) -> list[nn.Parameter]:
        """Makes the parameters to train, on `device`, and returns them; all others are frozen."""

    def tensors(self, transformer: nn.Module) -> dict[str, torch.Tensor]:
        """What a resume needs of them: exact, and not to be written to."""

    def load_tensors(self, transformer: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
        """Puts `tensors` back where they came from. Raises VideoTrainerError when they do not fit."""

    def begin(self, transformer: nn.Module, expert: Expert) -> None:
        """Starts from what the job names as its beginning, if it does."""

    def write(self, path: Path, transformer: nn.Module, expert: Expert, name: str, step: int) -> None:
        """Writes the file that people use, with a title of `name`; whole or not at all, and never over another one."""


def method_of(job: Job, checkpoint: Checkpoint, detection: Detection) -> Method:
    """The method of a job on the base that `checkpoint` is."""
    if job.method == "full":
        return FullMethod.of(job, checkpoint, detection)
    return LoraMethod(job, detection.family, detection.variant)


@dataclass(frozen=True)
class LoraMethod:
    """The Method protocol for a LoRA or DoRA."""

    job: Job
    family: Family
    variant: Variant
    state_file = "adapter"
    event_field = "lora"

    @property
    def keep_stored(self) -> bool | None:
        return False if self.job.lora.dora else None

    @property
    def can_stream(self) -> bool:
        return not self.job.lora.dora

    def inject(self, transformer: nn.Module, device: torch.device) -> list[nn.Parameter]:
        return inject(transformer, self.family, self.job.lora, self.job.seed, device=device)

    def tensors(self, transformer: nn.Module) -> dict[str, torch.Tensor]:
        return adapter_tensors(adapter_state(transformer, self.job.lora))

    def load_tensors(self, transformer: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
        load_adapter_state(transformer, adapter_of(tensors, self.job.lora.alpha or self.job.lora.rank))

    def begin(self, transformer: nn.Module, expert: Expert) -> None:
        if initial := self.job.start.initial_lora:
            load_adapter_state(transformer, read_lora(lora_of(Path(initial), expert.name), self.family))

    def write(self, path: Path, transformer: nn.Module, expert: Expert, name: str, step: int) -> None:
        adapter = with_lengths(adapter_state(transformer, self.job.lora), "base", base_weights(transformer))
        write_lora(path, adapter, self.family, "native", self._metadata(expert, name, step))

    def _metadata(self, expert: Expert, name: str, step: int) -> dict[str, str]:
        job = self.job
        return lora_metadata(
            name=name,
            family=self.family,
            variant=self.variant,
            base=expert.path,
            expert=expert.name,
            rank=job.lora.rank,
            alpha=job.lora.alpha,
            step=step,
            trigger_words=job.trigger_words,
            job_hash=job.hash(),
        )
