"""Under ComfyUI's Python: what Apply LoRA finds of each file in a model, and what core's loader makes of a weight."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from inside import load_pack
from safetensors.torch import save_file


def main(pack: str, transformer: str, files: Mapping[str, str], lora: str, weights: str, tasks: list[dict[str, Any]]) -> dict[str, Any]:
    """What Apply LoRA says of each of `files`, and the answers to `tasks`; `weights` is where those go that `lora` makes."""
    import native_answers

    answers = native_answers.main(pack, tasks)
    name = load_pack(pack).__name__
    native, lora_node = (importlib.import_module(f"{name}.nodes.{module}") for module in ("native", "lora"))
    family = importlib.import_module(f"{name}.trainers.families.wan").FAMILY
    with torch.inference_mode():
        model = native.load_transformer(Path(transformer), family, {"dtype": torch.float32})
        save_file(_patched_weights(model, lora), weights)
        return {"answers": answers, "files": {each: _fit(lora_node, model, Path(path)) for each, path in files.items()}}


def _fit(lora_node: Any, model: Any, path: Path) -> Any:
    lora_node._path = lambda choice: path
    try:
        told = lora_node.ApplyLoRA.PREPARE_CLASS_CLONE(None).execute(model, path.name, 1.0)
    except lora_node.LoraError as error:
        return str(error)
    return told.ui["text"][0].partition(": ")[2].splitlines()


def _patched_weights(model: Any, lora: str) -> dict[str, torch.Tensor]:
    """The weights that core's loader and patcher give, by native name."""
    import comfy.lora
    import comfy.sd
    import comfy.utils

    patched, _ = comfy.sd.load_lora_for_models(model, None, comfy.utils.load_torch_file(lora), 1.0, 0.0)
    found = {}
    for key, patches in patched.patches.items():
        weight = comfy.utils.get_attr(patched.model, key).clone()
        found[key.removeprefix("diffusion_model.")] = comfy.lora.calculate_weight(patches, weight, key)
    return found
