"""Blocks in parts of the sequence: what is computed for one token needs no other, and takes several times what is kept of it.

Norms and modulation compute in float32, feed-forwards are four times as wide as the model. A family writes the forward pass of
its blocks with each such stretch told apart (`ChunkedForward`); only attention sees the sequence whole.

Shape suffixes: B batch, N tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from inspect import Parameter, signature
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class Chunks:
    """In how many parts a stretch is computed. `random`: it draws dropout, whose draws are repeated."""

    count: int
    random: bool = False

    def __call__(self, stretch: Callable[..., Any], *tensors: torch.Tensor) -> Any:
        """`stretch(*tensors)`, a tensor or several; each tensor is (B, N, ...), or (B, 1, ...) for what is the same for all tokens.

        With gradients each part is computed once more in the backward pass, so that of one part only there is more than
        `tensors` then too. Sums over tokens in the gradients of trained weights are taken part by part: they differ by
        rounding from those of the whole, as matrix products of fewer rows may.
        """
        return self._joined(self._recomputed if torch.is_grad_enabled() else _plainly, stretch, tensors)

    def linear(self, stretch: Callable[..., Any], *tensors: torch.Tensor) -> Any:
        """The same for a stretch that autograd keeps nothing of, such as sums and products with what is not trained."""
        return self._joined(_plainly, stretch, tensors)

    def _joined(self, run: Callable[..., Any], stretch: Callable[..., Any], tensors: tuple[torch.Tensor, ...]) -> Any:
        tokens = max(tensor.shape[1] for tensor in tensors)
        if tokens < self.count:
            return run(stretch, *tensors)
        cut = [tensor.chunk(self.count, dim=1) if tensor.shape[1] == tokens else [tensor] * self.count for tensor in tensors]
        return torch.cat([run(stretch, *part) for part in zip(*cut, strict=False)], dim=1)  # `chunk` may make fewer parts

    def _recomputed(self, stretch: Callable[..., Any], *tensors: torch.Tensor) -> Any:
        return checkpoint(stretch, *tensors, use_reentrant=False, preserve_rng_state=self.random)


def _plainly(stretch: Callable[..., Any], *tensors: torch.Tensor) -> Any:
    return stretch(*tensors)


@dataclass(frozen=True, eq=False)
class ChunkedForward:
    """The forward pass of a class of blocks in chunks, with the numbers of the class's own.

    `of` is the class's name. `parts` are the names of all submodules and parameters of the block (under "") and of those
    submodules that `forward` looks into. `forward(block, chunks, ...)` takes what the class's own takes.
    """

    of: str
    parts: Mapping[str, Sequence[str]]
    forward: Callable[..., Any]

    def suits(self, block: nn.Module) -> bool:
        """Whether the block is what this was written for: another release of its library may have changed the class."""
        if type(block).__name__ != self.of or _arguments(type(block).forward)[1:] != _arguments(self.forward)[2:]:
            return False
        return all(_parts_of(block.get_submodule(name)) == set(parts) for name, parts in self.parts.items())


def in_chunks(blocks: Iterable[nn.Module], forwards: Iterable[ChunkedForward], count: int, random: bool = False) -> None:
    """Lets the blocks run in `count` chunks from now on; 1: whole, as they did. One that no forward suits stays as it is.

    The class of a block becomes a subclass of what it was: a function put on each instance would make a compiler take every
    block for code of its own. So the first call, whatever its count, must come before anything takes the block's `forward`.
    """
    forwards = tuple(forwards)
    for module in blocks:
        block: Any = module
        if not hasattr(block, "chunks"):
            forward = next((forward for forward in forwards if forward.suits(block)), None)
            if forward is None:
                continue
            block.__class__ = _chunked(type(block), forward)  # type: ignore[arg-type]  # a class can be hashed
        block.chunks = Chunks(count, random)


@cache
def _chunked(kind: Any, chunked: ChunkedForward) -> type[nn.Module]:
    whole = kind.forward  # a compiler that was told to take the class as it is (diffusers does) would stop at `kind.forward`

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.chunks.count == 1:
            return whole(self, *args, **kwargs)
        return chunked.forward(self, self.chunks, *args, **kwargs)

    return type(f"Chunked{kind.__name__}", (kind,), {"forward": forward})


def _arguments(function: Callable[..., Any]) -> list[str]:
    return [name for name, given in signature(function).parameters.items() if given.kind == Parameter.POSITIONAL_OR_KEYWORD]


def _parts_of(module: nn.Module) -> set[str]:
    return {name for name, _ in (*module.named_children(), *module.named_parameters(recurse=False))}
