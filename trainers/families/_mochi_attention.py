"""Mochi's attention, over the video and its caption together, by the library that the job chose.

diffusers' own class for it always takes PyTorch's, and in every block asks the device which text rows count, so that the host
waits there. The projections, norms and angles are the model's; only where the rows are attended to is written here.

Shape suffixes: B batch, N video tokens, L text rows, A both, H heads, R half a head's width, D width.
"""

from __future__ import annotations

from typing import Any

import torch

from ..text_masks import says_nothing


class JointAttention:
    """What diffusers calls a processor: set on a MochiAttention, it computes its forward pass."""

    _attention_backend: Any = None

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The video's rows (B, N, D) and the text's (B, L, ...); text rows that do not count give any finite value."""
        from diffusers.models.attention_dispatch import dispatch_attention_fn

        tokens, mask = hidden_states.shape[1], None
        if not says_nothing(attention_mask):
            mask = torch.nn.functional.pad(attention_mask.bool(), (tokens, 0), value=True)[:, None, None]
        attended_BAHD = dispatch_attention_fn(
            *_rows(attn, hidden_states, encoder_hidden_states, image_rotary_emb),
            attn_mask=mask,
            backend=self._attention_backend,
        )
        video_BND, text_BLD = attended_BAHD.flatten(2).split((tokens, encoder_hidden_states.shape[1]), dim=1)
        for layer in attn.to_out:
            video_BND = layer(video_BND)
        return video_BND, attn.to_add_out(text_BLD) if hasattr(attn, "to_add_out") else text_BLD


def _rows(attn: Any, video: torch.Tensor, text: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor] | None) -> list[torch.Tensor]:
    """Query, key and value (B, A, H, ...) of the video's rows and then the text's."""
    video_qkv = [project(video).unflatten(2, (attn.heads, -1)) for project in (attn.to_q, attn.to_k, attn.to_v)]
    text_qkv = [project(text).unflatten(2, (attn.heads, -1)) for project in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)]
    for index, (norm, text_norm) in enumerate(((attn.norm_q, attn.norm_added_q), (attn.norm_k, attn.norm_added_k))):
        video_qkv[index], text_qkv[index] = norm(video_qkv[index]), text_norm(text_qkv[index])
        if angles is not None:
            video_qkv[index] = _turned(video_qkv[index], *angles)
    return [torch.cat(both, dim=1) for both in zip(video_qkv, text_qkv, strict=True)]


def _turned(rows_BNHD: torch.Tensor, cos_NHR: torch.Tensor, sin_NHR: torch.Tensor) -> torch.Tensor:
    """Each pair of neighbouring features turned by its angle (rotary embedding, arXiv:2104.09864), in float32."""
    first, second = rows_BNHD.float().reshape(*rows_BNHD.shape[:-1], -1, 2).unbind(-1)
    turned = torch.stack([first * cos_NHR - second * sin_NHR, first * sin_NHR + second * cos_NHR], dim=-1)
    return turned.flatten(-2).to(rows_BNHD.dtype)
