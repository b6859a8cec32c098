"""What this process says to libraries, and is told by its starter, through environment variables; nothing else reads them."""

from __future__ import annotations

import os
import socket


def go_offline() -> None:
    """The network is never used: call this before anything imports diffusers, transformers or huggingface_hub.

    Child processes inherit it.
    """
    socket.has_ipv6 = False  # or urllib3 opens one when it is imported, to find out
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", DO_NOT_TRACK="1")


def process_index() -> int:
    """This worker's number among those that accelerate started for one run; 0 when it is alone."""
    return int(os.environ.get("RANK", "0"))
