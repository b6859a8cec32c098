"""The product of a FrozenLinear, twice: for autograd as it runs, and as operators that a compiler does not look into.

A compiler that saw the dequantisation would have to choose kernels for it, which fp8 has on few cards (Triton's e4m3 begins
with compute capability 8.9), and might keep the dense weight for the backward pass. So it is shown one operator each for
the product and for its gradient, that take the stored tensors, and run the same kernels as without a compiler.

Shape suffixes: O outputs, I inputs.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

from .packing import packing_named

NAMESPACE = re.sub(r"\W", "_", __name__)
"""Of the operators: of its own for each name this module is imported by, since an operator can be defined only once."""

_defining = threading.Lock()
_defined: list[str] = []

Dense = Callable[[torch.dtype], torch.Tensor]


class FrozenProduct(torch.autograd.Function):
    """x W^T + b, whose only gradient is that of x. `dense(dtype)` gives W (O, I), of the moment, in either pass.

    `unread` is O when nobody reads the product: then it is not computed, and not-a-number, so that a mistake shows.
    """

    @staticmethod
    def forward(ctx: Any, input: torch.Tensor, dense: Dense, bias_O: torch.Tensor | None, unread: int | None = None) -> torch.Tensor:
        ctx.dense = dense
        if unread is not None:
            return input.new_full((*input.shape[:-1], unread), torch.nan)
        return functional.linear(input, dense(input.dtype), bias_O)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return _input_gradient(gradient, ctx.dense(gradient.dtype)), None, None, None


def _input_gradient(gradient: torch.Tensor, weight_OI: torch.Tensor) -> torch.Tensor:
    product = gradient.reshape(-1, gradient.shape[-1]).mm(weight_OI)
    return product.view(*gradient.shape[:-1], product.shape[-1])


def opaque_product(
    input: torch.Tensor, stored: Sequence[torch.Tensor], bias_O: torch.Tensor | None, packing: str, shape_OI: Sequence[int]
) -> torch.Tensor:
    """The same for compiled code: `packing` names how `stored` is decoded. `stored` is saved for the backward pass, by reference."""
    output: torch.Tensor = getattr(torch.ops, NAMESPACE).product(input, stored, bias_O, packing, shape_OI)
    return output


def _product(
    input: torch.Tensor, stored: Sequence[torch.Tensor], bias_O: torch.Tensor | None, packing: str, shape_OI: Sequence[int]
) -> torch.Tensor:
    return functional.linear(input, packing_named(packing).decode(stored, (shape_OI[0], shape_OI[1]), input.dtype), bias_O).contiguous()


def _gradient(gradient: torch.Tensor, stored: Sequence[torch.Tensor], packing: str, shape_OI: Sequence[int]) -> torch.Tensor:
    return _input_gradient(gradient, packing_named(packing).decode(stored, (shape_OI[0], shape_OI[1]), gradient.dtype))


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, stored, _, ctx.packing, ctx.shape_OI = inputs
    ctx.save_for_backward(*stored)


def _backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, list[None], None, None, None]:
    of_input = getattr(torch.ops, NAMESPACE).product_gradient(gradient, ctx.saved_tensors, ctx.packing, ctx.shape_OI)
    return of_input, [None] * len(ctx.saved_tensors), None, None, None


def define_operators() -> None:
    """Makes the operators known to torch, once, for `opaque_product` to be compiled. Not done by an import: it takes 0.15 s in a
    ComfyUI, for each operator torch looks through all modules that are loaded.
    """
    with _defining:
        if not _defined:
            _define()
            _defined.append(NAMESPACE)


def _define() -> None:
    product, gradient = f"{NAMESPACE}::product", f"{NAMESPACE}::product_gradient"
    torch.library.define(product, "(Tensor input, Tensor[] stored, Tensor? bias, str packing, int[] shape) -> Tensor")
    torch.library.define(gradient, "(Tensor gradient, Tensor[] stored, str packing, int[] shape) -> Tensor")
    torch.library.impl(product, "default", _product)
    torch.library.impl(gradient, "default", _gradient)
    torch.library.register_fake(product, lambda input, stored, bias, packing, shape: input.new_empty(*input.shape[:-1], shape[0]))
    torch.library.register_fake(gradient, lambda output, stored, packing, shape: output.new_empty(*output.shape[:-1], shape[1]))
    torch.library.register_autograd(product, _backward, setup_context=_save)
