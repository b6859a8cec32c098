"""Whether a LoRA fits a native model, and the model with it: by ComfyUI's own reading of its keys."""

from __future__ import annotations

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
    unmatched = tuple(name for name in layers if name not in names)
    return Fit(type(model.model).__name__, patches, len(layers), unmatched, tuple(_misfits(model, patches)))


def patched(model: Any, fit: Fit, strength: float) -> Any:
    """A clone of the model with the LoRA; the weights are shared."""
    clone = model.clone()
    clone.add_patches(dict(fit.patches), strength)
    return clone


_ENDINGS = (".lora_A", ".lora_B", ".lora_up", ".lora_down", ".lora.up", ".lora.down", "_lora.up", "_lora.down", ".alpha", ".dora_scale")


def _layer(key: str) -> str:
    """The layer that a tensor of a LoRA belongs to."""
    places = [place for ending in _ENDINGS if (place := key.rfind(ending)) > 0]
    return key[: max(places)] if places else key.rpartition(".")[0]


def _misfits(model: Any, patches: Mapping[Any, Any]) -> list[tuple[str, Shape, Shape]]:
    """Low-rank layers whose product has not the shape of the weight."""
    found = []
    for key, patch in patches.items():
        if not isinstance(key, str) or getattr(patch, "name", "") != "lora":
            continue
        up, down, _, middle, _, reshape = patch.weights
        weight = comfy.utils.get_attr(model.model, key)
        shape = (up.shape[0], down.flatten(1).shape[1])
        if middle is None and reshape is None and shape != tuple(weight.flatten(1).shape):
            found.append((key, tuple(weight.shape), shape))
    return found
