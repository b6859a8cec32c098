"""The optimizers a job can name, and the learning rate of a step (a function of the step: nothing to save)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from .errors import JobError, MissingPackage, Problem
from .job import Job, OptimizerSpec

_HOW = ("fused", "foreach")
"""What param groups say of how a step is computed, not of where it stands."""


def build_optimizer(spec: OptimizerSpec, parameters: Sequence[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer of a job over its parameters. Raises MissingPackage when its library is not installed.

    AdamW on a GPU is one kernel for all parameters, without temporaries. Prodigy reads two sums back in each parameter, so that the
    host waits for the GPU twice for each in every step: its library has no other way. The others never wait. Kahan summation
    (adamw_kahan) keeps what rounding takes from weights in bf16; over float32 it is plain AdamW. Magnitudes (vectors) do not
    decay: towards zero they would take the base with them.
    """
    vectors = [parameter for parameter in parameters if parameter.ndim == 1]
    groups: Any = parameters
    if vectors:
        groups = [{"params": [parameter for parameter in parameters if parameter.ndim != 1]}, {"params": vectors, "weight_decay": 0.0}]
    settings = {"lr": spec.learning_rate, "betas": spec.betas, "eps": spec.epsilon, "weight_decay": spec.weight_decay}
    if spec.kind == "adamw":
        on_card = all(parameter.is_cuda for parameter in parameters)
        return torch.optim.AdamW(groups, **settings, fused=True if on_card else None)  # type: ignore[arg-type]
    if spec.kind == "adamw_kahan":
        try:
            from optimi import AdamW
        except ImportError as error:
            raise _missing("adamw_kahan", "torch-optimi", error) from error
        return _typed(AdamW(groups, **settings, kahan_sum=True))
    if spec.kind == "adamw8bit":
        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError as error:
            raise _missing("adamw8bit", "bitsandbytes", error) from error
        return _typed(_without_waiting(AdamW8bit)(groups, **settings))
    try:
        from prodigyopt import Prodigy
    except ImportError as error:
        raise _missing("prodigy", "prodigyopt", error) from error
    return _typed(Prodigy(groups, **settings, safeguard_warmup=spec.warmup_steps > 0, use_bias_correction=True))


def _without_waiting(adamw: Any) -> Any:
    """The optimizer of bitsandbytes without its wait for the GPU after each parameter, which only paged states need."""

    class Queued(adamw):  # type: ignore[misc]
        @torch.no_grad()
        def step(self, closure: None = None) -> None:
            assert closure is None
            assert not self.is_paged
            if not self.initialized:  # type: ignore[has-type]
                self.check_overrides()
                self.to_gpu()
                self.initialized = True
            for number, group in enumerate(self.param_groups):
                for index, parameter in enumerate(group["params"]):
                    if parameter.grad is None:
                        continue
                    if not self.state[parameter]:
                        self.init_state(group, parameter, number, index)
                    self.update_step(group, parameter, number, index)

    return Queued


def load_optimizer_state(optimizer: Any, state: dict[str, Any]) -> None:
    """Goes on from a saved state, computing steps as the optimizer does here: the state may come from another device."""
    pairs = zip(state["param_groups"], optimizer.param_groups, strict=True)
    groups = [saved | {name: now[name] for name in _HOW if name in now} for saved, now in pairs]
    optimizer.load_state_dict(state | {"param_groups": groups})


def check_optimizer(job: Job) -> None:
    """Raises MissingPackage when the optimizer's library is not installed, JobError when it has no use; nothing is built."""
    if job.optimizer.kind == "adamw_kahan" and job.method == "lora":
        rule = "a LoRA's weights are kept in float32, where Kahan summation has nothing to keep"
        raise JobError(Problem("optimizer.kind is 'adamw_kahan', method is 'lora'", rule, 'Use "adamw", or method "full".'))
    build_optimizer(job.optimizer, [torch.nn.Parameter(torch.zeros(1, 1))])


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
