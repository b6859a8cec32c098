"""Whether a LoRA fits a native model, and the model with it: by ComfyUI's own reading of its keys."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import comfy.lora
import comfy.lora_convert
import comfy.utils
import torch

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Fit:
    """How a LoRA's layers meet a model's.

    `patches` is what ComfyUI patches in. `total` counts the LoRA's layers, `matched` those that the model has. `misfits` are
    (layer, its shape, the LoRA's shape) where the two differ. `model` is the model's class.
    """

    model: str
    patches: Mapping[Any, Any]
    total: int
    unmatched: tuple[str, ...]
    misfits: tuple[tuple[str, Shape, Shape], ...]

    @property
    def matched(self) -> int:
        return self.total - len(self.unmatched)


def fit(model: Any, tensors: Mapping[str, torch.Tensor]) -> Fit:
    """How the LoRA in `tensors` meets `model`, a ModelPatcher; nothing is changed."""
    tensors = comfy.lora_convert.convert_lora(dict(tensors))
    names = comfy.lora.model_lora_keys_unet(model.model, {})
    patches = comfy.lora.load_lora(tensors, names, log_missing=False)
    layers = dict.fromkeys(_layer(key) for key in tensors)
    unmatched = tuple(name for name in layers if not _is_patched(names.get(name), patches))
    return Fit(type(model.model).__name__, patches, len(layers), unmatched, tuple(_misfits(model, patches)))


def patched(model: Any, fit: Fit, strength: float) -> Any:
    """A clone of the model with the LoRA; the weights are shared."""
    clone = model.clone()
    clone.add_patches(dict(fit.patches), strength)
    return clone


_ENDINGS = (
    *(".lora_A", ".lora_B", ".lora_up", ".lora_down", ".lora_mid", ".lora.up", ".lora.down", "_lora.up", "_lora.down"),
    *(".lora_linear_layer.up", ".lora_linear_layer.down", ".alpha", ".dora_scale", ".lora_magnitude_vector"),
)


def _is_patched(key: Any, patches: Mapping[Any, Any]) -> bool:
    """Whether a model's key, or a part or the bias of its weight, is patched; None is no key."""
    weight = key[0] if isinstance(key, tuple) else key
    return key in patches or (isinstance(weight, str) and f"{weight.removesuffix('.weight')}.bias" in patches)


def _layer(key: str) -> str:
    """The layer that a tensor of a LoRA belongs to."""
    places = [place for ending in _ENDINGS if (place := key.rfind(ending)) > 0]
    return key[: max(places)] if places else key.rpartition(".")[0]


def _misfits(model: Any, patches: Mapping[Any, Any]) -> list[tuple[str, Shape, Shape]]:
    """Layers whose change of a weight has not the weight's shape."""
    found = []
    for key, patch in patches.items():
        shape = _shape(patch) if isinstance(key, str) else None
        if shape is None:
            continue
        layer = _own_shape(model, key)
        if shape != (layer[0], math.prod(layer[1:])):
            found.append((key, layer, shape))
    return found


def _shape(patch: Any) -> Shape | None:
    """Outputs and inputs of what a patch adds; None where that is not known beforehand."""
    kind = getattr(patch, "name", "")
    if kind == "lora":
        up, down, _, middle, _, reshape = patch.weights
        return (up.shape[0], down.flatten(1).shape[1]) if middle is None and reshape is None else None
    if kind == "loha":
        first, second, _, _, _, middle, _, _ = patch.weights
        return (first.shape[0], second.shape[1]) if middle is None else None
    if kind == "lokr":
        left, right, _, left_up, left_down, right_up, right_down, middle, _ = patch.weights
        shapes = [_product(left, left_up, left_down), _product(right, right_up, right_down)]
        return (shapes[0][0] * shapes[1][0], shapes[0][1] * shapes[1][1]) if middle is None else None
    return None


def _product(whole: torch.Tensor | None, up: torch.Tensor | None, down: torch.Tensor | None) -> Shape:
    """Shape of a factor of a LoKr, given whole or as a product."""
    if whole is not None:
        return tuple(whole.flatten(1).shape)
    assert up is not None
    assert down is not None
    return up.shape[0], down.flatten(1).shape[1]


def _own_shape(model: Any, key: str) -> Shape:
    """The shape that ordinary LoRAs know a weight by: not grown by a control LoRA (`native_control`, or ComfyUI's in memory now)."""
    where, _, name = key.rpartition(".")
    module = model.get_model_object(where)
    shape = tuple(getattr(module, name).shape)
    if own := getattr(module, "own_channels", None) if name == "weight" else None:
        return (shape[0], own, *shape[2:])
    kept = model.backup.get(key) if module is comfy.utils.get_attr(model.model, where) else None
    return tuple(kept.weight.shape) if kept else shape
