"""Models of every variant that are wide enough for a plan of their memory to be compared with what they take: a few blocks of width
256 and more, and some hundred tokens, so that neither an allocation's rounding nor what lies outside the blocks is most of it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny_families import filled, tiny_config, write_encoded_of, write_native_vae

from simulated_gpu.plans import Cell
from trainers.family import Family, Variant, families
from trainers.job import Job, parse_job
from trainers.load import native_state
from trainers.stable_file import save_file

VARIANTS = {variant.id: (family, variant) for family in families().values() for variant in family.variants}
WIDE: dict[str, dict[str, Any]] = {
    "wan": {"num_attention_heads": 2, "ffn_dim": 1024, "num_layers": 4},
    "ltx": {"num_attention_heads": 4, "attention_head_dim": 64, "cross_attention_dim": 256, "num_layers": 4},
    "hunyuan": {"num_attention_heads": 2, "num_layers": 2, "num_single_layers": 4},
    "mochi": {"num_attention_heads": 4, "attention_head_dim": 64, "num_layers": 4},
}
LATENT_SIDES = {"wan": (20, 24), "ltx": (10, 12), "hunyuan": (20, 24), "mochi": (20, 24)}
"""Height and width of the latents of three frames: 360 tokens."""
STORED = {"float32": torch.float32, "bf16": torch.bfloat16}


def write_base(path: Path, family: Family, variant: Variant, stored: str) -> Path:
    """A wide transformer as a native file in float32, in bf16, or with the matrices of its blocks in fp8 with scales."""
    sizes = dict(WIDE[family.id])
    config = tiny_config(family, variant) | sizes
    if config.get("added_kv_proj_dim"):
        config["added_kv_proj_dim"] = 256
    state = native_state(filled(family.build(config)).state_dict(), family.keys)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(
        _as_fp8_scaled(state) if stored == "fp8_scaled" else {name: tensor.to(STORED[stored]) for name, tensor in state.items()}, path
    )
    return path


def _as_fp8_scaled(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    found = {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}
    for name, tensor in state.items():
        if "blocks." in name and name.endswith(".weight") and tensor.ndim == 2:
            scale = tensor.abs().max() / 448
            found[name], found[name.removesuffix("weight") + "scale_weight"] = (tensor / scale).to(torch.float8_e4m3fn), scale.float()
        else:
            found[name] = tensor.to(torch.bfloat16)
    return found


def job_of(cell: Cell, files: Path, folder: Path) -> Job:
    """The job of a cell on the GPU; what is in `files` already is taken as it is."""
    return wide_job(files, folder, *VARIANTS[cell.variant], cell.stored, **cell.fields)


def job_with_previews(variant: str, files: Path, folder: Path, size_factor: int, **fields: Any) -> Job:
    """A job with one preview of as many frames as the clips, with sides so many times as long, and a clip that is held out."""
    family, found = VARIANTS[variant]
    latent, (height, width) = family.latent(found), LATENT_SIDES[family.id]
    vae = next(vae for vae in family.vaes if vae.fits(found))
    path = folder / "vae.safetensors"
    folder.mkdir(parents=True, exist_ok=True)
    write_native_vae(path, family, vae)
    sides = {"height": size_factor * height * latent.spatial_stride, "width": size_factor * width * latent.spatial_stride}
    previews = {"every_steps": 1, "prompts": [""], "negative": "", "sampling_steps": 1, "shift": 1.0, "cfg": 2.0} | sides
    previews["num_frames"] = 2 * latent.temporal_stride + 1
    return wide_job(files, folder, family, found, "float32", previews=previews, held_out={"every_steps": 1}, vae=str(path), **fields)


def wide_job(files: Path, folder: Path, family: Family, variant: Variant, stored: str, vae: str | None = None, **fields: Any) -> Job:
    """A job on the GPU over a wide base; what is in `files` already is taken as it is."""
    stride = family.latent(variant).spatial_stride
    encoded = files / f"{variant.id}-encoded"
    if not encoded.exists():
        height, width = LATENT_SIDES[family.id]
        write_encoded_of(encoded, family, variant, 5, 1, (height * stride, width * stride))
    experts = ("high", "low") if variant.boundary is not None else ("",)
    bases = [files / f"{variant.id}_{expert}_{stored}.safetensors" for expert in experts]
    for path in bases:
        if not path.exists():
            write_base(path, family, variant, stored)
    base = {
        "transformer": str(bases[0]),
        **({"vae": vae} if vae else {}),
        "variant": variant.id,
    }
    if len(bases) == 2:
        base["transformer_low_noise"] = str(bases[1])
    values = {
        "name": "wide",
        "base": base,
        "encoded": str(encoded),
        "runs_folder": str(folder / "runs"),
        "loras_folder": str(folder / "loras"),
        "device": "cuda:0",
        "precision": "fp32" if stored == "float32" else "bf16",
        "steps": 100,
        "batch_size": 1,
        "tensorboard": False,
        "held_out": {"every_steps": 0},
        "experts": {"turn_steps": 1} if len(bases) == 2 else {},
    }
    return parse_job(values | ({} if fields.get("method") == "full" else {"lora": {"rank": 4}}) | fields)
