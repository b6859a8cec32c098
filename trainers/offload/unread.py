"""What nobody reads need not be computed: a block that runs once more for its gradients only returns values that are dropped."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_now = threading.local()


@contextmanager
def outputs_unread() -> Iterator[None]:
    """Within it, and in this thread, nobody reads what a block returns: it runs for its gradients only."""
    before = getattr(_now, "unread", False)
    _now.unread = True
    try:
        yield
    finally:
        _now.unread = before


def are_outputs_unread() -> bool:
    """Never in compiled code, which is the same whether they are read or not."""
    return not torch.compiler.is_compiling() and torch.is_grad_enabled() and getattr(_now, "unread", False)
