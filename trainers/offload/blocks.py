"""How the blocks of a transformer run: their weights fetched, their inputs kept, each computed again in the backward pass.

Every block's `forward` is wrapped on the block itself, so that the model's own code calls it as it always did.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils import _pytree as pytree

from .activations import Arena
from .stream import Stream, Way
from .unread import outputs_unread

_TENSOR = object()
"""Stands for a tensor among the arguments of a block."""

_WORTH_COPYING_BYTES = 1 << 20


@dataclass
class Blocks:
    """The wrapped blocks of a transformer, in the order they run; what is set here holds from the next forward pass on.

    `stream` None: all weights are on the device. `arena` None: inputs are kept on the device. `checkpointing` False: what
    the blocks compute is kept for the backward pass. `random`: there is dropout, whose draws are repeated.
    """

    modules: Sequence[nn.Module]
    random: bool = False
    stream: Stream | None = None
    arena: Arena | None = None
    checkpointing: bool = True
    _anchor: torch.Tensor = field(default_factory=lambda: torch.zeros(0, requires_grad=True))

    def __post_init__(self) -> None:
        for index, module in enumerate(self.modules):
            module.forward = _Wrapped(self, index, module.forward)

    def run_with(self, forwards: Sequence[Callable[..., Any]]) -> None:
        """Gives each block another function in place of its own forward (a compiled one)."""
        for module, forward in zip(self.modules, forwards, strict=True):
            assert isinstance(module.forward, _Wrapped)
            module.forward.inner = forward

    def close(self) -> None:
        """The blocks run as they did before."""
        for module in self.modules:
            if isinstance(module.__dict__.get("forward"), _Wrapped):
                del module.forward

    def fetch(self, index: int, way: Way) -> None:
        if self.stream is not None:
            self.stream.fetch(index, way)


@dataclass
class _Wrapped:
    """A block's forward. Called in training it keeps the block's input only."""

    blocks: Blocks
    index: int
    inner: Callable[..., Any]

    @property
    def is_last(self) -> bool:
        return self.index == len(self.blocks.modules) - 1

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        blocks = self.blocks
        if not (torch.is_grad_enabled() and blocks.checkpointing):
            blocks.fetch(self.index, "turning" if torch.is_grad_enabled() else "forward")
            return self.inner(*args, **kwargs)
        if self.index == 0 and blocks.arena is not None:
            blocks.arena.reset()
        leaves, tree = pytree.tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        call = _Call(self, [_TENSOR if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves], tree, blocks.random)
        outputs = _Checkpoint.apply(call, blocks._anchor, *tensors)  # type: ignore[no-untyped-call]
        return pytree.tree_unflatten(outputs, call.outputs)


@dataclass
class _Call:
    """One call of a block: its arguments but for the tensors, and the form of what it returns."""

    wrapped: _Wrapped
    leaves: list[Any]
    tree: pytree.TreeSpec
    random: bool
    outputs: pytree.TreeSpec = field(init=False)
    draws: tuple[torch.Tensor, torch.Tensor | None] | None = None

    def run(self, tensors: Sequence[torch.Tensor], way: Way) -> list[torch.Tensor]:
        """What the block makes of the tensors of its arguments."""
        self.wrapped.blocks.fetch(self.wrapped.index, way)
        rest = iter(tensors)
        leaves = [next(rest) if leaf is _TENSOR else leaf for leaf in self.leaves]
        args, kwargs = pytree.tree_unflatten(leaves, self.tree)
        outputs: list[torch.Tensor]
        outputs, self.outputs = pytree.tree_flatten(self.wrapped.inner(*args, **kwargs))
        return outputs

    def remember_draws(self, device: torch.device) -> None:
        if self.random:
            on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
            self.draws = torch.get_rng_state(), on_device

    def same_draws(self, device: torch.device) -> AbstractContextManager[None]:
        """Within it dropout draws what it drew in the forward pass."""
        return _same_draws(self.draws, device) if self.draws else nullcontext()


@contextmanager
def _same_draws(states: tuple[torch.Tensor, torch.Tensor | None], device: torch.device) -> Iterator[None]:
    on_cpu, on_device = states
    with torch.random.fork_rng([] if on_device is None else [device]):
        torch.set_rng_state(on_cpu)
        if on_device is not None:
            torch.cuda.set_rng_state(on_device, device)
        yield


class _Checkpoint(torch.autograd.Function):
    """A block of which only the input is kept (Chen et al. 2016, https://arxiv.org/abs/1604.06174).

    Unlike torch's own checkpoint it knows when a block's weights are needed, and which of its inputs the trained blocks
    before it made: those are as many as blocks, and may wait in host memory. The others (text, times, positions) are the
    same for all blocks.
    """

    @staticmethod
    def forward(ctx: Any, call: _Call, anchor: torch.Tensor, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.call = call
        arena = call.wrapped.blocks.arena
        leaving = [index for index, needed in enumerate(ctx.needs_input_grad[2:]) if needed and _is_large(tensors[index])]
        ctx.levels = {index: arena.push(tensors[index]) for index in leaving} if arena and not call.wrapped.is_last else {}
        call.remember_draws(tensors[0].device)
        outputs = tuple(call.run(tensors, "turning"))
        ctx.save_for_backward(*(None if index in ctx.levels else tensor for index, tensor in enumerate(tensors)))
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        call: _Call = ctx.call
        arena, tensors = call.wrapped.blocks.arena, list(ctx.saved_tensors)
        if arena is not None and call.wrapped.is_last:
            arena.turn()
        for index in sorted(ctx.levels, reverse=True):
            assert arena is not None
            tensors[index] = arena.pop(ctx.levels[index])
        inputs = [tensor.detach().requires_grad_(needed) for tensor, needed in zip(tensors, ctx.needs_input_grad[2:], strict=True)]
        with torch.enable_grad(), outputs_unread(), call.same_draws(inputs[0].device):
            outputs = call.run(inputs, "backward")
        ends, grads = _ends(outputs, gradients)
        del outputs  # nobody asks for them: only for where they came from
        if ends:
            torch.autograd.backward(ends, grads)
        return (None, None, *(tensor.grad for tensor in inputs))


def _ends(outputs: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor | None]) -> tuple[list[GradientEdge], list[torch.Tensor]]:
    """Where the backward pass begins, and with what."""
    pairs = [(output, grad) for output, grad in zip(outputs, gradients, strict=True) if grad is not None and output.requires_grad]
    return [get_gradient_edge(output) for output, _ in pairs], [gradient for _, gradient in pairs]


def _is_large(tensor: torch.Tensor) -> bool:
    """Whether a tensor is worth a copy to the host and back."""
    return tensor.nbytes >= _WORTH_COPYING_BYTES
