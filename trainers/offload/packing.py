"""What stored bytes stand for: the dense weight of a Linear, made of the tensors that are kept of it.

Shape suffixes: O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Packing:
    """A way of keeping a weight. `decode(tensors, (O, I), dtype)` makes the dense weight (O, I) on the tensors' device."""

    name: str
    decode: Callable[[Sequence[torch.Tensor], tuple[int, int], torch.dtype], torch.Tensor]


_KNOWN: dict[str, Packing] = {}


def known(packing: Packing) -> Packing:
    """`packing`, which `packing_named` finds from now on: compiled code knows it by its name."""
    return _KNOWN.setdefault(packing.name, packing)


def packing_named(name: str) -> Packing:
    return _KNOWN[name]


def dequantise(stored_OI: torch.Tensor, scale: float | torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """The stored weight times its scale (one number, or (O, 1)), computed in float32 and rounded once to `dtype`.

    Any fp8 value is exact in bf16 and fp16, and torch multiplies these in float32 when the scale is: no float32 copy is made.
    """
    if scale is None:
        return stored_OI.to(dtype)
    if stored_OI.dtype.itemsize == 1:
        return stored_OI.to(dtype).mul_(scale)
    return (stored_OI.float() * scale).to(dtype)


def _as_stored(tensors: Sequence[torch.Tensor], shape_OI: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """Of the weight itself, and its scale if it has one: (O, 1), or a number that lies on the CPU."""
    stored_OI, *scales = tensors
    scale = scales[0] if scales else None
    return dequantise(stored_OI, float(scale) if scale is not None and scale.ndim == 0 else scale, dtype)


AS_STORED = Packing("as stored", _as_stored)
