"""How Wan's tensors are named: native files <-> diffusers' WanTransformer3DModel and AutoencoderKLWan."""

from __future__ import annotations

from ..keytable import KeyTable, Rename


def _attention(number: int, native: str) -> tuple[Rename, ...]:
    names = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "o", "norm_q": "norm_q", "norm_k": "norm_k"}
    if number == 2:
        names |= {"add_k_proj": "k_img", "add_v_proj": "v_img", "norm_added_k": "norm_k_img"}
    return tuple(Rename(f"blocks.{{}}.attn{number}.{ours}", f"blocks.{{}}.{native}.{theirs}") for ours, theirs in names.items())


KEYS = KeyTable(
    (
        Rename("patch_embedding", "patch_embedding"),
        Rename("condition_embedder.text_embedder.linear_1", "text_embedding.0"),
        Rename("condition_embedder.text_embedder.linear_2", "text_embedding.2"),
        Rename("condition_embedder.time_embedder.linear_1", "time_embedding.0"),
        Rename("condition_embedder.time_embedder.linear_2", "time_embedding.2"),
        Rename("condition_embedder.time_proj", "time_projection.1"),
        Rename("condition_embedder.image_embedder.pos_embed", "img_emb.emb_pos"),
        Rename("condition_embedder.image_embedder.norm1", "img_emb.proj.0"),
        Rename("condition_embedder.image_embedder.ff.net.0.proj", "img_emb.proj.1"),
        Rename("condition_embedder.image_embedder.ff.net.2", "img_emb.proj.3"),
        Rename("condition_embedder.image_embedder.norm2", "img_emb.proj.4"),
        *_attention(1, "self_attn"),
        *_attention(2, "cross_attn"),
        # The second norm of a diffusers block is the third of a native one; the other two have no weights.
        Rename("blocks.{}.norm2", "blocks.{}.norm3"),
        Rename("blocks.{}.ffn.net.0.proj", "blocks.{}.ffn.0"),
        Rename("blocks.{}.ffn.net.2", "blocks.{}.ffn.2"),
        Rename("blocks.{}.scale_shift_table", "blocks.{}.modulation"),
        Rename("scale_shift_table", "head.modulation"),
        Rename("proj_out", "head.head"),
    )
)


def _residual(ours: str, theirs: str) -> tuple[Rename, ...]:
    names = {"norm1": "residual.0", "conv1": "residual.2", "norm2": "residual.3", "conv2": "residual.6", "conv_shortcut": "shortcut"}
    return tuple(Rename(f"{ours}.{name}", f"{theirs}.{native}") for name, native in names.items())


def _both_halves(half: str) -> tuple[Rename, ...]:
    return (
        Rename(f"{half}.conv_in", f"{half}.conv1"),
        *_residual(f"{half}.mid_block.resnets.0", f"{half}.middle.0"),
        Rename(f"{half}.mid_block.attentions.0", f"{half}.middle.1"),
        *_residual(f"{half}.mid_block.resnets.1", f"{half}.middle.2"),
        Rename(f"{half}.norm_out", f"{half}.head.0"),
        Rename(f"{half}.conv_out", f"{half}.head.2"),
    )


def _up_level(level: int) -> tuple[Rename, ...]:
    """Three residual blocks and an upsampler, numbered one after the other in a native file."""
    first, ours = 4 * level, f"decoder.up_blocks.{level}"
    blocks = [row for index in range(3) for row in _residual(f"{ours}.resnets.{index}", f"decoder.upsamples.{first + index}")]
    return (*blocks, Rename(f"{ours}.upsamplers.0", f"decoder.upsamples.{first + 3}"))


_OUTER = (Rename("quant_conv", "conv1"), Rename("post_quant_conv", "conv2"), *_both_halves("encoder"), *_both_halves("decoder"))

VAE_KEYS_2_1 = KeyTable(
    (
        *_OUTER,
        *_residual("encoder.down_blocks.{}", "encoder.downsamples.{}"),
        Rename("encoder.down_blocks.{}.resample", "encoder.downsamples.{}.resample"),
        Rename("encoder.down_blocks.{}.time_conv", "encoder.downsamples.{}.time_conv"),
        *(row for level in range(4) for row in _up_level(level)),
    )
)


def _residual_level(level: int) -> tuple[Rename, ...]:
    """One level of the 2.2 VAE on both ways: two residual blocks and a downsampler, three and an upsampler."""
    down, native_down = f"encoder.down_blocks.{level}", f"encoder.downsamples.{level}.downsamples"
    up, native_up = f"decoder.up_blocks.{level}", f"decoder.upsamples.{level}.upsamples"
    return (
        *(row for index in range(2) for row in _residual(f"{down}.resnets.{index}", f"{native_down}.{index}")),
        Rename(f"{down}.downsampler", f"{native_down}.2"),
        *(row for index in range(3) for row in _residual(f"{up}.resnets.{index}", f"{native_up}.{index}")),
        Rename(f"{up}.upsampler", f"{native_up}.3"),
    )


VAE_KEYS_2_2 = KeyTable((*_OUTER, *(row for level in range(4) for row in _residual_level(level))))
