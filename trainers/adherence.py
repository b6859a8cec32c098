"""How well videos fit their prompts, by a CLIP or SigLIP model in a folder of the user's."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .errors import Problem
from .video_measures import Frames

MOST_FRAMES = 8
"""Frames of a video that are compared with its prompt, spread evenly over it."""
MODEL_TYPES = ("clip", "siglip")
"""`model_type` of the models that are known here: image and text in one space, one vector each."""

_RULE = "it must be the folder of a CLIP or SigLIP model in transformers' layout: config.json, weights, tokenizer, preprocessor_config.json"
_REMEDY = "Give such a folder, or leave it out."
_NEEDED = {
    "weights (*.safetensors, pytorch_model.bin)": ("*.safetensors", "pytorch_model*.bin"),
    "tokenizer": ("tokenizer.json", "vocab.json", "spiece.model"),
    "preprocessor_config.json": ("preprocessor_config.json", "processor_config.json"),
}


def find_clip_problems(field: str, folder: Path) -> Iterator[Problem]:
    """What is wrong with the folder in the job's `field`, by its config.json and the names of its files; nothing is loaded."""
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError):
        found = "it has no config.json that can be read" if folder.is_dir() else "there is no such folder"
        yield Problem(f"{field} is {str(folder)!r}; {found}", _RULE, _REMEDY)
        return
    kind = config.get("model_type") if isinstance(config, Mapping) else None
    if kind not in MODEL_TYPES or not {"text_config", "vision_config"} <= config.keys():
        what = f"a model of type {kind!r}" if kind not in MODEL_TYPES else f"one half of a {kind} model"
        yield Problem(f"{field} is {str(folder)!r}, {what}", _RULE, _REMEDY)
        return
    missing = [name for name, patterns in _NEEDED.items() if not any(any(folder.glob(pattern)) for pattern in patterns)]
    if missing:
        yield Problem(f"{field} is {str(folder)!r}; it lacks {', '.join(missing)}", _RULE, _REMEDY)


def pick_frames(frames_FHWC: Frames) -> Frames:
    """At most `MOST_FRAMES` of the frames, the first and the last among them; a copy."""
    count = len(frames_FHWC)
    picked: Frames = frames_FHWC[np.linspace(0, count - 1, min(count, MOST_FRAMES)).round().astype(int)]
    return picked


@torch.inference_mode()
def adherence(folder: Path, videos: Sequence[tuple[str, Frames]]) -> list[float]:
    """For each (prompt, frames (F, H, W, 3)): the cosine of the prompt's and a frame's embedding, mean over the frames.

    In -1..1, more fits better; CLIPSIM of Wu et al. 2021 (arXiv:2104.14806). CLIP reads the first 77 tokens of a prompt,
    SigLIP 64. The model is loaded on the CPU, from the folder alone and without code of its own, and let go.
    """
    from transformers import AutoModel, AutoProcessor

    processor: Any = AutoProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    model: Any = AutoModel.from_pretrained(folder, local_files_only=True, trust_remote_code=False, dtype=torch.float32).eval()
    tokens = model.config.text_config.max_position_embeddings
    values = []
    for prompt, frames_FHWC in videos:
        inputs = processor(
            text=[prompt], images=list(frames_FHWC), padding="max_length", truncation=True, max_length=tokens, return_tensors="pt"
        )
        outputs = model(**inputs)
        cosines = torch.nn.functional.cosine_similarity(outputs.image_embeds, outputs.text_embeds, dim=-1)
        values.append(float(cosines.mean()))
    return values
