"""One training loop for the tiny networks: AdamW, cosine, an average of the weights, state that survives a kill."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

SAVE_EVERY = 200  # steps


@dataclass(frozen=True)
class Plan:
    """How to descend."""

    steps: int
    learning_rate: float
    warmup: int  # steps
    average: float  # decay of the weights' moving average
    weight_decay: float = 0.0  # of matrices
    betas: tuple[float, float] = (0.9, 0.98)

    def rate(self, step: int) -> float:
        """The learning rate: a linear warm-up, and a cosine down to a fiftieth."""
        cosine = 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return self.learning_rate * min(1.0, (step + 1) / self.warmup) * (0.02 + 0.98 * cosine)


def descend(parameters: Sequence[torch.nn.Parameter], loss_at: Callable[[int], torch.Tensor], plan: Plan, state: Path) -> None:
    """Minimise `loss_at(step)`, and leave the averaged weights in `parameters`. Goes on from the file `state`."""
    matrices = [p for p in parameters if p.ndim > 1 and p.shape[0] > 1]
    chosen = {id(p) for p in matrices}
    others = [p for p in parameters if id(p) not in chosen]
    groups = [{"params": matrices, "weight_decay": plan.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=plan.learning_rate, betas=plan.betas, foreach=True)
    average = [p.detach().clone() for p in parameters]
    start = _restore(state, parameters, average, optimizer)
    began, losses = time.monotonic(), list[float]()
    for step in range(start, plan.steps):
        for group in optimizer.param_groups:
            group["lr"] = plan.rate(step)
        loss = loss_at(step)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_lerp_(average, list(parameters), 1 - min(plan.average, (step + 1) / (step + 10)))
        losses.append(loss.item())
        if (step + 1) % 50 == 0:
            seconds = (time.monotonic() - began) / (step + 1 - start)
            print(f"step {step + 1}: loss {sum(losses) / len(losses):.4f}, {seconds:.2f} s a step", flush=True)
            losses.clear()
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == plan.steps:
            _save(state, step + 1, parameters, average, optimizer)
    with torch.no_grad():
        torch._foreach_copy_(list(parameters), average)


def _save(
    state: Path,
    step: int,
    parameters: Sequence[torch.Tensor],
    average: Sequence[torch.Tensor],
    optimizer: torch.optim.Optimizer,
) -> None:
    weights = [p.detach() for p in parameters]
    part = state.with_suffix(".part")
    torch.save({"step": step, "weights": weights, "average": average, "optimizer": optimizer.state_dict()}, part)
    os.replace(part, state)


@torch.no_grad()
def _restore(
    state: Path,
    parameters: Sequence[torch.Tensor],
    average: Sequence[torch.Tensor],
    optimizer: torch.optim.Optimizer,
) -> int:
    """Fill weights, average and optimizer from `state` where it exists; the step to go on with."""
    if not state.exists():
        return 0
    saved = torch.load(state, weights_only=True)
    torch._foreach_copy_(list(parameters), saved["weights"])
    torch._foreach_copy_(list(average), saved["average"])
    optimizer.load_state_dict(saved["optimizer"])
    return int(saved["step"])
