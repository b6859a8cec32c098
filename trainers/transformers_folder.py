"""A text encoder in the layout of transformers: weights with their config.json, and a tokenizer in a folder beside them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .checkpoint import Checkpoint

_TOKENIZER_FILES = ("tokenizer_config.json", "spiece.model", "tokenizer.json")


@dataclass(frozen=True)
class TransformersFolder:
    """Where the parts are: the weights (a file, or their folder), the tokenizer's folder, and what config.json says."""

    weights: Path
    tokenizer: Path
    config: Mapping[str, Any]

    @classmethod
    def find(cls, path: Path) -> TransformersFolder | None:
        """The encoder that `path` belongs to; None when it is no such layout.

        `path` is a folder that holds `text_encoder` and `tokenizer`, the `text_encoder` folder itself, or a file in it. The
        tokenizer may also lie inside that folder, or be that folder.
        """
        folder = path if path.is_dir() else path.parent
        if path.is_dir() and (path / "text_encoder").is_dir():
            folder = path / "text_encoder"
        tokenizer = next((place for place in _tokenizer_places(folder) if _is_tokenizer(place)), None)
        config = _config(folder)
        return None if tokenizer is None or config is None else cls(path if path.is_file() else folder, tokenizer, config)

    @property
    def folder(self) -> Path:
        """The folder of the weights and config.json."""
        return self.weights if self.weights.is_dir() else self.weights.parent

    def files(self) -> tuple[Path, ...]:
        """The files of the weights. Raises CheckpointError when some are missing or damaged."""
        return Checkpoint.open(self.weights, "text_encoder").files


def _tokenizer_places(folder: Path) -> Iterator[Path]:
    yield folder.parent / "tokenizer"
    yield folder / "tokenizer"
    yield folder


def _is_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _TOKENIZER_FILES)


def _config(folder: Path) -> Mapping[str, Any] | None:
    """The config.json of a transformers model, if there is a readable one."""
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return config if isinstance(config, dict) and "model_type" in config else None
