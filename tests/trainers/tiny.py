"""A small Wan with random weights in a native file, random latents in an encoded folder, and a job over both: real files,
read by the real loading code, in milliseconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from trainers.data.cache import Cache
from trainers.data.encoded import Encoded, EncodedItem
from trainers.family import TextRecord, families
from trainers.job import Job, parse_job
from trainers.load import native_state
from trainers.stable_file import save_file

WAN = families()["wan"]
VARIANT = "wan2.1-t2v"


@dataclass(frozen=True)
class TinyShape:
    """Sizes of the model and of its clips (pixels)."""

    layers: int = 2
    width: int = 128
    ffn: int = 256
    text_dim: int = 64
    height: int = 32
    width_pixels: int = 32
    num_frames: int = 5

    @property
    def latent(self) -> tuple[int, int, int, int]:
        return WAN.latent(WAN.variants[0]).shape(self.num_frames, self.height, self.width_pixels)

    @property
    def config(self) -> dict[str, object]:
        return {
            "patch_size": (1, 2, 2),
            "num_attention_heads": self.width // 128,
            "attention_head_dim": 128,
            "in_channels": 16,
            "out_channels": 16,
            "text_dim": self.text_dim,
            "freq_dim": 256,
            "ffn_dim": self.ffn,
            "num_layers": self.layers,
            "cross_attn_norm": True,
            "qk_norm": "rms_norm_across_heads",
            "eps": 1e-6,
            "image_dim": None,
            "added_kv_proj_dim": None,
            "rope_max_seq_len": 1024,
            "pos_embed_seq_len": None,
        }


def random_transformer(shape: TinyShape, seed: int = 0) -> torch.nn.Module:
    """A WanTransformer3DModel in float32 with weights that make every part count."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(seed)
    model = WanTransformer3DModel(**shape.config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
        model.proj_out.weight.normal_(std=0.1)
    return model.eval().requires_grad_(False)


def write_transformer(path: Path, shape: TinyShape, dtype: torch.dtype = torch.float32) -> Path:
    """The random transformer as a native single file."""
    state = {name: tensor.to(dtype) for name, tensor in random_transformer(shape).state_dict().items()}
    save_file(native_state(state, WAN.keys), path)
    return path


def as_fp8_scaled(path: Path) -> None:
    """Store the Linears of the blocks as fp8 with a scale, in the older of the two spellings."""
    stored = {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}
    for name, tensor in load_file(path).items():
        if name.startswith("blocks.") and name.endswith(".weight") and tensor.ndim == 2:
            scale = tensor.abs().max() / 448
            stored[name] = (tensor / scale).to(torch.float8_e4m3fn)
            stored[name.replace(".weight", ".scale_weight")] = scale.float()
        else:
            stored[name] = tensor.clone()
    save_file(stored, path, overwrite=True)


def write_encoded(folder: Path, shape: TinyShape, clips: int = 6, held_out: int = 2) -> Path:
    """An encoded folder of random latents and captions; the last `held_out` clips are held out."""
    cache = Cache(folder / "cache")
    chance = torch.Generator().manual_seed(1)
    texts = {text: cache.text_key(text, "tiny") for text in ["", "a preview", *(f"clip {i}" for i in range(clips))]}
    for i, key in enumerate(texts.values()):
        cache.write_text(key, TextRecord(torch.randn(3 + i % 4, shape.text_dim, generator=chance)))
    items = []
    for i in range(clips):
        key = cache.latents_key(f"clip {i}", 0.0, shape.num_frames, 16.0, shape.height, shape.width_pixels, "tiny")
        cache.write_latents(key, torch.randn(shape.latent, generator=chance))
        size = (shape.num_frames, shape.height, shape.width_pixels)
        text = texts[f"clip {i}"]
        items.append(EncodedItem(key, text, f"clip {i}", f"{i}.mp4", 0.0, *size, 16.0, 1, i >= clips - held_out))
    prompts = {text: texts[text] for text in ("", "a preview")}
    Encoded(folder, "wan", VARIANT, tuple(items), prompts, cache).save()
    return folder


def tiny_job(folder: Path, shape: TinyShape | None = None, **fields: object) -> Job:
    """A job over a new random base and data set in `folder`, on the CPU; `fields` are the job's own."""
    shape = shape or TinyShape()
    values = {
        "name": "tiny",
        "base": {"transformer": str(write_transformer(folder / "tiny_wan2.1_t2v.safetensors", shape))},
        "encoded": str(write_encoded(folder / "encoded", shape)),
        "runs_folder": str(folder / "runs"),
        "loras_folder": str(folder / "loras"),
        "device": "cpu",
        "steps": 4,
        "lora": {"rank": 4},
        "gradient_checkpointing": False,
        "tensorboard": False,
        "held_out": {"every_steps": 0},
    }
    return parse_job(values | fields)
