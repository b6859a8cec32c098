"""A checkpoint in ComfyUI's folder of that name holds a transformer and its VAE: Base Model takes both from it."""

from __future__ import annotations

from pathlib import Path

import torch
from comfy_server import Server
from graphs import TINY, node
from safetensors.torch import save_file

from trainers.checkpoint import Checkpoint
from trainers.demo import demo

NAME = "all_in_one.safetensors"


def write_all_in_one(path: Path) -> None:
    """The tiny Wan as one file, each part under its prefix."""
    parts = {"model.diffusion_model.": Checkpoint.open(demo.TRANSFORMER), "vae.": Checkpoint.open(demo.VAE, "vae")}
    tensors = {prefix + name: part.tensor(name) for prefix, part in parts.items() for name in part.tensors}
    path.parent.mkdir(exist_ok=True)
    save_file({name: tensor.to(torch.float32).contiguous() for name, tensor in tensors.items()}, path)


def test_it_is_offered_and_both_parts_are_used(server: Server):
    write_all_in_one(server.base_directory / "models" / "checkpoints" / NAME)
    assert NAME in server.choices("VideoTrainer_BaseModel", "transformer")
    assert NAME in server.choices("VideoTrainer_BaseModel", "vae")
    assert NAME not in server.choices("VideoTrainer_BaseModel", "text_encoder")
    entry = server.prompt(
        {
            "base": node("VideoTrainer_BaseModel", transformer=NAME, variant="read from the file", vae=NAME, text_encoder=TINY),
            "report": node("PreviewAny", source=["base", 1]),
            "encoders": node("VideoTrainer_LoadEncoders", base=["base", 0]),
            "latents": node("EmptyHunyuanLatentVideo", width=64, height=64, length=9, batch_size=1),
            "frames": node("VAEDecode", samples=["latents", 0], vae=["encoders", 1]),
            "shown": node("PreviewImage", images=["frames", 0]),
        }
    )
    assert entry["outputs"]["report"]["text"][0].startswith("Wan 2.1")
    assert len(entry["outputs"]["shown"]["images"]) == 9
