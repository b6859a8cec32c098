"""HunyuanVideo's key tables: the transformer in two native namings, its LoRAs, and the VAE."""

from __future__ import annotations

from collections.abc import Iterator

from ..keytable import Fuse, KeyTable, Pointwise, Rename, Row, SwapHalves

# Each module's name in diffusers, in ComfyUI's files and in the original ones.
_EMBEDDERS = (
    ("x_embedder.proj", "img_in.proj", "img_in.proj"),
    ("time_text_embed.timestep_embedder.linear_1", "time_in.in_layer", "time_in.mlp.0"),
    ("time_text_embed.timestep_embedder.linear_2", "time_in.out_layer", "time_in.mlp.2"),
    ("time_text_embed.guidance_embedder.linear_1", "guidance_in.in_layer", "guidance_in.mlp.0"),
    ("time_text_embed.guidance_embedder.linear_2", "guidance_in.out_layer", "guidance_in.mlp.2"),
    ("time_text_embed.text_embedder.linear_1", "vector_in.in_layer", "vector_in.in_layer"),
    ("time_text_embed.text_embedder.linear_2", "vector_in.out_layer", "vector_in.out_layer"),
    ("context_embedder.proj_in", "txt_in.input_embedder", "txt_in.input_embedder"),
    ("context_embedder.time_text_embed.timestep_embedder.linear_1", "txt_in.t_embedder.in_layer", "txt_in.t_embedder.mlp.0"),
    ("context_embedder.time_text_embed.timestep_embedder.linear_2", "txt_in.t_embedder.out_layer", "txt_in.t_embedder.mlp.2"),
    ("context_embedder.time_text_embed.text_embedder.linear_1", "txt_in.c_embedder.in_layer", "txt_in.c_embedder.linear_1"),
    ("context_embedder.time_text_embed.text_embedder.linear_2", "txt_in.c_embedder.out_layer", "txt_in.c_embedder.linear_2"),
    ("proj_out", "final_layer.linear", "final_layer.linear"),
)
_REFINER = (
    ("norm1", "norm1", "norm1"),
    ("norm2", "norm2", "norm2"),
    ("norm_out.linear", "adaLN_modulation.1", "adaLN_modulation.1"),
    ("attn.to_q attn.to_k attn.to_v", "self_attn.qkv", "self_attn_qkv"),
    ("attn.to_out.0", "self_attn.proj", "self_attn_proj"),
    ("ff.net.0.proj", "mlp.0", "mlp.fc1"),
    ("ff.net.2", "mlp.2", "mlp.fc2"),
)
_DOUBLE = (
    ("norm1.linear", "img_mod.lin", "img_mod.linear"),
    ("norm1_context.linear", "txt_mod.lin", "txt_mod.linear"),
    ("attn.to_q attn.to_k attn.to_v", "img_attn.qkv", "img_attn_qkv"),
    ("attn.add_q_proj attn.add_k_proj attn.add_v_proj", "txt_attn.qkv", "txt_attn_qkv"),
    ("attn.norm_q.weight", "img_attn.norm.query_norm.scale", "img_attn_q_norm.weight"),
    ("attn.norm_k.weight", "img_attn.norm.key_norm.scale", "img_attn_k_norm.weight"),
    ("attn.norm_added_q.weight", "txt_attn.norm.query_norm.scale", "txt_attn_q_norm.weight"),
    ("attn.norm_added_k.weight", "txt_attn.norm.key_norm.scale", "txt_attn_k_norm.weight"),
    ("attn.to_out.0", "img_attn.proj", "img_attn_proj"),
    ("attn.to_add_out", "txt_attn.proj", "txt_attn_proj"),
    ("ff.net.0.proj", "img_mlp.0", "img_mlp.fc1"),
    ("ff.net.2", "img_mlp.2", "img_mlp.fc2"),
    ("ff_context.net.0.proj", "txt_mlp.0", "txt_mlp.fc1"),
    ("ff_context.net.2", "txt_mlp.2", "txt_mlp.fc2"),
)
_SINGLE = (
    ("norm.linear", "modulation.lin", "modulation.linear"),
    ("attn.norm_q.weight", "norm.query_norm.scale", "q_norm.weight"),
    ("attn.norm_k.weight", "norm.key_norm.scale", "k_norm.weight"),
    ("proj_out", "linear2", "linear2"),
)


def _rows(naming: int) -> Iterator[Row]:
    """The rows of one way to name native tensors: 1 is ComfyUI's, 2 the original."""
    yield SwapHalves("norm_out.linear", "final_layer.adaLN_modulation.1")
    for ours, theirs, names in (
        ("", "", _EMBEDDERS),
        ("context_embedder.token_refiner.refiner_blocks.{}.", "txt_in.individual_token_refiner.blocks.{}.", _REFINER),
        ("transformer_blocks.{}.", "double_blocks.{}.", _DOUBLE),
        ("single_transformer_blocks.{}.", "single_blocks.{}.", _SINGLE),
    ):
        for name in names:
            members = tuple(ours + member for member in name[0].split())
            yield Rename(members[0], theirs + name[naming]) if len(members) == 1 else Fuse(members, theirs + name[naming])
    single = tuple(f"single_transformer_blocks.{{}}.{name}" for name in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"))
    yield Fuse(single, "single_blocks.{}.linear1", sizes=(1, 1, 1, 4))


# Files are read in both namings and written in ComfyUI's. LoRAs are written in the original one: ComfyUI and diffusers load
# no other both.
KEYS = KeyTable(tuple(dict.fromkeys((*_rows(1), *_rows(2)))))
LORA_KEYS = KeyTable(tuple(_rows(2)))


def _residual(ours: str, theirs: str) -> Iterator[Row]:
    names = {"norm1": "norm1", "norm2": "norm2", "conv1": "conv1", "conv2": "conv2", "conv_shortcut": "nin_shortcut"}
    yield from (Rename(f"{ours}.{name}", f"{theirs}.{native}") for name, native in names.items())


def _half(half: str, levels: str, resample: str, native: tuple[str, str]) -> Iterator[Row]:
    """The rows of the encoder or the decoder; a native decoder counts its levels from the last."""
    yield Rename(f"{half}.conv_norm_out", f"{half}.norm_out")
    yield from (Rename(f"{half}.{name}", f"{half}.{name}") for name in ("conv_in", "conv_out"))
    yield from (row for index in (0, 1) for row in _residual(f"{half}.mid_block.resnets.{index}", f"{half}.mid.block_{index + 1}"))
    yield Rename(f"{half}.mid_block.attentions.0.group_norm", f"{half}.mid.attn_1.norm")
    for name, theirs in {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}.items():
        yield Pointwise(f"{half}.mid_block.attentions.0.{name}", f"{half}.mid.attn_1.{theirs}")
    for level in range(4):
        ours, theirs = f"{half}.{levels}.{level}", f"{half}.{native[0]}.{level if half == 'encoder' else 3 - level}"
        yield from _residual(f"{ours}.resnets.{{}}", f"{theirs}.block.{{}}")
        yield Rename(f"{ours}.{resample}.0", f"{theirs}.{native[1]}")


VAE_KEYS = KeyTable(
    (
        Rename("quant_conv", "quant_conv"),
        Rename("post_quant_conv", "post_quant_conv"),
        *_half("encoder", "down_blocks", "downsamplers", ("down", "downsample")),
        *_half("decoder", "up_blocks", "upsamplers", ("up", "upsample")),
    )
)
