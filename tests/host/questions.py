"""What tests ask ComfyUI's objects, and how far an answer is from what was expected."""

from __future__ import annotations

from typing import Any

import torch
from installation import PACK, ComfyUI


def ask(comfyui: ComfyUI, *tasks: dict[str, Any]) -> list[Any]:
    """What ComfyUI's objects answer (see `native_answers.py`), all in one process."""
    return comfyui.call("native_answers.py", pack=str(PACK), tasks=list(tasks))


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The difference, in units of what was expected."""
    return float((found - expected).norm() / expected.norm())
