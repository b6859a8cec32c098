"""What `check` tries a device with for Wan: attention of the largest model, and a tiny model of the first variant."""

from __future__ import annotations

from ..family import Trial

TRIAL = Trial(
    heads=40,
    head_width=128,
    masked=False,
    config={
        **{"num_attention_heads": 2, "attention_head_dim": 128, "num_layers": 3, "ffn_dim": 256, "text_dim": 32, "freq_dim": 32},
        **{"patch_size": (1, 2, 2), "rope_max_seq_len": 1024, "in_channels": 16, "out_channels": 16},
    },
)
