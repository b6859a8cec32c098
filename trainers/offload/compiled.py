"""Blocks compiled by torch.compile, one graph for all blocks of a class.

A whole transformer takes minutes to compile; its blocks are the same code with other weights, and are compiled once.
Weights are inputs of the graph: those of a streamed block may be others at every call, and nothing is compiled again.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

_VARIANTS = 32


def compiled(block: nn.Module, backend: str | Callable[..., Any] = "inductor") -> Callable[..., Any]:
    """What is called in place of `block.forward`: the forward of its class, compiled at the first call.

    Compiled anew, for all blocks of the class, when it first runs without and with gradients, and in training and in eval mode;
    a size (tokens, rows of text) that changes is from then on any size. Some seconds each on a CPU, more on a card.
    """
    forward = _compiled_forward(type(block), backend)  # type: ignore[arg-type]  # a class can be hashed

    def call(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():  # whether an input requires gradients makes no difference then, but would to torch
            args, kwargs = tree_map_only(torch.Tensor, torch.Tensor.detach, (args, kwargs))
        return forward(block, *args, **kwargs)

    return call


@cache
def _compiled_forward(kind: type[nn.Module], backend: Any) -> Callable[..., Any]:
    from torch._dynamo import config  # what `torch.compile` imports, some seconds

    # Beyond this many, torch runs the block as it is: by default 8, which sizes, modes and caption lengths can use up.
    config.recompile_limit = max(config.recompile_limit, _VARIANTS)
    found: Callable[..., Any] = torch.compile(kind.forward, backend=backend)
    return found
