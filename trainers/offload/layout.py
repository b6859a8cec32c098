"""The bytes of a block that are streamed: the stored weights of its frozen Linears, in one flat run.

All else of a block (norms, biases, tables: a thousandth of its bytes) stays on the device.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from .linear import FrozenLinear
from .mapped_file import FileRange, range_of

_ALIGNMENT = 256
"""Bytes: what CUDA's own allocations are aligned to, and more than any kernel asks of a tensor."""


@dataclass(frozen=True, eq=False)
class Flat:
    """Tensors in host memory, and where each of them begins when they lie one after the other in a flat run of bytes.

    `sources` are their files, if they are mapped.
    """

    hosts: tuple[torch.Tensor, ...]
    sources: tuple[FileRange | None, ...]
    starts: tuple[int, ...]
    nbytes: int

    @classmethod
    def packed(cls, hosts: Iterable[torch.Tensor]) -> Flat:
        return cls(*_placed(tuple(hosts)))

    @property
    def in_file(self) -> bool:
        """Whether some of it can be read from the model's file."""
        return any(source is not None for source in self.sources)

    def write(self, run: torch.Tensor, from_file: bool = False) -> None:
        """Fills a flat run of bytes (uint8, at least `nbytes` long) in host memory with the host's tensors.

        They are copied from where they are (mapped files come page by page, as they are touched), or, `from_file`, read from
        their file if they have one. The bytes are the same.
        """
        for host, source, start, part in zip(self.hosts, self.sources, self.starts, self.parts(run), strict=True):
            if from_file and source is not None:
                source.read_into(run[start : start + host.nbytes])
            else:
                part.copy_(host)

    def parts(self, run: torch.Tensor) -> list[torch.Tensor]:
        """The tensors in a flat run of bytes."""
        pairs = zip(self.hosts, self.starts, strict=True)
        return [run[start : start + host.nbytes].view(host.dtype).view(host.shape) for host, start in pairs]


@dataclass(frozen=True, eq=False)
class BlockLayout(Flat):
    """The streamed tensors of one block. `owners` are the frozen Linear and the name of each."""

    owners: tuple[tuple[FrozenLinear, str], ...]

    @classmethod
    def of(cls, block: nn.Module) -> BlockLayout:
        """Of the tensors that the block's Linears hold now, which become the host's own."""
        found = [(linear, name, tensor) for linear in frozen_linears(block) for name, tensor in linear.stored_tensors().items()]
        placed = _placed(tuple(tensor.detach() for *_, tensor in found))
        return cls(*placed, tuple((linear, name) for linear, name, _ in found))

    def views(self, run: torch.Tensor) -> list[tuple[FrozenLinear, Mapping[str, torch.Tensor]]]:
        """Each Linear with its tensors in a flat run of bytes."""
        return self.by_linear(self.parts(run))

    def on_host(self) -> list[tuple[FrozenLinear, Mapping[str, torch.Tensor]]]:
        """Each Linear with the host's tensors."""
        return self.by_linear(self.hosts)

    def absent(self) -> list[tuple[FrozenLinear, Mapping[str, torch.Tensor]]]:
        """Each Linear with tensors that have no bytes: to compute with them is an error."""
        return self.by_linear([host.to("meta") for host in self.hosts])

    def by_linear(self, tensors: Sequence[torch.Tensor]) -> list[tuple[FrozenLinear, Mapping[str, torch.Tensor]]]:
        """Each Linear with those of the tensors that take the place of its own."""
        found: dict[FrozenLinear, dict[str, torch.Tensor]] = {}
        for (linear, name), tensor in zip(self.owners, tensors, strict=True):
            found.setdefault(linear, {})[name] = tensor
        return list(found.items())


_Placed = tuple[tuple[torch.Tensor, ...], tuple[FileRange | None, ...], tuple[int, ...], int]


def _placed(hosts: tuple[torch.Tensor, ...]) -> _Placed:
    """The fields of a Flat: where each of the tensors begins, and where the last one ends; aligned."""
    starts, end = [], 0
    for host in hosts:
        starts.append(end)
        end += aligned(host.nbytes)
    return hosts, tuple(map(range_of, hosts)), tuple(starts), end


def aligned(nbytes: int) -> int:
    """What a tensor of so many bytes takes of a run."""
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


def frozen_linears(block: nn.Module) -> list[FrozenLinear]:
    """The frozen Linears in a block, those that a LoRA is around included."""
    return [module for module in block.modules() if isinstance(module, FrozenLinear)]


def bind(linears: list[tuple[FrozenLinear, Mapping[str, torch.Tensor]]]) -> None:
    """Makes each Linear compute with the tensors that stand beside it."""
    for linear, tensors in linears:
        linear.bind(tensors)
