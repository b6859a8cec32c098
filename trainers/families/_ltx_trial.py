"""What `check` tries a device with for LTX-Video: attention of the largest model, and a tiny model of the first variant."""

from __future__ import annotations

from ..family import Trial

TRIAL = Trial(
    heads=32,
    head_width=128,
    masked=True,
    config={
        **{"num_attention_heads": 4, "attention_head_dim": 64, "cross_attention_dim": 256, "num_layers": 3},
        **{"caption_channels": 32, "causal_temporal_positioning": False},
    },
    patch_side=1,
)
