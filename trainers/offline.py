"""The network is never used: the libraries that could reach a hub are told so before they are imported."""

from __future__ import annotations

import os


def go_offline() -> None:
    """Call this before anything imports diffusers, transformers or huggingface_hub. Child processes inherit it."""
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", DO_NOT_TRACK="1")
