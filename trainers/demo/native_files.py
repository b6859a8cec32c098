"""The tiny base as files: Wan's own names, fp16; written from diffusers' classes and read back into them."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.loaders.single_file_utils import (
    convert_wan_transformer_to_diffusers,
    convert_wan_vae_to_diffusers,
)
from safetensors.torch import load_file, save_file

TRANSFORMER_FILE = "tiny_wan2.1_t2v_fp16.safetensors"
VAE_FILE = "tiny_wan_vae.safetensors"

_TRANSFORMER_NAMES = (
    (r"condition_embedder\.text_embedder\.linear_1", "text_embedding.0"),
    (r"condition_embedder\.text_embedder\.linear_2", "text_embedding.2"),
    (r"condition_embedder\.time_embedder\.linear_1", "time_embedding.0"),
    (r"condition_embedder\.time_embedder\.linear_2", "time_embedding.2"),
    (r"condition_embedder\.time_proj", "time_projection.1"),
    (r"(blocks\.\d+)\.scale_shift_table", r"\1.modulation"),
    (r"scale_shift_table", "head.modulation"),
    (r"proj_out", "head.head"),
    (r"(.*)\.ffn\.net\.0\.proj", r"\1.ffn.0"),
    (r"(.*)\.ffn\.net\.2", r"\1.ffn.2"),
    (r"(.*)\.norm2", r"\1.norm3"),
    (r"(.*)\.attn1\.to_([qkv])", r"\1.self_attn.\2"),
    (r"(.*)\.attn2\.to_([qkv])", r"\1.cross_attn.\2"),
    (r"(.*)\.attn1\.to_out\.0", r"\1.self_attn.o"),
    (r"(.*)\.attn2\.to_out\.0", r"\1.cross_attn.o"),
    (r"(.*)\.attn1\.(norm_[qk])", r"\1.self_attn.\2"),
    (r"(.*)\.attn2\.(norm_[qk])", r"\1.cross_attn.\2"),
)
_VAE_NAMES = (
    (r"post_quant_conv", "conv2"),
    (r"quant_conv", "conv1"),
    (r"(\w+)\.conv_in", r"\1.conv1"),
    (r"(\w+)\.norm_out", r"\1.head.0"),
    (r"(\w+)\.conv_out", r"\1.head.2"),
    (r"(.*)\.norm1", r"\1.residual.0"),
    (r"(.*)\.conv1", r"\1.residual.2"),
    (r"(.*)\.norm2", r"\1.residual.3"),
    (r"(.*)\.conv2", r"\1.residual.6"),
    (r"(.*)\.conv_shortcut", r"\1.shortcut"),
)


def _transformer_name(name: str) -> str:
    """Wan's name of a diffusers parameter of the transformer."""
    return _renamed(name, _TRANSFORMER_NAMES)


def _vae_name(name: str) -> str:
    """Wan's name of a diffusers parameter of the VAE: blocks are numbered through, four to an upsampling stage."""
    name = _renamed(name, _VAE_NAMES)
    name = name.replace("mid_block.resnets.0", "middle.0").replace("mid_block.resnets.1", "middle.2")
    name = name.replace("mid_block.attentions.0", "middle.1").replace("down_blocks", "downsamples")
    stage = re.fullmatch(r"decoder\.up_blocks\.(\d)\.(resnets|upsamplers)\.(\d)\.(.*)", name)
    if stage is None:
        return name
    number = 4 * int(stage[1]) + (int(stage[3]) if stage[2] == "resnets" else 3)
    return f"decoder.upsamples.{number}.{stage[4]}"


def _renamed(name: str, table: tuple[tuple[str, str], ...]) -> str:
    """`name` with its module, or the whole of it, renamed by the first row that matches."""
    module, _, parameter = name.rpartition(".")
    for pattern, native in table:
        if match := re.fullmatch(pattern, name):
            return match.expand(native)
        if match := re.fullmatch(pattern, module):
            return f"{match.expand(native)}.{parameter}"
    return name


def save_transformer(model: WanTransformer3DModel, folder: Path) -> None:
    """Write the transformer with Wan's names, fp16."""
    _save({_transformer_name(name): tensor for name, tensor in model.state_dict().items()}, folder / TRANSFORMER_FILE)


def save_vae(vae: AutoencoderKLWan, folder: Path) -> None:
    """Write the VAE with Wan's names, fp16."""
    _save({_vae_name(name): tensor for name, tensor in vae.state_dict().items()}, folder / VAE_FILE)


def _save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write fp16 tensors in the order of their names, with nothing of time or place."""
    save_file({name: tensors[name].half().contiguous() for name in sorted(tensors)}, str(path))


def load_transformer(folder: Path) -> WanTransformer3DModel:
    """The shipped transformer, float32."""
    tensors = load_file(str(folder / TRANSFORMER_FILE))
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=tensors["patch_embedding.bias"].shape[0] // 128,
        attention_head_dim=128,
        text_dim=tensors["text_embedding.0.weight"].shape[1],
        ffn_dim=tensors["blocks.0.ffn.0.bias"].shape[0],
        num_layers=len({name.split(".")[1] for name in tensors if name.startswith("blocks.")}),
    )
    model.load_state_dict(convert_wan_transformer_to_diffusers(dict(tensors)))
    return model.eval()


def load_vae(folder: Path) -> AutoencoderKLWan:
    """The shipped VAE, float32."""
    tensors = load_file(str(folder / VAE_FILE))
    vae = AutoencoderKLWan(base_dim=tensors["encoder.conv1.bias"].shape[0], z_dim=16)
    vae.load_state_dict(convert_wan_vae_to_diffusers(dict(tensors)))
    return vae.eval()
