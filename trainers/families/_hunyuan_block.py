"""HunyuanVideo's blocks in chunks: what diffusers' four classes of them compute, with all that needs no other token told apart.

Double blocks keep video and text apart, single blocks have one feed-forward and one output for both, which takes attention's
rows and the feed-forward's side by side. The text is short and never cut. In the classes called TokenReplace (I2V v2) the first
frame's tokens are modulated by a time of their own.

Shape suffixes: B batch, N video tokens, L text rows, A any of them, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..offload.chunks import ChunkedForward, Chunks

_Rows = tuple[torch.Tensor, ...]
"""Shift, scale and gate of attention, and of the feed-forward where that has its own; each (B, 1, D)."""
_Spans = list[tuple[slice, _Rows]]
"""Which video tokens are modulated by what."""


def _double(
    block: Any, chunks: Chunks, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, temb: torch.Tensor,
    attention_mask: torch.Tensor | None = None, freqs_cis: Any = None, *args: Any, **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    spans = [(slice(None), _rows(block.norm1, temb, 6))]
    return _double_block(block, chunks, hidden_states, encoder_hidden_states, temb, attention_mask, freqs_cis, spans)


def _double_replacing(
    block: Any, chunks: Chunks, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, temb: torch.Tensor,
    attention_mask: torch.Tensor | None = None, freqs_cis: Any = None,
    token_replace_emb: torch.Tensor | None = None, num_tokens: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    spans = _replaced(block.norm1, temb, token_replace_emb, num_tokens, 6)
    return _double_block(block, chunks, hidden_states, encoder_hidden_states, temb, attention_mask, freqs_cis, spans)


def _single(
    block: Any, chunks: Chunks, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, temb: torch.Tensor,
    attention_mask: torch.Tensor | None = None, image_rotary_emb: Any = None, *args: Any, **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    spans = [(slice(None), _rows(block.norm, temb, 3))]
    return _single_block(block, chunks, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb, spans)


def _single_replacing(
    block: Any, chunks: Chunks, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, temb: torch.Tensor,
    attention_mask: torch.Tensor | None = None, image_rotary_emb: Any = None,
    token_replace_emb: torch.Tensor | None = None, num_tokens: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    spans = _replaced(block.norm, temb, token_replace_emb, num_tokens, 3)
    return _single_block(block, chunks, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb, spans)


def _double_block(
    block: Any, chunks: Chunks, video_BND: torch.Tensor, text_BLD: torch.Tensor, time_BD: torch.Tensor,
    mask: torch.Tensor | None, angles: Any, spans: _Spans,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Video (B, N, D) and text (B, L, D) after the block; `spans` have six rows each."""

    def before(norm: Any) -> Callable[..., torch.Tensor]:
        def stretch(tokens_BAD: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
            return _modulated(norm, tokens_BAD, shift, scale)

        return stretch

    def after(norm: Any, feed_forward: Any) -> Callable[..., torch.Tensor]:
        def stretch(tokens_BAD: torch.Tensor, attended_BAD: torch.Tensor, *rows: torch.Tensor) -> torch.Tensor:
            _, _, gate, shift, scale, ff_gate = rows
            tokens_BAD = tokens_BAD + attended_BAD * gate
            fed_BAD: torch.Tensor = feed_forward(_modulated(norm, tokens_BAD, shift, scale))
            return tokens_BAD + ff_gate * fed_BAD

        return stretch

    text_rows = _rows(block.norm1_context, time_BD, 6)
    attended_BND, attended_BLD = block.attn(
        hidden_states=_along(chunks, before(block.norm1.norm), spans, video_BND),
        encoder_hidden_states=before(block.norm1_context.norm)(text_BLD, *text_rows),
        attention_mask=mask,
        image_rotary_emb=angles,
    )
    video_BND = _along(chunks.last, after(block.norm2, block.ff), spans, video_BND, attended_BND)
    return video_BND, after(block.norm2_context, block.ff_context)(text_BLD, attended_BLD, *text_rows)


def _single_block(
    block: Any, chunks: Chunks, video_BND: torch.Tensor, text_BLD: torch.Tensor, mask: torch.Tensor | None, angles: Any, spans: _Spans
) -> tuple[torch.Tensor, torch.Tensor]:
    """Video (B, N, D) and text (B, L, D) after the block; `spans` have three rows each, the last one's are the text's too."""

    def before(tokens_BAD: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        return _modulated(block.norm.norm, tokens_BAD, shift, scale)

    def after(tokens_BAD: torch.Tensor, attended_BAD: torch.Tensor, *rows: torch.Tensor) -> torch.Tensor:
        wide_BAD = block.act_mlp(block.proj_mlp(before(tokens_BAD, *rows)))
        # Times 1, so that the gradient of the attended rows is a tensor of its own, not a view that keeps the wide one of all parts.
        found: torch.Tensor = rows[-1] * block.proj_out(torch.cat([attended_BAD * 1, wide_BAD], dim=2))
        return found + tokens_BAD

    _, text_rows = spans[-1]
    attended_BND, attended_BLD = block.attn(
        hidden_states=_along(chunks, before, spans, video_BND),
        encoder_hidden_states=before(text_BLD, *text_rows),
        attention_mask=mask,
        image_rotary_emb=angles,
    )
    return _along(chunks.last, after, spans, video_BND, attended_BND), after(text_BLD, attended_BLD, *text_rows)


def _modulated(norm: Any, tokens_BAD: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = norm(tokens_BAD) * (1 + scale) + shift
    return found


def _rows(norm: Any, time_BD: torch.Tensor, count: int) -> _Rows:
    return tuple(norm.linear(norm.silu(time_BD))[:, None].chunk(count, dim=2))


def _replaced(norm: Any, time_BD: torch.Tensor, first_BD: torch.Tensor | None, first_tokens: int | None, count: int) -> _Spans:
    """The first frame's tokens by `first_BD`, all others by `time_BD`."""
    assert first_BD is not None
    return [(slice(0, first_tokens), _rows(norm, first_BD, count)), (slice(first_tokens, None), _rows(norm, time_BD, count))]


def _along(
    run: Callable[..., torch.Tensor], stretch: Callable[..., torch.Tensor], spans: _Spans, *tensors_BND: torch.Tensor
) -> torch.Tensor:
    """`run` of a stretch over all video tokens, each span with its own rows."""
    found = [run(stretch, *(tensor_BND[:, span] for tensor_BND in tensors_BND), *rows) for span, rows in spans]
    return found[0] if len(found) == 1 else torch.cat(found, dim=1)


_ADAPTIVE = ("silu", "linear", "norm")
_DOUBLE = {
    "": ("norm1", "norm1_context", "attn", "norm2", "ff", "norm2_context", "ff_context"),
    "norm1": _ADAPTIVE,
    "norm1_context": _ADAPTIVE,
}
_SINGLE = {"": ("attn", "norm", "proj_mlp", "act_mlp", "proj_out"), "norm": _ADAPTIVE}

_DOUBLE_ENDS = {"ends": ("ff.net.2", "ff_context.net.2"), "ungated": ("attn", "ff", "ff_context")}
_SINGLE_ENDS = {"ends": ("proj_out",), "ungated": ("attn", "proj_mlp", "proj_out")}

CHUNKED = (
    ChunkedForward("HunyuanVideoTransformerBlock", _DOUBLE, _double, **_DOUBLE_ENDS),
    ChunkedForward("HunyuanVideoSingleTransformerBlock", _SINGLE, _single, **_SINGLE_ENDS),
    ChunkedForward("HunyuanVideoTokenReplaceTransformerBlock", _DOUBLE, _double_replacing, **_DOUBLE_ENDS),
    ChunkedForward("HunyuanVideoTokenReplaceSingleTransformerBlock", _SINGLE, _single_replacing, **_SINGLE_ENDS),
)
