"""Attention in several launches where one would run into a display's time limit.

A GPU that draws a display ends a kernel that runs for seconds: Windows after 2, and the run is lost. Attention over a long clip
is such a kernel (Wan 14B, 81 frames of 1280x720, on an RTX 3060: 10 s). Heads know nothing of each other, so groups of them are
computed one after the other, with the same bits.

Shape suffixes: B batch, N queries, M keys, H heads, D width of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .attention import BACKENDS
from .machine import Machine
from .memory_plan import ATTENTION_EFFICIENCY

LONGEST_SECONDS = 0.5
"""Of one launch, as computed from the measured rate: a quarter of Windows' limit."""

Attend = Callable[..., torch.Tensor]


def limit_attention(machine: Machine | None) -> None:
    """From now on, in this process, no launch of a model's attention runs into the time limit of the machine's GPU, if it has one.

    diffusers' dispatcher is where all models ask for attention, whatever their blocks, masks and libraries.
    """
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    known = _AttentionBackendRegistry._backends
    for name in ("native", *(backend.diffusers_name for backend in BACKENDS.values())):
        attend = known[AttentionBackendName(name)]
        whole = getattr(attend, "whole", attend)
        known[AttentionBackendName(name)] = by_heads(whole, _most_flops(machine)) if machine and machine.kernel_time_limit else whole


def _most_flops(machine: Machine) -> int:
    return int(LONGEST_SECONDS * ATTENTION_EFFICIENCY * machine.flops_rate)


def by_heads(whole: Attend, most_flops: int) -> Attend:
    """`whole`, called for a group of heads at a time: of at most `most_flops` operations, or of one head."""

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None = None, **given: Any) -> Any:
        count = _groups(query, key, most_flops)
        if attn_mask is not None:
            given["attn_mask"] = attn_mask
        if count == 1:
            return whole(query=query, key=key, value=value, **given)
        size = key.shape[2] // count
        keys, values = torch.split(key, size, dim=2), torch.split(value, size, dim=2)
        sizes = [part.shape[2] * query.shape[2] // key.shape[2] for part in keys]  # several heads may share keys
        masks = _masks(attn_mask, sizes, query.shape[2])
        parts = zip(query.split_with_sizes(sizes, dim=2), keys, values, masks, strict=True)
        return torch.cat([whole(query=q, key=k, value=v, **(given | mask)) for q, k, v, mask in parts], dim=2)

    attend.whole = whole  # type: ignore[attr-defined]
    return attend


def _groups(query_BNHD: torch.Tensor, key_BMHD: torch.Tensor, most_flops: int) -> int:
    """1, 2, 4, 8 ...: so that a compiler sees a few cases, not a number for each size. The longest launch is the backward pass.

    That has five products of queries and keys (flash attention 2, section 3.1).
    """
    batch, queries, heads, width = query_BNHD.shape
    flops = 10 * batch * queries * heads * width * key_BMHD.shape[1]
    count = 1
    while count < key_BMHD.shape[2] and flops > count * most_flops:
        count *= 2
    return min(count, key_BMHD.shape[2])


def _masks(mask: torch.Tensor | None, sizes: list[int], heads: int) -> list[dict[str, torch.Tensor]]:
    """What each group is given as its mask: the whole, or its own heads' part of one that has heads."""
    if mask is None:
        return [{} for _ in sizes]
    has_heads = mask.ndim == 4 and mask.shape[1] == heads > 1
    return [{"attn_mask": part} for part in (mask.split_with_sizes(sizes, dim=1) if has_heads else [mask] * len(sizes))]
