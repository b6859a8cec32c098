"""LTX-Video's block in chunks: what diffusers' LTXVideoTransformerBlock computes, with all that needs no other token told apart.

Shape suffixes: B batch, N video tokens, D width, T tokens with a time of their own: N, or 1 for all.
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
    image_rotary_emb: Any = None,
    encoder_attention_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Video tokens (B, N, D) after the block; times are (B, T, 6 D)."""
    video_BND, times_BT6D = hidden_states, temb.reshape(*temb.shape[:2], 6, -1)

    def before_attention(video_BND: torch.Tensor, times_BT6D: torch.Tensor) -> torch.Tensor:
        shift, scale = _rows(block, times_BT6D, 0, 2)
        modulated_BND: torch.Tensor = block.norm1(video_BND) * (1 + scale) + shift
        return modulated_BND

    def gated(video_BND: torch.Tensor, attended_BND: torch.Tensor, times_BT6D: torch.Tensor) -> torch.Tensor:
        (gate,) = _rows(block, times_BT6D, 2, 3)
        return video_BND + attended_BND * gate

    def feed_forward(video_BND: torch.Tensor, times_BT6D: torch.Tensor) -> torch.Tensor:
        shift, scale, gate = _rows(block, times_BT6D, 3, 6)
        fed_BND: torch.Tensor = block.ff(block.norm2(video_BND) * (1 + scale) + shift)
        return video_BND + fed_BND * gate

    attended_BND = block.attn1(
        hidden_states=chunks(before_attention, video_BND, times_BT6D), encoder_hidden_states=None, image_rotary_emb=image_rotary_emb
    )
    video_BND = (chunks if times_BT6D.shape[1] > 1 else chunks.linear)(gated, video_BND, attended_BND, times_BT6D)
    video_BND = video_BND + block.attn2(
        video_BND, encoder_hidden_states=encoder_hidden_states, image_rotary_emb=None, attention_mask=encoder_attention_mask
    )
    return chunks.last(feed_forward, video_BND, times_BT6D)


def _rows(block: Any, times_BT6D: torch.Tensor, first: int, end: int) -> tuple[torch.Tensor, ...]:
    """Some of shift, scale and gate of attention and of the feed-forward, each (B, T, D)."""
    table_6D: torch.Tensor = block.scale_shift_table.to(times_BT6D.device)
    return (table_6D[first:end] + times_BT6D[:, :, first:end]).unbind(2)


_PARTS = {"": ("norm1", "attn1", "norm2", "attn2", "ff", "scale_shift_table")}

CHUNKED = (ChunkedForward("LTXVideoTransformerBlock", _PARTS, _forward, ends=("ff.net.2",), ungated=("attn1", "attn2", "ff")),)
