"""The bytes of a block that are streamed: the stored weights of its frozen Linears, in one flat run.

All else of a block (norms, biases, tables: a thousandth of its bytes) stays on the device.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from .linear import FrozenLinear
from .mapped_file import FileRange, range_of

_ALIGNMENT = 256
"""Bytes: what CUDA's own allocations are aligned to, and more than any kernel asks of a tensor."""


@dataclass(frozen=True)
class Piece:
    """One tensor of a frozen Linear: where it lies in the run, the tensor itself in host memory, and its file if it is mapped."""

    linear: FrozenLinear
    name: str
    start: int
    host: torch.Tensor
    source: FileRange | None = None

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
                pieces.append(Piece(linear, name, start, tensor.detach(), range_of(tensor)))
                start += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        return cls(tuple(pieces), start)

    @property
    def in_file(self) -> bool:
        """Whether some of it can be read from the model's file."""
        return any(piece.source is not None for piece in self.pieces)

    def write(self, run: torch.Tensor, from_file: bool = False) -> None:
        """Fills a flat run of bytes (uint8, at least `nbytes` long) in host memory with the host's tensors.

        They are copied from where they are (mapped files come page by page, as they are touched), or, `from_file`, read from
        their file if they have one. The bytes are the same.
        """
        for piece, part in zip(self.pieces, self._parts(run), strict=True):
            if from_file and piece.source is not None:
                piece.source.read_into(run[piece.start : piece.stop])
            else:
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
