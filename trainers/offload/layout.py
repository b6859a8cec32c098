"""The bytes of a block that are streamed: the stored weights of its frozen Linears, in one flat run.

All else of a block (norms, biases, tables: a thousandth of its bytes) stays on the device.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from .linear import FrozenLinear

_ALIGNMENT = 256
"""Bytes: what CUDA's own allocations are aligned to, and more than any kernel asks of a tensor."""


@dataclass(frozen=True)
class Piece:
    """One tensor of a frozen Linear: where it lies in the run, and the tensor itself in host memory."""

    linear: FrozenLinear
    name: str
    start: int
    host: torch.Tensor

    @property
    def stop(self) -> int:
        return self.start + self.host.nbytes


@dataclass(frozen=True)
class BlockLayout:
    """The streamed tensors of one block."""

    pieces: tuple[Piece, ...]
    nbytes: int

    @classmethod
    def of(cls, block: nn.Module) -> BlockLayout:
        """Of the tensors that the block's Linears hold now, which become the host's own."""
        pieces, start = [], 0
        for linear in frozen_linears(block):
            for name, tensor in linear.stored_tensors().items():
                pieces.append(Piece(linear, name, start, tensor.detach()))
                start += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        return cls(tuple(pieces), start)

    def write(self, run: torch.Tensor) -> None:
        """Copies the host's tensors into a flat run of bytes (uint8, at least `nbytes` long) in host memory."""
        for piece, part in zip(self.pieces, self._parts(run), strict=True):
            part.copy_(piece.host)

    def views(self, run: torch.Tensor) -> list[tuple[FrozenLinear, Mapping[str, torch.Tensor]]]:
        """Each Linear with its tensors in a flat run of bytes."""
        return self._by_linear(self._parts(run))

    def on_host(self) -> list[tuple[FrozenLinear, Mapping[str, torch.Tensor]]]:
        """Each Linear with the host's tensors."""
        return self._by_linear(piece.host for piece in self.pieces)

    def absent(self) -> list[tuple[FrozenLinear, Mapping[str, torch.Tensor]]]:
        """Each Linear with tensors that have no bytes: to compute with them is an error."""
        return self._by_linear(piece.host.to("meta") for piece in self.pieces)

    def _parts(self, run: torch.Tensor) -> Iterator[torch.Tensor]:
        for piece in self.pieces:
            yield run[piece.start : piece.stop].view(piece.host.dtype).view(piece.host.shape)

    def _by_linear(self, tensors: Iterator[torch.Tensor]) -> list[tuple[FrozenLinear, Mapping[str, torch.Tensor]]]:
        found: dict[FrozenLinear, dict[str, torch.Tensor]] = {}
        for piece, tensor in zip(self.pieces, tensors, strict=True):
            found.setdefault(piece.linear, {})[piece.name] = tensor
        return list(found.items())


def frozen_linears(block: nn.Module) -> list[FrozenLinear]:
    """The frozen Linears in a block, those that a LoRA is around included."""
    return [module for module in block.modules() if isinstance(module, FrozenLinear)]


def bind(linears: list[tuple[FrozenLinear, Mapping[str, torch.Tensor]]]) -> None:
    """Makes each Linear compute with the tensors that stand beside it."""
    for linear, tensors in linears:
        linear.bind(tensors)
