"""The network is never used: the libraries that could reach a hub are told so before they are imported."""

from __future__ import annotations

import os
import socket


def go_offline() -> None:
    """Call this before anything imports diffusers, transformers or huggingface_hub. Child processes inherit it."""
    socket.has_ipv6 = False  # or urllib3 opens one when it is imported, to find out
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", DO_NOT_TRACK="1")
