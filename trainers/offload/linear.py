"""A Linear that is frozen and kept in the bytes it is stored in, fp8 or 16 bit, with its scale.

Shape suffixes: O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional


def dequantise(stored_OI: torch.Tensor, scale: float | torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """The stored weight times its scale (one number, or (O, 1)), computed in float32 and rounded once to `dtype`.

    Any fp8 value is exact in bf16 and fp16, and torch multiplies these by a number in float32: no float32 copy is made.
    """
    if scale is None:
        return stored_OI.to(dtype)
    if isinstance(scale, float) and stored_OI.dtype.itemsize == 1:
        return stored_OI.to(dtype).mul_(scale)
    return (stored_OI.float() * scale).to(dtype)


class FrozenLinear(nn.Linear):
    """y = x W^T + b with a weight that is never trained, and is dequantised for each use and dropped again.

    Nothing is saved for the backward pass, neither the input nor the weight: the gradient of the input reads the weight
    that the module has by then (it may have been streamed out and in). It is bit for bit that of an nn.Linear that
    holds the dequantised weight. Computes in the dtype of the input, or of autocast.

    The weight keeps its stored dtype through `.to(dtype)`, `.half()` and the like; its device and the bias move. The scale
    is no part of the state dict: a state dict holds what is stored, and is not the way to copy this module. An
    adapter must not take its dtype from `weight`: peft does, so its parameters must be made float32 afterwards.
    """

    scale: float | torch.Tensor | None

    def __init__(self, weight_OI: torch.Tensor, bias_O: torch.Tensor | None = None, scale: torch.Tensor | None = None) -> None:
        """Takes the tensors as they are, without a copy; `scale` is float32, one number or (O, 1)."""
        super().__init__(weight_OI.shape[1], weight_OI.shape[0], bias=bias_O is not None, device="meta")
        self.weight = nn.Parameter(weight_OI, requires_grad=False)
        if bias_O is not None:
            self.bias = nn.Parameter(bias_O, requires_grad=False)
        one_number = scale is not None and scale.numel() == 1
        self.scale = float(scale) if one_number else scale  # type: ignore[arg-type]

    def dense_weight(self, dtype: torch.dtype) -> torch.Tensor:
        """The dequantised weight (O, I): a new tensor, or the stored one when it needs no change."""
        return dequantise(self.weight.detach(), self.scale, dtype)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        device = input.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else input.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        output: torch.Tensor = _FrozenProduct.apply(input.to(dtype), self, bias)  # type: ignore[no-untyped-call]
        return output

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, stored={self.weight.dtype}, scale={'no' if self.scale is None else 'yes'}"

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> FrozenLinear:
        """Moves the weight where `fn` moves tensors, in its own dtype."""
        weight = self._parameters["weight"]
        assert weight is not None
        self._parameters["weight"] = None
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        device = fn(weight.new_empty(0)).device
        moved = torch.empty_like(weight, device=device) if weight.is_meta else weight.to(device)
        self._parameters["weight"] = weight if moved is weight else nn.Parameter(moved, requires_grad=False)
        if isinstance(self.scale, torch.Tensor) and device.type != "meta":
            self.scale = self.scale.to(device)
        return self


class _FrozenProduct(torch.autograd.Function):
    """x W^T + b, whose only gradient is that of x."""

    @staticmethod
    def forward(ctx: Any, input: torch.Tensor, module: FrozenLinear, bias_O: torch.Tensor | None) -> torch.Tensor:
        ctx.module = module
        return functional.linear(input, module.dense_weight(input.dtype), bias_O)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        rows = gradient.reshape(-1, gradient.shape[-1])
        product = rows.mm(ctx.module.dense_weight(gradient.dtype))
        return product.view(*gradient.shape[:-1], product.shape[-1]), None, None
