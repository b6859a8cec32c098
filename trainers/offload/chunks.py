"""Blocks in parts of the sequence: what is computed for one token needs no other, and takes several times what is kept of it.

Norms and modulation compute in float32, feed-forwards are four times as wide as the model. A family writes the forward pass of
its blocks with each such stretch told apart (`ChunkedForward`); only attention sees the sequence whole.

Shape suffixes: B batch, N tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from inspect import Parameter, signature
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import get_gradient_edge
from torch.utils.checkpoint import checkpoint

from .linear import FrozenLinear
from .unread import are_outputs_unread, outputs_unread


@dataclass(frozen=True)
class Chunks:
    """In how many parts a stretch is computed. `random`: it draws dropout, whose draws are repeated. `trained`: what may get gradients."""

    count: int
    random: bool = False
    trained: tuple[nn.Parameter, ...] = ()

    def __call__(self, stretch: Callable[..., Any], *tensors: torch.Tensor) -> Any:
        """`stretch(*tensors)`, a tensor or several; each tensor is (B, N, ...), or (B, 1, ...) for what is the same for all tokens.

        With gradients each part is computed once more in the backward pass, so that of one part only there is more than
        `tensors` then too. Sums over tokens in the gradients of trained weights are taken part by part: they differ by
        rounding from those of the whole, as matrix products of fewer rows may.
        """
        return self._joined(self._recomputed if torch.is_grad_enabled() else _plainly, stretch, tensors)

    def last(self, stretch: Callable[..., torch.Tensor], *tensors: torch.Tensor) -> torch.Tensor:
        """The same for the stretch that a block ends with, which gives the shape and dtype of its first tensor.

        Where outputs are not read it runs in the backward pass only; with dropout too before it, since draws follow each other.
        """
        if self.random or not are_outputs_unread():
            found: torch.Tensor = self(stretch, *tensors)
            return found
        unread: torch.Tensor = _Later.apply(self, stretch, *tensors, *self.trained)  # type: ignore[no-untyped-call]
        return unread

    def linear(self, stretch: Callable[..., Any], *tensors: torch.Tensor) -> Any:
        """The same for a stretch that autograd keeps nothing of, such as sums and products with what is not trained."""
        return self._joined(_plainly, stretch, tensors)

    def _joined(self, run: Callable[..., Any], stretch: Callable[..., Any], tensors: tuple[torch.Tensor, ...]) -> Any:
        parts = list(self.parts(tensors))
        return run(stretch, *parts[0]) if len(parts) == 1 else torch.cat([run(stretch, *part) for part in parts], dim=1)

    def parts(self, tensors: Sequence[torch.Tensor]) -> Iterator[tuple[torch.Tensor, ...]]:
        """What the stretch gets each time: all of fewer tokens than parts."""
        tokens = max(tensor.shape[1] for tensor in tensors)
        count = self.count if tokens >= self.count else 1
        cut = [tensor.chunk(count, dim=1) if tensor.shape[1] == tokens else (tensor,) * count for tensor in tensors]
        yield from zip(*cut, strict=False)  # `chunk` may make fewer parts

    def _recomputed(self, stretch: Callable[..., Any], *tensors: torch.Tensor) -> Any:
        return checkpoint(stretch, *tensors, use_reentrant=False, preserve_rng_state=self.random)


class _Later(torch.autograd.Function):
    """A stretch that nobody reads: memory without values, and in the backward pass part after part and its gradient."""

    @staticmethod
    def forward(ctx: Any, chunks: Chunks, stretch: Callable[..., torch.Tensor], *given: torch.Tensor) -> torch.Tensor:
        """`given` are the tensors of the stretch, and after them what is trained."""
        ctx.chunks, ctx.stretch = chunks, stretch
        ctx.save_for_backward(*given[: len(given) - len(chunks.trained)])
        return torch.empty_like(given[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        tensors, trained = ctx.saved_tensors, ctx.chunks.trained
        needed = ctx.needs_input_grad[2 : 2 + len(tensors)]
        found: list[list[torch.Tensor]] = [[] for _ in tensors]
        with _gradients_of(trained) as of_trained:
            for part, *rest in reversed(list(ctx.chunks.parts([gradient, *tensors]))):  # as autograd would
                inputs = [tensor.detach().requires_grad_(need) for tensor, need in zip(rest, needed, strict=True)]
                with torch.enable_grad(), outputs_unread():
                    output = ctx.stretch(*inputs)
                if not output.requires_grad:
                    continue
                end = get_gradient_edge(output)
                del output  # nobody reads it here either
                torch.autograd.backward([end], [part])
                for gradients, input in zip(found, inputs, strict=True):
                    gradients += [] if input.grad is None else [input.grad]
        return (None, None, *map(_whole, found, tensors), *of_trained)


@contextmanager
def _gradients_of(parameters: Sequence[nn.Parameter]) -> Iterator[list[torch.Tensor | None]]:
    """Filled at its end with the gradients that came within it; those of earlier passes are left as they were.

    Added to them part by part, small gradients in bf16 would be rounded away.
    """
    earlier, found = [parameter.grad for parameter in parameters], list[torch.Tensor | None]()
    for parameter in parameters:
        parameter.grad = None
    try:
        yield found
    finally:
        found += [parameter.grad for parameter in parameters]
        for parameter, gradient in zip(parameters, earlier, strict=True):
            parameter.grad = gradient


def _whole(gradients: list[torch.Tensor], tensor: torch.Tensor) -> torch.Tensor | None:
    """The gradient of a tensor from those of its parts, the last part first; each part may have been all of it."""
    if not gradients:
        return None
    if gradients[0].shape != tensor.shape:
        return torch.cat(gradients[::-1], dim=1)
    total, *others = gradients
    for other in others:
        total = total + other
    return total


def _plainly(stretch: Callable[..., Any], *tensors: torch.Tensor) -> Any:
    return stretch(*tensors)


@dataclass(frozen=True, eq=False)
class ChunkedForward:
    """The forward pass of a class of blocks in chunks, with the numbers of the class's own.

    `of` is the class's name. `parts` are the names of all submodules and parameters of the block (under "") and of those
    submodules that `forward` looks into. `forward(block, chunks, ...)` takes what the class's own takes.

    `ends` are the Linears whose product the class only scales by a gate and adds to what it returns; training of the parts
    `ungated` trains no gate.
    """

    of: str
    parts: Mapping[str, Sequence[str]]
    forward: Callable[..., Any]
    ends: Sequence[str] = ()
    ungated: Sequence[str] = ()

    def suits(self, block: nn.Module) -> bool:
        """Whether the block is what this was written for: another release of its library may have changed the class."""
        if type(block).__name__ != self.of or _arguments(type(block).forward)[1:] != _arguments(self.forward)[2:]:
            return False
        return all(_parts_of(block.get_submodule(name)) == set(parts) for name, parts in self.parts.items())


def whole_only(blocks: Iterable[nn.Module], forwards: Sequence[ChunkedForward]) -> list[str]:
    """The names of classes that no forward suits."""
    return sorted({type(block).__name__ for block in blocks if _forward_of(block, forwards) is None})


def in_chunks(blocks: Iterable[nn.Module], forwards: Sequence[ChunkedForward], count: int, random: bool = False) -> None:
    """Lets the blocks run in `count` chunks from now on; 1: whole, as they did. One that no forward suits stays as it is.

    The class of a block becomes a subclass of what it was: a function put on each instance would make a compiler take every
    block for code of its own. So the first call, whatever its count, must come before anything takes the block's `forward`.
    """
    for module in blocks:
        block: Any = module
        forward = _forward_of(block, forwards)
        if forward is None:
            continue
        if not hasattr(block, "chunks"):
            block.__class__ = _chunked(type(block), forward)  # type: ignore[arg-type]  # a class can be hashed
        block.chunks = Chunks(count, random, tuple(parameter for parameter in block.parameters() if parameter.requires_grad))


def rest_at_ends(transformer: nn.Module, blocks: Sequence[nn.Module], forwards: Sequence[ChunkedForward]) -> None:
    """Lets the Linears that blocks end with compute nothing where nobody reads what they give.

    The gradient of a Linear's input needs no product. That of a gate does: nothing changes when anything is trained, here or
    outside the blocks, that a gate may depend on.
    """
    known = [(block, forward) for block in blocks if (forward := _forward_of(block, forwards))]
    ungated = {parameter for block, forward in known for name in forward.ungated for parameter in block.get_submodule(name).parameters()}
    if any(parameter.requires_grad and parameter not in ungated for parameter in transformer.parameters()):
        return
    for block, forward in known:
        for name in forward.ends:
            linear = block.get_submodule(name)
            linear = getattr(linear, "base_layer", linear)  # peft's layer holds it
            if isinstance(linear, FrozenLinear):
                linear.ends_block = True


def _forward_of(block: nn.Module, forwards: Iterable[ChunkedForward]) -> ChunkedForward | None:
    found: ChunkedForward | None = getattr(type(block), "chunked_forward", None)
    return found or next((forward for forward in forwards if forward.suits(block)), None)


@cache
def _chunked(kind: Any, chunked: ChunkedForward) -> type[nn.Module]:
    whole = kind.forward  # a compiler that was told to take the class as it is (diffusers does) would stop at `kind.forward`

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.chunks.count == 1:
            return whole(self, *args, **kwargs)
        return chunked.forward(self, self.chunks, *args, **kwargs)

    return type(f"Chunked{kind.__name__}", (kind,), {"forward": forward, "chunked_forward": chunked})


def _arguments(function: Callable[..., Any]) -> list[str]:
    return [name for name, given in signature(function).parameters.items() if given.kind == Parameter.POSITIONAL_OR_KEYWORD]


def _parts_of(module: nn.Module) -> set[str]:
    return {name for name, _ in (*module.named_children(), *module.named_parameters(recurse=False))}
