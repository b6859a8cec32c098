"""Which LTX-Video a file is, beyond what its shapes say: by the config in its header, its name, or what lies beside it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError, Problem
from ..family import Variant
from ..quantisation import FP8_DTYPES

if TYPE_CHECKING:
    from ..checkpoint import Checkpoint


@dataclass(frozen=True)
class Kind:
    """A variant, with what a header or a name may say of it; `size` is (width, blocks)."""

    variant: Variant
    size: tuple[int, int]
    causal: bool = True
    distilled: bool = False


_2B, _13B = (2048, 28), (4096, 48)
# Of kinds that nothing tells apart the first is the answer.
KINDS = (
    Kind(Variant("ltxv-2b-0.9", "LTX-Video 2B 0.9 or 0.9.1"), _2B, causal=False),
    Kind(Variant("ltxv-2b-0.9.5", "LTX-Video 2B 0.9.5 or 0.9.6"), _2B),
    Kind(Variant("ltxv-2b-distilled", "LTX-Video 2B distilled, 0.9.6 or 0.9.8"), _2B, distilled=True),
    Kind(Variant("ltxv-13b", "LTX-Video 13B 0.9.7 or 0.9.8"), _13B),
    Kind(Variant("ltxv-13b-distilled", "LTX-Video 13B distilled, 0.9.7 or 0.9.8"), _13B, distilled=True),
)
_FIRST_CAUSAL = 5
_VERSION = re.compile(r"0[._]9(?:[._](?P<patch>\d))?(?!\d)")
_DISTILLED = re.compile(r"distill", re.IGNORECASE)
_ROTATED = re.compile(r"fp8(?![-_. ]?(e4m3|e5m2|scaled))", re.IGNORECASE)

# What the diffusers class has built in and a header's config could say otherwise.
_BUILT_IN = {
    "positional_embedding_theta": 10000.0,
    "positional_embedding_max_pos": [20, 2048, 2048],
    "timestep_scale_multiplier": 1000.0,
    "rope_type": "interleaved",
    "use_middle_indices_grid": False,
}
_HEADS = 32


@dataclass(frozen=True)
class Header:
    """What a file's header, or failing that its name, says beyond its shapes.

    `by`: who said whether it is causal; `certain`: the header's own config did.
    """

    causal: bool
    by: str
    distilled: bool | None
    patch: int | None
    heads: int = _HEADS
    stripped: bool = False
    certain: bool = False


def read_header(checkpoint: Checkpoint, is_diffusers: bool) -> Header:
    """Raises CheckpointError when the header's config asks for what the diffusers class does not do."""
    whole = header_config(checkpoint)
    config, patch = whole.get("transformer"), _patch_by_name(checkpoint.path)
    distilled = (
        True if whole.get("allowed_inference_steps") or _named(_DISTILLED, checkpoint.path) else False if patch is not None else None
    )
    if isinstance(config, dict):
        _check_built_in(checkpoint, config)
        causal, heads = bool(config.get("causal_temporal_positioning", False)), int(config.get("num_attention_heads", _HEADS))
        return Header(causal, "by its header", distilled, patch, heads, certain=True)
    if not is_diffusers:
        return Header(False, "as ComfyUI counts without a config in the header", distilled, patch, stripped=True)
    if (types := _json(checkpoint.files[0].parent.parent / "vae" / "config.json").get("down_block_types")) is not None:
        return Header("LTXVideo095DownBlock3D" in types, "by the VAE beside it", distilled, patch)
    return Header(patch is not None and patch >= _FIRST_CAUSAL, "by its name", distilled, patch)


def header_config(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """The config that Lightricks' checkpoints carry in their header; empty when there is none."""
    try:
        config = json.loads(checkpoint.metadata.get("config", "{}"))
    except ValueError:
        return {}
    return config if isinstance(config, dict) else {}


def _check_built_in(checkpoint: Checkpoint, config: Mapping[str, Any]) -> None:
    problems = [
        Problem(f"{name} is {config[name]} in the header of {checkpoint.path.name}", f"it is {value} here", "Give an LTX-Video 0.9 model.")
        for name, value in _BUILT_IN.items()
        if config.get(name, value) != value
    ]
    if problems:
        raise CheckpointError(problems)


def _json(path: Path) -> Mapping[str, Any]:
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _names(path: Path) -> tuple[str, str, str]:
    """What a model may be named by: its file, and the folders that it is in."""
    path = path.absolute()
    return path.name, path.parent.name, path.parent.parent.name


def _named(pattern: re.Pattern[str], path: Path) -> bool:
    return any(pattern.search(name) for name in _names(path))


def _patch_by_name(path: Path) -> int | None:
    """The p of version 0.9.p (0 for 0.9), if a name says it."""
    match = next((match for name in _names(path) if (match := _VERSION.search(name))), None)
    return int(match["patch"] or 0) if match else None


def candidates(size: tuple[int, int], header: Header) -> tuple[Variant, ...]:
    """All variants of this size (of an unknown one: all) that the header's config allows, those first that header and name speak for."""
    newer = header.patch is not None and header.patch >= _FIRST_CAUSAL
    causal = header.causal or (header.stripped and newer)

    def contradictions(kind: Kind) -> int:
        return (kind.causal != causal) + (header.distilled is not None and kind.distilled != header.distilled)

    kinds = [kind for kind in KINDS if kind.size == size] or list(KINDS)
    if header.certain:
        kinds = [kind for kind in kinds if kind.causal == header.causal] or kinds
    return tuple(kind.variant for kind in sorted(kinds, key=contradictions))


def notes_on(size: tuple[int, int], header: Header) -> list[str]:
    notes = []
    if size not in {kind.size for kind in KINDS}:
        notes.append(f"No published LTX-Video has {size[1]} blocks of width {size[0]}.")
    if header.stripped:
        notes.append(
            "The file's header holds no config, so ComfyUI counts its frames as for 0.9 and 0.9.1, and so does the training."
            " If it is of 0.9.5 or later, use a file that has its config: this one samples worse than it could."
        )
    if header.patch is None and header.distilled is None:
        notes.append("No name says which version it is, or whether it is distilled: choose the variant.")
    return notes


def refuse_rotated(checkpoint: Checkpoint) -> None:
    if _has_fp8(checkpoint) and _ROTATED.search(checkpoint.path.name):
        raise CheckpointError(
            Problem(
                f"{checkpoint.path.name} is named as Lightricks' own fp8 files",
                "their weights are rotated for the Q8 kernels, and plain arithmetic makes noise of them",
                "Give the bf16 file. If it is a plain cast, let its name end in fp8_e4m3fn.",
            )
        )


def perhaps_rotated(checkpoint: Checkpoint) -> Problem | None:
    """The doubt about fp8 weights that nothing says the origin of."""
    if not _has_fp8(checkpoint) or checkpoint.quantisation or re.search("e4m3|e5m2", checkpoint.path.name, re.IGNORECASE):
        return None
    value, rule = f"{checkpoint.path.name} holds fp8 weights", "those of Lightricks' own fp8 files are rotated and cannot be trained"
    return Problem(value, rule, "Give the bf16 file, or name the variant if it is a plain cast.")


def _has_fp8(checkpoint: Checkpoint) -> bool:
    return any(stored.dtype in FP8_DTYPES for name, stored in checkpoint.tensors.items() if name.startswith("transformer_blocks."))
