"""Whether a text encoder's file can be a model's: by the width of its rows, which its header tells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .checkpoint import Checkpoint
from .errors import CheckpointError, Problem
from .family import Family, Variant

# The table of word rows in each layout: transformers' T5 (shared or not), Llama and Llava, CLIP, and Wan's own UMT5.
_WORDS = ("shared", "encoder.embed_tokens", "embed_tokens", "token_embedding")


def row_width(path: Path) -> int | None:
    """How wide the rows of a text encoder are; None when its header does not tell, or is of a kind that others read (GGUF)."""
    try:
        tensors = Checkpoint.open(path, "text_encoder").tensors
    except CheckpointError:
        return None
    for name, stored in tensors.items():
        module, _, kind = name.rpartition(".")
        if kind == "weight" and len(stored.shape) == 2 and any(module == words or module.endswith(f".{words}") for words in _WORDS):
            return stored.shape[1]
    return None


def encoder_problem(paths: Sequence[Path], family: Family, variant: Variant, config: Mapping[str, Any]) -> Problem | None:
    """What is wrong with the text encoders chosen for a transformer of that config: none of them gives rows that it takes."""
    widths = {path.name: row_width(path) for path in paths}
    wanted = family.text_width(config)
    if not widths or None in widths.values() or wanted in widths.values():
        return None
    told = " and ".join(f"{name} gives text rows {width} wide" for name, width in widths.items())
    return Problem(told, f"{variant.title} takes {wanted}", "Choose the model's own text encoder.")
