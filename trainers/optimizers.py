"""The optimizers a job can name, and the learning rate of a step (a function of the step: nothing to save)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from .errors import MissingPackage
from .job import OptimizerSpec


def build_optimizer(spec: OptimizerSpec, parameters: Sequence[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer of a job over float32 parameters. Raises MissingPackage when its library is not installed.

    Magnitudes (vectors) do not decay: towards zero they would take the base with them.
    """
    vectors = [parameter for parameter in parameters if parameter.ndim == 1]
    groups: Any = parameters
    if vectors:
        groups = [{"params": [parameter for parameter in parameters if parameter.ndim != 1]}, {"params": vectors, "weight_decay": 0.0}]
    settings = {"lr": spec.learning_rate, "betas": spec.betas, "eps": spec.epsilon, "weight_decay": spec.weight_decay}
    if spec.kind == "adamw":
        return torch.optim.AdamW(groups, **settings)  # type: ignore[arg-type]
    if spec.kind == "adamw8bit":
        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError as error:
            raise _missing("adamw8bit", "bitsandbytes", error) from error
        return _typed(AdamW8bit(groups, **settings))
    try:
        from prodigyopt import Prodigy
    except ImportError as error:
        raise _missing("prodigy", "prodigyopt", error) from error
    return _typed(Prodigy(groups, **settings, safeguard_warmup=spec.warmup_steps > 0, use_bias_correction=True))


def check_installed(spec: OptimizerSpec) -> None:
    """Raises MissingPackage when the optimizer's library is not installed; nothing is built."""
    build_optimizer(spec, [torch.nn.Parameter(torch.zeros(1, 1))])


def learning_rate_factor(spec: OptimizerSpec, step: int, total_steps: int) -> float:
    """What the peak learning rate is multiplied by in `step` (from 1): up over the warm-up, then by the schedule."""
    if step <= spec.warmup_steps:
        return step / spec.warmup_steps
    if spec.schedule == "constant":
        return 1.0
    progress = (step - 1 - spec.warmup_steps) / max(total_steps - spec.warmup_steps, 1)
    return 1.0 - progress if spec.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def _typed(optimizer: object) -> torch.optim.Optimizer:
    assert isinstance(optimizer, torch.optim.Optimizer)
    return optimizer


def _missing(kind: str, package: str, error: ImportError) -> MissingPackage:
    return MissingPackage(f"optimizer.kind is {kind!r}; it needs the package {package} ({error}). Install it: pip install {package}")
