"""Feed-forwards in parts of the sequence: what is computed for one token needs no other, and is four times as wide as the model.

Shape suffixes: B batch, N tokens, D features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache, partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def in_chunks(blocks: Iterable[nn.Module], token_wise: Iterable[str], count: int, random: bool = False) -> None:
    """Lets every block's submodules of the names `token_wise` run in `count` chunks from now on; 1: whole, as they did.

    A block that has none of them is left as it is. The class of such a submodule becomes a subclass of what it was: a function
    put on each instance would make a compiler take every block for code of its own.
    """
    for block in blocks:
        for name in token_wise:
            module: Any = getattr(block, name, None)
            if module is None or (count == 1 and not hasattr(module, "chunks")):
                continue
            if not hasattr(module, "chunks"):
                module.__class__ = _chunked(type(module))  # type: ignore[arg-type]  # a class can be hashed
            module.chunks, module.chunks_random = count, random


@cache
def _chunked(kind: Any) -> type[nn.Module]:
    """The class with a forward that is computed for parts of the sequence, one after the other.

    With gradients each part is computed once more in the backward pass, so that only one of them is in memory then too. The
    sums over tokens in the gradients of trained weights are taken part by part: they differ by rounding from those of the whole.
    """

    def forward(self: Any, tokens_BND: torch.Tensor) -> torch.Tensor:
        whole: Callable[[torch.Tensor], torch.Tensor] = partial(kind.forward, self)
        if self.chunks == 1 or tokens_BND.shape[1] < self.chunks:
            return whole(tokens_BND)
        parts = tokens_BND.chunk(self.chunks, dim=1)
        if not torch.is_grad_enabled():
            return torch.cat([whole(part) for part in parts], dim=1)
        return torch.cat([checkpoint(whole, part, use_reentrant=False, preserve_rng_state=self.chunks_random) for part in parts], dim=1)

    return type(f"Chunked{kind.__name__}", (kind,), {"forward": forward})
