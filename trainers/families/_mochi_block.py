"""Mochi's block in chunks: what diffusers' MochiTransformerBlock computes, with all that needs no other token told apart.

The text is short and never cut; the last block computes none of it after attention.

Shape suffixes: B batch, N video tokens, L text rows, A any of them, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..offload.chunks import ChunkedForward, Chunks


def _forward(
    block: Any,
    chunks: Chunks,
    hidden_states: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    temb: torch.Tensor,
    encoder_attention_mask: torch.Tensor,
    image_rotary_emb: Any = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Video (B, N, D) and text (B, L, ...) after the block; the time is (B, D)."""
    video_BND, text_BLD = hidden_states, encoder_hidden_states
    scale, *rows = block.norm1.linear(block.norm1.silu(temb))[:, None].chunk(4, dim=2)
    normed_BLD, *text_rows = block.norm1_context(text_BLD, temb) if not block.context_pre_only else (block.norm1_context(text_BLD, temb),)

    def before(video_BND: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        normed_BND: torch.Tensor = block.norm1.norm(video_BND.float()) * (1 + scale.float())
        return normed_BND.to(video_BND.dtype)

    attended_BND, attended_BLD = block.attn1(
        hidden_states=chunks(before, video_BND, scale),
        encoder_hidden_states=normed_BLD,
        image_rotary_emb=image_rotary_emb,
        attention_mask=encoder_attention_mask,
    )
    after = _after(block.norm2, block.norm3, block.ff, block.norm4)
    video_BND = chunks.last(after, video_BND, attended_BND, *rows)
    if not block.context_pre_only:
        after = _after(block.norm2_context, block.norm3_context, block.ff_context, block.norm4_context)
        text_BLD = after(text_BLD, attended_BLD, *(row[:, None] for row in text_rows))
    return video_BND, text_BLD


def _after(norm2: Any, norm3: Any, feed_forward: Any, norm4: Any) -> Callable[..., torch.Tensor]:
    """What follows attention; the rows are (B, 1, D)."""

    def stretch(
        tokens_BAD: torch.Tensor, attended_BAD: torch.Tensor, gate: torch.Tensor, ff_scale: torch.Tensor, ff_gate: torch.Tensor
    ) -> torch.Tensor:
        tokens_BAD = tokens_BAD + norm2(attended_BAD, torch.tanh(gate))
        fed_BAD = feed_forward(norm3(tokens_BAD, 1 + ff_scale.float()))
        found: torch.Tensor = tokens_BAD + norm4(fed_BAD, torch.tanh(ff_gate))
        return found

    return stretch


_ADAPTIVE = ("silu", "linear", "norm")
_LAST = ("norm1", "norm1_context", "attn1", "norm2", "norm3", "ff", "norm4", "norm4_context")

CHUNKED = (
    ChunkedForward("MochiTransformerBlock", {"": (*_LAST, "norm2_context", "norm3_context", "ff_context"), "norm1": _ADAPTIVE}, _forward),
    ChunkedForward("MochiTransformerBlock", {"": _LAST, "norm1": _ADAPTIVE}, _forward),
)
