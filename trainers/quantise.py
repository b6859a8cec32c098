"""Weights of the blocks quantised while they are loaded: fp8 with a scale for each row, or nf4 through bitsandbytes.

One Linear at a time is dense. What is left out of precision, relative to the weights (normal ones, Frobenius norm): fp8 2.6 %,
nf4 9.2 %. nf4 (QLoRA, https://arxiv.org/abs/2305.14314): 64 weights share the largest magnitude among them, and each is one
of 16 quantiles of a normal distribution.

Shape suffixes: O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch

from .errors import MissingPackage, Problem
from .job import Job
from .offload.linear import FrozenLinear
from .offload.packing import Packing

Quantise = Literal["none", "fp8", "nf4"]

_LARGEST_FP8 = 448.0
_NF4_BLOCK = 64
_AT_ONCE = 2**24


def quantised(weight_OI: torch.Tensor, bias_O: torch.Tensor | None, how: Quantise, place: torch.device) -> FrozenLinear:
    """A dense weight as a quantised Linear at `place`; computed where the weight is."""
    if how == "nf4":
        packed, absmax = _nf4(weight_OI)
        tensors = {"weight": packed.to(place), "absmax": absmax.to(place)}
        return FrozenLinear.packed(tensors, (weight_OI.shape[0], weight_OI.shape[1]), NF4, bias_O)
    assert how == "fp8"
    stored_OI, scale_O1 = fp8_by_rows(weight_OI)
    return FrozenLinear(stored_OI.to(place), bias_O, scale_O1.to(place))


def stored_nbytes(outputs: int, inputs: int, how: Quantise, dense_itemsize: int) -> int:
    """Bytes of a Linear's weight, its scales included; `dense_itemsize` are those of a number that is not quantised."""
    count = outputs * inputs
    if how == "nf4":
        return -(-count // 2) + 4 * -(-count // _NF4_BLOCK)
    return count + 4 * outputs if how == "fp8" else count * dense_itemsize


def fp8_by_rows(weight_OI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(e4m3fn (O, I), scale (O, 1) float32): each row's largest magnitude becomes e4m3fn's, 448."""
    largest_O1 = torch.linalg.vector_norm(weight_OI, float("inf"), dim=1, keepdim=True, dtype=torch.float32)
    scale_O1 = torch.where(largest_O1 > 0, largest_O1 / _LARGEST_FP8, 1.0)
    return (weight_OI.float() / scale_O1).clamp_(-_LARGEST_FP8, _LARGEST_FP8).to(torch.float8_e4m3fn), scale_O1


def _nf4(weight_OI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(two weights in a byte, the magnitude of each 64), in parts, since a CPU takes five times the memory of each."""
    from bitsandbytes.functional import quantize_4bit

    found = [quantize_4bit(part, blocksize=_NF4_BLOCK, quant_type="nf4") for part in torch.split(weight_OI.reshape(-1), _AT_ONCE)]
    return torch.cat([packed.view(-1) for packed, _ in found]), torch.cat([state.absmax for _, state in found])


def _decode_nf4(tensors: Sequence[torch.Tensor], shape_OI: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    from bitsandbytes.functional import QuantState, dequantize_4bit

    packed, absmax = tensors
    state = QuantState(absmax, shape=torch.Size(shape_OI), dtype=dtype, blocksize=_NF4_BLOCK, quant_type="nf4")
    dense: torch.Tensor = dequantize_4bit(packed.unsqueeze(1), state)
    return dense.view(shape_OI)


NF4 = Packing("nf4", _decode_nf4)


def quantise_problems(job: Job) -> Iterator[Problem]:
    """What in a job does not go with quantised weights."""
    value, rule = f"memory.quantise is {job.memory.quantise}", "the base must be dense"
    if job.memory.quantise == "none":
        return
    if job.lora.dora:
        yield Problem(f"{value} and lora.dora is true", f"DoRA measures every row of the base, so {rule}", "Use one of them.")
    if job.method == "full":
        yield Problem(f"{value} and method is full", f"the weights themselves are trained, so {rule}", "Set memory.quantise to none.")


def check_quantiser(how: Quantise) -> None:
    """Raises MissingPackage when the library that `how` needs is not installed."""
    if how == "nf4":
        try:
            import bitsandbytes  # noqa: F401
        except ImportError as error:
            remedy = "Install it (pip install bitsandbytes), or use fp8"
            raise MissingPackage(f"memory.quantise is 'nf4'; it needs the package bitsandbytes ({error}). {remedy}.") from error
