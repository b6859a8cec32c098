"""The trained parts of an adapter in the model: float32 master weights, each cast where it is used.

Legend: R rank, I input features, O output features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .dora import row_lengths


class MasterLinear(nn.Linear):
    """A factor of a LoRA: a float32 master weight, used in the dtype of its input."""

    weight: nn.Parameter

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__(weight.shape[1], weight.shape[0], bias=False, device="meta")
        self.weight = nn.Parameter(weight)

    def forward(self, input: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        """`input` through `scale` times the weight, which is small: that spares a pass over the output."""
        weight = self.weight if scale == 1.0 else self.weight * scale
        return F.linear(input, weight.to(input.dtype))

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> MasterLinear:
        super()._apply(_only_moving(fn), recurse)  # type: ignore[no-untyped-call]
        return self


class Branch:
    """What an adapter adds to its Linear, in the terms of peft, which calls it a variant of LoRA.

    peft's plain LoRA multiplies what is added by the scale and makes a new output of it: two more passes over activations,
    and a third tensor of their size. At scale 1 the numbers are the same, bit for bit.
    """

    @staticmethod
    def forward(module: Any, *, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **_: Any) -> torch.Tensor:
        """`result` of the base and what the adapter adds, summed where the latter lies (a Linear needs its output for nothing)."""
        down, up, dropout = (parts[active_adapter] for parts in (module.lora_A, module.lora_B, module.lora_dropout))
        added: torch.Tensor = up(down(dropout(x)), module.scaling[active_adapter])
        return added.add_(result)

    @staticmethod
    def supports_lora_conversion() -> bool:
        return True


class Magnitude(nn.Module):
    """DoRA's magnitudes of one Linear (https://arxiv.org/abs/2402.09353): each row of W + sBA is given a trained length.

    Stands where peft's layer for it does, with its arguments. Unlike peft's, the lengths are measured and divided by in
    float32 whatever the base is stored in (bf16 would move every output by up to 0.4 %), and nothing of the size of W is
    kept for the backward pass: as in the paper, the measured length counts as a constant there.
    """

    weight: nn.Parameter

    def __init__(self, weight_O: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight_O)

    def forward(
        self,
        x: torch.Tensor,
        *,
        lora_A: MasterLinear,
        lora_B: MasterLinear,
        scaling: float,
        base_layer: Any,
        base_result: torch.Tensor | None = None,
        adapter_name: str = "default",
    ) -> torch.Tensor:
        """What is added to the base's output. `base_result` is that output; None: `x` went through dropout."""
        with torch.no_grad():
            length_O = row_lengths(base_layer.weight, lora_A.weight, lora_B.weight, scaling)
        gain_O = self.weight / length_O
        product = base_layer(x) if base_result is None else base_result
        if base_layer.bias is not None:
            product = product - base_layer.bias
        added: torch.Tensor = (gain_O - 1).to(x.dtype) * product + (gain_O * scaling).to(x.dtype) * lora_B(lora_A(x))
        return added

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Magnitude:
        super()._apply(_only_moving(fn), recurse)  # type: ignore[no-untyped-call]
        return self


def _only_moving(fn: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    """Moves a weight where `fn` moves tensors, in float32: `.to(dtype)` of the transformer does not reach it."""

    def moved(weight: torch.Tensor) -> torch.Tensor:
        return fn(weight) if weight.is_meta else weight.to(fn(weight.new_empty(0)).device)

    return moved
