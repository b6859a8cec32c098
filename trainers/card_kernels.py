"""What the kernels of a card allocate, as functions that allocate the same and compute nothing: for tracing on the meta device.

On meta, PyTorch takes attention and RMS norm apart into small operators (attention into one that holds all scores, N x N);
on a card each is one kernel. Sources: `mha_fwd` and `mha_bwd` of flash attention 2, `kernel_backward.h` of the memory-efficient
kernels (`kNeedsAccumGradQ` and its like), `layer_norm_kernel.cu`, all of PyTorch 2.11 to 2.13.

Shape suffixes: B batch, H heads, N queries, M keys, D width of a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from .live_bytes import LiveBytes


@dataclass(frozen=True)
class Kernels:
    """What a card computes with. `accumulates` is how many of the three gradients of attention have a float32 copy meanwhile,
    unless they are float32 themselves.

    `fused_norm`: RMS norm is one kernel (PyTorch 2.9 and later).
    """

    accumulates: int = 1
    fused_norm: bool = True


AMPERE = Kernels()
"""Cards of compute capability 8.0 and later: flash attention, or the memory-efficient kernel with a mask."""
TURING = Kernels(accumulates=3)
"""Older cards: the memory-efficient kernel with 64 x 64 tiles."""
CPU = Kernels(accumulates=0, fused_norm=False)


@contextmanager
def imitated(kernels: Kernels, counter: LiveBytes) -> Iterator[None]:
    """Within it, attention and RMS norm of meta tensors allocate what `kernels` would."""
    with _Instead(kernels, counter):
        yield


class _Instead(TorchFunctionMode):
    def __init__(self, kernels: Kernels, counter: LiveBytes) -> None:
        super().__init__()
        self._kernels, self._counter = kernels, counter

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention:
            return self._attention(*args, **kwargs)
        if func is torch.nn.functional.rms_norm and self._kernels.fused_norm and _fuses(*args, **kwargs):
            return _RmsNorm.apply(args[0])  # type: ignore[no-untyped-call]
        return func(*args, **kwargs)

    def _attention(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None = None, *_: Any, **__: Any
    ) -> Any:
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = attn_mask.to(query.dtype)
        return _Attention.apply(query, key, value, attn_mask, self._kernels, self._counter)  # type: ignore[no-untyped-call]


class _Attention(torch.autograd.Function):
    """Saves its inputs, the output and one number for each query; the scores are never there."""

    @staticmethod
    def forward(
        ctx: Any,
        query_BHND: torch.Tensor,
        key_BHMD: torch.Tensor,
        value_BHMD: torch.Tensor,
        mask: torch.Tensor | None,
        kernels: Kernels,
        counter: LiveBytes,
    ) -> torch.Tensor:
        output_BHND = torch.empty_like(query_BHND)
        logsumexp_BHN = query_BHND.new_empty(query_BHND.shape[:3], dtype=torch.float32)
        ctx.save_for_backward(query_BHND, key_BHMD, value_BHMD, output_BHND, logsumexp_BHN, mask)
        ctx.kernels, ctx.counter = kernels, counter
        counter.attention_flops += _forward_flops(query_BHND, key_BHMD)
        return output_BHND

    @staticmethod
    def backward(ctx: Any, gradient_BHND: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query_BHND, key_BHMD, value_BHMD, _, logsumexp_BHN, _ = ctx.saved_tensors
        inputs = query_BHND, key_BHMD, value_BHMD
        gradients = [torch.empty_like(tensor) for tensor in inputs]
        accumulated = inputs[: ctx.kernels.accumulates] if query_BHND.dtype != torch.float32 else ()
        _meanwhile = [_tiled(tensor) for tensor in accumulated]
        _meanwhile.append(torch.empty_like(logsumexp_BHN))
        ctx.counter.attention_flops += 2.5 * _forward_flops(query_BHND, key_BHMD)
        return *gradients, None, None, None


def _tiled(rows_BHND: torch.Tensor) -> torch.Tensor:
    """As many rows in float32, in whole tiles: 128 rows of a multiple of 32 numbers."""
    *sizes, rows, width = rows_BHND.shape
    return rows_BHND.new_empty(*sizes, -(-rows // 128) * 128, -(-width // 32) * 32, dtype=torch.float32)


def _forward_flops(query_BHND: torch.Tensor, key_BHMD: torch.Tensor) -> float:
    """Scores and their product with the values. The backward pass has five products of that size (flash attention 2, section 3.1)."""
    return 4.0 * query_BHND.numel() * key_BHMD.shape[2]


def _fuses(input: torch.Tensor, normalized_shape: Any, weight: torch.Tensor | None = None, eps: float | None = None) -> bool:
    """Whether the kernel takes it: it wants one dtype."""
    return input.is_meta and (weight is None or weight.dtype == input.dtype)


class _RmsNorm(torch.autograd.Function):
    """Saves its input and one number for each row."""

    @staticmethod
    def forward(ctx: Any, input: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(input, input.new_empty((*input.shape[:-1], 1), dtype=torch.float32))
        return torch.empty_like(input)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(gradient)
