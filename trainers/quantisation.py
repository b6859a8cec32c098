"""How the weights of a file are quantised: which of its tensors are scales, and of what.

Three spellings are read, all with `weight = stored fp8 value * scale`, the scale one number or one per row:

    <module>.scale_weight, a marker tensor `scaled_fp8`                     fp8_scaled, the older spelling
    <module>.weight_scale, the marker or not                                fp8_scaled, the newer spelling
    <module>.weight_scale, the format as JSON in <module>.comfy_quant       comfy_quant
        or, for all modules, in `_quantization_metadata` of the header

Scales of inputs are not used: activations stay unquantised in training.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from .errors import CheckpointError, Problem
from .tensor_files import StoredTensor

Kind = Literal["fp8_scaled", "comfy_quant"]

FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
_FORMATS = ("float8_e4m3fn", "float8_e5m2")
_WEIGHT_SCALES = (".scale_weight", ".weight_scale")
_UNUSED = (".scale_input", ".input_scale", ".comfy_quant")
_MARKER = "scaled_fp8"
_HEADER_KEY = "_quantization_metadata"
_RULE = "training reads fp8 (e4m3fn, e5m2) weights with one scale, or one for each row"
_REMEDY = "Give the bf16, fp16 or fp8_scaled file of the same model."


@dataclass(frozen=True)
class Quantisation:
    """The kind of quantisation and the scale of each quantised module; no kind: nothing is scaled."""

    kind: Kind | None
    scales: Mapping[str, StoredTensor]


def split_off(
    tensors: Mapping[str, StoredTensor],
    metadata: Mapping[str, str],
    load: Callable[[StoredTensor], torch.Tensor],
    subject: str,
) -> tuple[dict[str, StoredTensor], Quantisation]:
    """The weights of a file, and its scales. `load` reads a tensor; `subject` names the file in errors.

    Raises CheckpointError for every quantisation that is not one of the spellings above.
    """
    scales = {_stem(name): stored for name, stored in tensors.items() if name.endswith(_WEIGHT_SCALES)}
    weights = {name: stored for name, stored in tensors.items() if not _is_auxiliary(name)}
    formats = dict(_formats(tensors, metadata, load))
    problems = [*_format_problems(tensors, formats), *_scale_problems(weights, scales), *_weight_problems(weights)]
    if problems:
        raise CheckpointError(problems, subject=subject)
    marked = any(_is_marker(name) for name in tensors)
    kind: Kind | None = "comfy_quant" if formats else "fp8_scaled" if scales or marked else None
    return weights, Quantisation(kind, scales)


def _stem(name: str) -> str:
    return name.rpartition(".")[0]


def _is_marker(name: str) -> bool:
    return name == _MARKER or name.endswith("." + _MARKER)


def _is_auxiliary(name: str) -> bool:
    return _is_marker(name) or name.endswith((*_WEIGHT_SCALES, *_UNUSED))


def _formats(
    tensors: Mapping[str, StoredTensor], metadata: Mapping[str, str], load: Callable[[StoredTensor], torch.Tensor]
) -> Iterator[tuple[str, str]]:
    """(module, name of its format) as far as the file tells."""
    layers = _json(metadata.get(_HEADER_KEY, "{}")).get("layers", {})
    for module, entry in layers.items():
        yield module, str(entry.get("format"))
    for name, stored in tensors.items():
        if name.endswith(".comfy_quant"):
            yield _stem(name), str(_json(bytes(load(stored).tolist())).get("format"))


def _json(text: str | bytes) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _format_problems(tensors: Mapping[str, StoredTensor], formats: Mapping[str, str]) -> Iterator[Problem]:
    for name in sorted(set(formats.values()) - set(_FORMATS)):
        modules = [module for module, format_name in formats.items() if format_name == name]
        yield Problem(f"{_count(modules)} quantised as {name!r}", _RULE, _REMEDY)
    second_scales = [name for name in tensors if name.endswith(".weight_scale_2")]
    if second_scales and not set(formats.values()) - set(_FORMATS):
        yield Problem(f"{_count(second_scales)} a second scale, as nvfp4 has", _RULE, _REMEDY)


def _scale_problems(weights: Mapping[str, StoredTensor], scales: Mapping[str, StoredTensor]) -> Iterator[Problem]:
    lonely = [module for module in scales if f"{module}.weight" not in weights]
    if lonely:
        yield Problem(f"{_count(lonely)} scaled but not in the file", "every scale belongs to a weight", "Download the file again.")
    for module, scale in scales.items():
        weight = weights.get(f"{module}.weight")
        if weight is not None and scale.numel not in (1, weight.shape[0]):
            yield Problem(f"the scale of {module} is {list(scale.shape)} for a weight of {list(weight.shape)}", _RULE, _REMEDY)
            return


def _weight_problems(weights: Mapping[str, StoredTensor]) -> Iterator[Problem]:
    packed = [name for name, stored in weights.items() if name.endswith(".weight") and not stored.dtype.is_floating_point]
    if packed:
        yield Problem(f"{_count(packed)} stored as {weights[packed[0]].dtype}", _RULE, _REMEDY)


def _count(names: list[str]) -> str:
    return f"{names[0]}:" if len(names) == 1 else f"{names[0]} and {len(names) - 1} more:"
