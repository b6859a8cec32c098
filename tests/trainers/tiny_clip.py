"""Tiny CLIP and SigLIP models with random weights, in folders as transformers writes them."""

from __future__ import annotations

import json
from pathlib import Path

import torch

_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
_TEXT = {**_SIZES, "vocab_size": 54, "max_position_embeddings": 16, "bos_token_id": 52, "eos_token_id": 53, "pad_token_id": 53}
_VISION = {**_SIZES, "image_size": 32, "patch_size": 8}


def write_clip(folder: Path, model_type: str = "clip") -> Path:
    """A folder with weights, a tokenizer of letters, and the preprocessing of images of 32x32."""
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer, SiglipConfig, SiglipModel

    torch.manual_seed(0)
    if model_type == "clip":
        model, processing = CLIPModel(CLIPConfig(text_config=_TEXT, vision_config=_VISION, projection_dim=12)), "CLIP"
    else:
        model, processing = SiglipModel(SiglipConfig(text_config={**_TEXT, "projection_size": 16}, vision_config=_VISION)), "Siglip"
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tokens = [*_LETTERS, *(f"{letter}</w>" for letter in _LETTERS), "<|startoftext|>", "<|endoftext|>"]
    CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[]).save_pretrained(folder)
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}} if processing == "CLIP" else {}
    size = size or {"size": {"height": 32, "width": 32}}
    images = {"image_processor_type": f"{processing}ImageProcessor", "processor_class": f"{processing}Processor", **size}
    (folder / "preprocessor_config.json").write_text(json.dumps(images))
    return folder
