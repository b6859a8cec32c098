"""The tiny transformer: Wan's architecture with 4.8 M parameters, and what makes its pretraining short.

Everywhere text is padded with zero rows to 512, without a mask. The zero rows all give the same key and value, and
there is no rope in cross-attention; so attention over L rows and 512 - L zero rows equals attention over L + 1 rows
whose last has log(512 - L) added to its logits. `ShortText` does this: exact, and three times faster.

Shape suffixes: B batch, L text rows, C channels, f, h, w latent frames, height and width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from torch import nn

from .text import TEXT_ROWS, WIDTH

HEADS = 2
LAYERS = 4


def build_transformer(seed: int) -> WanTransformer3DModel:
    """A transformer that starts well: open gates, a small output, and padding that is hardly attended to."""
    torch.manual_seed(seed)
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=HEADS,
        attention_head_dim=128,
        in_channels=16,
        out_channels=16,
        text_dim=WIDTH,
        freq_dim=256,
        ffn_dim=512,
        num_layers=LAYERS,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=1024,
    )
    _initialise(model)
    return model


@torch.no_grad()
def _initialise(model: WanTransformer3DModel) -> None:
    embedder = model.condition_embedder
    for module in embedder.text_embedder.modules():
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
    embedder.time_proj.weight.mul_(0.3)
    embedder.time_proj.bias.zero_()
    for block in model.blocks:
        block.scale_shift_table.zero_()
        block.scale_shift_table[:, [2, 5]] = 0.7  # the gates of self-attention and feed-forward
        _look_away_from_padding(block.attn2)
    model.scale_shift_table.zero_()
    model.proj_out.weight.mul_(0.1)
    model.proj_out.bias.zero_()


def _look_away_from_padding(attention: Any) -> None:
    """Five hundred equal rows would take all attention. Their key is the bias alone: let queries point away from it."""
    away = torch.randn(attention.to_k.bias.shape).sign()
    attention.to_k.bias.copy_(0.02 * away)
    attention.to_q.bias.copy_(-0.58 * away)
    attention.to_v.bias.zero_()


class ShortText:
    """A cross-attention processor for text that stands for 512 rows; `bias` is set before each call of the model."""

    def __init__(self) -> None:
        self.bias: torch.Tensor | None = None  # (B, 1, 1, L), from `padding_bias`

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        rotary_emb: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`WanAttnProcessor` for text, with a bias on the logits."""
        query, key = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(encoder_hidden_states))
        value = attn.to_v(encoder_hidden_states)
        query, key, value = (part.unflatten(2, (attn.heads, -1)).transpose(1, 2) for part in (query, key, value))
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=self.bias).transpose(1, 2).flatten(2, 3)
        output: torch.Tensor = attn.to_out[1](attn.to_out[0](mixed))
        return output


def padding_bias(lengths_B: torch.Tensor, slots: int, total: int = TEXT_ROWS) -> torch.Tensor:
    """(B, 1, 1, slots): 0 for real rows, log(total - length) for the one row of padding, -inf after it."""
    places = torch.arange(slots).expand(len(lengths_B), slots)
    bias = torch.where(places < lengths_B[:, None], 0.0, -math.inf)
    bias[torch.arange(len(lengths_B)), lengths_B] = (total - lengths_B).float().log()
    return bias[:, None, None]


class TextTable:
    """The text rows of a list of captions, the last of which is the empty one, zero-padded by at least one row."""

    def __init__(self, records: Sequence[torch.Tensor]) -> None:
        """`records` hold one tensor (length, 4096) a caption."""
        self.lengths = torch.tensor([len(record) for record in records])
        self.slots = int(self.lengths.max()) + 1
        self.rows = torch.stack([F.pad(record, (0, 0, 0, self.slots - len(record))) for record in records])
        self.empty = len(records) - 1


class TextConditioned:
    """The transformer with captions given by their numbers in a table."""

    def __init__(self, model: WanTransformer3DModel, table: TextTable, compiled: bool = False) -> None:
        """Replaces the cross-attention processors of `model`."""
        self.model, self.table = model, table
        self._processors = [ShortText() for _ in model.blocks]
        for block, processor in zip(model.blocks, self._processors, strict=True):
            block.attn2.set_processor(processor)
        self._forward: Any = torch.compile(model) if compiled else model

    def velocity(self, x_BCfhw: torch.Tensor, sigma_B: torch.Tensor, captions_B: torch.Tensor) -> torch.Tensor:
        """The predicted noise - clean at noise level `sigma_B`."""
        bias = padding_bias(self.table.lengths[captions_B], self.table.slots)
        for processor in self._processors:
            processor.bias = bias
        text = self.table.rows[captions_B]
        output: torch.Tensor = self._forward(hidden_states=x_BCfhw, timestep=1000 * sigma_B, encoder_hidden_states=text, return_dict=False)[
            0
        ]
        return output

    @torch.no_grad()
    def sample(self, captions_B: torch.Tensor, seed: int, steps: int = 18, cfg: float = 3.0, shift: float = 3.0) -> torch.Tensor:
        """Clean latents (B, 16, 3, 8, 8) for the small world's clips, by Euler's method with guidance."""
        latents = torch.randn(len(captions_B), 16, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
        even = torch.linspace(1, 0, steps + 1)
        sigmas = shift * even / (1 + (shift - 1) * even)
        both = torch.cat([captions_B, torch.full_like(captions_B, self.table.empty)])
        for sigma, following in pairwise(sigmas):
            velocity = self.velocity(torch.cat([latents, latents]), sigma.expand(len(both)), both)
            given, empty = velocity.chunk(2)
            latents = latents + (following - sigma) * (empty + cfg * (given - empty))
        return latents
