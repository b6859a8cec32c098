"""What `check` tries a device with for HunyuanVideo: attention of the largest model, and a tiny model of the first variant."""

from __future__ import annotations

from ..family import Trial

TRIAL = Trial(
    heads=24,
    head_width=128,
    masked=True,
    config={
        **{"num_attention_heads": 2, "attention_head_dim": 128, "num_layers": 1, "num_single_layers": 2, "text_embed_dim": 32},
        **{"pooled_projection_dim": 16, "image_condition_type": None},
    },
    pooled_width=16,
)
