"""Wan's block in chunks: what diffusers' WanTransformerBlock computes, with all that needs no other token told apart.

Shape suffixes: B batch, N video tokens, L text rows, D width, T tokens with a time of their own: N, or 1 for all.
"""

from __future__ import annotations

from typing import Any

import torch

from ..offload.chunks import ChunkedForward, Chunks


def _forward(
    block: Any,
    chunks: Chunks,
    hidden_states: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    temb: torch.Tensor,
    rotary_emb: Any,
) -> torch.Tensor:
    """Video tokens (B, N, D) after the block; times are (B, 6, D), or (B, N, 6, D) for each token its own."""
    video_BND, times_BT6D = hidden_states, temb if temb.ndim == 4 else temb[:, None]

    def before_attention(video_BND: torch.Tensor, times_BT6D: torch.Tensor) -> torch.Tensor:
        shift, scale = _rows(block, times_BT6D, 0, 2)
        modulated_BND: torch.Tensor = block.norm1(video_BND.float()) * (1 + scale) + shift
        return modulated_BND.type_as(video_BND)

    def gated(video_BND: torch.Tensor, attended_BND: torch.Tensor, times_BT6D: torch.Tensor) -> torch.Tensor:
        (gate,) = _rows(block, times_BT6D, 2, 3)
        return (video_BND.float() + attended_BND * gate).type_as(video_BND)

    def before_cross_attention(video_BND: torch.Tensor) -> torch.Tensor:
        normed_BND: torch.Tensor = block.norm2(video_BND.float())
        return normed_BND.type_as(video_BND)

    def feed_forward(video_BND: torch.Tensor, times_BT6D: torch.Tensor) -> torch.Tensor:
        shift, scale, gate = _rows(block, times_BT6D, 3, 6)
        fed_BND: torch.Tensor = block.ffn((block.norm3(video_BND.float()) * (1 + scale) + shift).type_as(video_BND))
        return (video_BND.float() + fed_BND.float() * gate).type_as(video_BND)

    attended_BND = block.attn1(chunks(before_attention, video_BND, times_BT6D), None, None, rotary_emb)
    video_BND = (chunks if times_BT6D.shape[1] > 1 else chunks.linear)(gated, video_BND, attended_BND, times_BT6D)
    video_BND = video_BND + block.attn2(chunks(before_cross_attention, video_BND), encoder_hidden_states, None, None)
    return chunks.last(feed_forward, video_BND, times_BT6D)


def _rows(block: Any, times_BT6D: torch.Tensor, first: int, end: int) -> tuple[torch.Tensor, ...]:
    """Some of shift, scale and gate of attention and of the feed-forward, each (B, T, D), float32."""
    table_16D: torch.Tensor = block.scale_shift_table[:, first:end]
    return (table_16D + times_BT6D[:, :, first:end].float()).unbind(2)


_PARTS = {"": ("norm1", "attn1", "norm2", "attn2", "ffn", "norm3", "scale_shift_table")}

CHUNKED = (ChunkedForward("WanTransformerBlock", _PARTS, _forward, ends=("ffn.net.2",), ungated=("attn1", "attn2", "ffn")),)
