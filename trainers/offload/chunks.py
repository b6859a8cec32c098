"""Feed-forwards in parts of the sequence: what is computed for one token needs no other, and is four times as wide as the model.

Shape suffixes: B batch, N tokens, D features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


@dataclass
class InChunks:
    """The forward of a token-wise module, computed for `count` parts of the sequence one after the other.

    With gradients each part is computed once more in the backward pass, so that only one of them is in memory then too. The
    sums over tokens in the gradients of trained weights are taken part by part: they differ by rounding from those of the whole.
    """

    inner: Callable[[torch.Tensor], torch.Tensor]
    count: int
    random: bool = False

    def __call__(self, tokens_BND: torch.Tensor) -> torch.Tensor:
        if self.count == 1 or tokens_BND.shape[1] < self.count:
            return self.inner(tokens_BND)
        parts = tokens_BND.chunk(self.count, dim=1)
        if not torch.is_grad_enabled():
            return torch.cat([self.inner(part) for part in parts], dim=1)
        return torch.cat([checkpoint(self.inner, part, use_reentrant=False, preserve_rng_state=self.random) for part in parts], dim=1)


def in_chunks(blocks: Iterable[nn.Module], token_wise: Iterable[str], count: int, random: bool = False) -> None:
    """Lets every block's submodules of the names `token_wise` run in `count` chunks from now on; 1: whole, as they did.

    A block that has none of them is left as it is.
    """
    for block in blocks:
        for name in token_wise:
            module = getattr(block, name, None)
            if module is None:
                continue
            if not isinstance(module.__dict__.get("forward"), InChunks):
                module.forward = InChunks(module.forward, 1, random)
            module.forward.count = count
