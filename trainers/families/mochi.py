"""Mochi 1 preview, text to video (https://github.com/genmoai/mochi), trained as diffusers' MochiTransformer3DModel.

The model's time runs from noise to clean: it is fed 1000 * (1 - sigma) and answers clean - noise, so both are turned round
here. Text is 256 rows of T5-XXL with a mask on both sides of the joint attention. A native file has fused projections and
the halves of every gated layer (`w1`) the other way round; its last block does not go on with the text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..errors import CheckpointError, Problem
from ..family import (
    ComfyNames,
    ComfyT5,
    Conditions,
    ControlLoras,
    Detection,
    Family,
    FirstFrameRule,
    LatentSpec,
    LoraTargets,
    ModelInput,
    PrecisionName,
    Sampling,
    TextBatch,
    TextFolder,
    TextRecord,
    Vae,
    VaeDetection,
    Variant,
    simple_schedule,
)
from ..keytable import Fuse, KeyTable, Rename, Row, SwapHalves
from ..offload.chunks import ChunkedForward
from ..text_masks import every_row, padded, rows_that_count
from ._mochi_attention import JointAttention
from ._mochi_block import CHUNKED
from ._mochi_trial import TRIAL

if TYPE_CHECKING:
    from ..checkpoint import Checkpoint

TEXT_LENGTH = 256
TIME_SCALE = 1000.0

# Per channel of the VAE's latents; diffusers' AutoencoderKLMochi and ComfyUI's Mochi agree on them.
# fmt: off
_MEAN = (
    -0.06730895953510081, -0.038011381506090416, -0.07477820912866141, -0.05565264470995561,
    0.012767231469026969, -0.04703542746246419, 0.043896967884726704, -0.09346305707025976,
    -0.09918314763016893, -0.008729793427399178, -0.011931556316503654, -0.0321993391887285,
)
_STD = (
    0.9263795028493863, 0.9248894543193766, 0.9393059390890617, 0.959253732819592,
    0.8244560132752793, 0.917259975397747, 0.9294154431013696, 1.3720942357788521,
    0.881393668867029, 0.9168315692124348, 0.9185249279345552, 0.9274757570805041,
)
# fmt: on
LATENT = LatentSpec(12, temporal_stride=6, spatial_stride=8, spatial_step=16, fps=30.0, mean=_MEAN, std=_STD)

_PREVIEW = Variant("mochi-1-preview", "Mochi 1 preview")

# What a Mochi transformer or VAE has and other models have not, and what its config is read from.
_TELLING = ("pos_frequencies", "x_embedder.proj.weight", "t5_yproj.weight", "t_embedder.mlp.0.weight", "final_layer.linear.weight")
_TELLING_DIFFUSERS = (
    "pos_frequencies",
    "patch_embed.proj.weight",
    "time_embed.pooler.to_kv.weight",
    "time_embed.caption_proj.weight",
    "time_embed.timestep_embedder.linear_1.weight",
    "proj_out.weight",
)
_DECODER = (
    "decoder.blocks.2.blocks.3.stack.5.weight",
    "blocks.2.blocks.3.stack.5.weight",
    "decoder.block_in.resnets.0.norm1.norm_layer.weight",
)
_ENCODER = (
    "encoder.layers.4.layers.1.attn_block.attn.qkv.weight",
    "layers.4.layers.1.attn_block.attn.qkv.weight",
    "encoder.down_blocks.0.attentions.0.to_q.weight",
)

# Arguments of the diffusers classes that no shape tells: the values of the published model, or those of a config.json.
_CONSTANTS = {"qk_norm": "rms_norm", "activation_fn": "swiglu", "max_sequence_length": TEXT_LENGTH}
_VAE_FIELDS = ("layers_per_block", "temporal_expansions", "spatial_expansions", "add_attention_block", "act_fn")

_BLOCK = "transformer_blocks.{}"


def _stream(side: str, qkv: tuple[str, str, str], out: str, norms: str, feed_forward: str) -> tuple[Row, ...]:
    """What a block has for the video ("x") and again for the text ("y")."""
    block = "blocks.{}"
    return (
        Fuse((f"{_BLOCK}.attn1.{qkv[0]}", f"{_BLOCK}.attn1.{qkv[1]}", f"{_BLOCK}.attn1.{qkv[2]}"), f"{block}.attn.qkv_{side}"),
        Rename(f"{_BLOCK}.attn1.{out}", f"{block}.attn.proj_{side}"),
        Rename(f"{_BLOCK}.attn1.{norms}q", f"{block}.attn.q_norm_{side}"),
        Rename(f"{_BLOCK}.attn1.{norms}k", f"{block}.attn.k_norm_{side}"),
        SwapHalves(f"{_BLOCK}.{feed_forward}.net.0.proj", f"{block}.mlp_{side}.w1"),
        Rename(f"{_BLOCK}.{feed_forward}.net.2", f"{block}.mlp_{side}.w2"),
    )


KEYS = KeyTable(
    (
        Rename("pos_frequencies", "pos_frequencies"),
        Rename("patch_embed.proj", "x_embedder.proj"),
        Rename("time_embed.timestep_embedder.linear_1", "t_embedder.mlp.0"),
        Rename("time_embed.timestep_embedder.linear_2", "t_embedder.mlp.2"),
        Rename("time_embed.pooler", "t5_y_embedder"),
        Rename("time_embed.caption_proj", "t5_yproj"),
        Rename(f"{_BLOCK}.norm1.linear", "blocks.{}.mod_x"),
        Rename(f"{_BLOCK}.norm1_context.linear", "blocks.{}.mod_y"),
        Rename(f"{_BLOCK}.norm1_context.linear_1", "blocks.{last}.mod_y"),
        *_stream("x", ("to_q", "to_k", "to_v"), "to_out.0", "norm_", "ff"),
        *_stream("y", ("add_q_proj", "add_k_proj", "add_v_proj"), "to_add_out", "norm_added_", "ff_context"),
        SwapHalves("norm_out.linear", "final_layer.mod"),
        Rename("proj_out", "final_layer.linear"),
    ),
    last=47,
)


def _residual(ours: str, theirs: str, attention: str = "", norm: str = "") -> tuple[Row, ...]:
    """A residual block, and the attention after it if there is one."""
    names = {"norm1.norm_layer": "stack.0", "conv1.conv": "stack.2", "norm2.norm_layer": "stack.3", "conv2.conv": "stack.5"}
    rows: list[Row] = [Rename(f"{ours}.{name}", f"{theirs}.{native}") for name, native in names.items()]
    if attention:
        rows.append(Rename(f"{norm}.norm_layer", f"{theirs}.attn_block.norm"))
        rows.append(Fuse((f"{attention}.to_q", f"{attention}.to_k", f"{attention}.to_v"), f"{theirs}.attn_block.attn.qkv"))
        rows.append(Rename(f"{attention}.to_out.0", f"{theirs}.attn_block.attn.out"))
    return tuple(rows)


def _encoder_rows() -> tuple[Row, ...]:
    """One list of layers: the input, 3 blocks, 3 stages that shrink the video, 3 blocks."""
    rows: list[Row] = [Rename("encoder.proj_in", "encoder.layers.0")]
    for index in range(3):
        rows += _residual(f"encoder.block_in.resnets.{index}", f"encoder.layers.{index + 1}")
    for stage, blocks in enumerate((3, 4, 6)):
        ours, theirs = f"encoder.down_blocks.{stage}", f"encoder.layers.{stage + 4}"
        rows.append(Rename(f"{ours}.conv_in.conv", f"{theirs}.layers.0"))
        for index in range(blocks):
            parts = (f"{ours}.attentions.{index}", f"{ours}.norms.{index}")
            rows += _residual(f"{ours}.resnets.{index}", f"{theirs}.layers.{index + 1}", *parts)
    for index in range(3):
        ours = "encoder.block_out"
        rows += _residual(f"{ours}.resnets.{index}", f"encoder.layers.{index + 7}", f"{ours}.attentions.{index}", f"{ours}.norms.{index}")
    return (*rows, Rename("encoder.norm_out.norm_layer", "encoder.output_norm"), Rename("encoder.proj_out", "encoder.output_proj"))


def _decoder_rows(start: str) -> tuple[Row, ...]:
    """The input with 3 blocks, 3 stages that grow the video, 3 blocks; native names begin with `start`."""
    rows: list[Row] = [Rename("decoder.conv_in", f"{start}blocks.0.0")]
    for index in range(3):
        rows += _residual(f"decoder.block_in.resnets.{index}", f"{start}blocks.0.{index + 1}")
        rows += _residual(f"decoder.block_out.resnets.{index}", f"{start}blocks.4.{index}")
        rows += _residual(f"decoder.up_blocks.{index}.resnets.{{}}", f"{start}blocks.{index + 1}.blocks.{{}}")
        rows.append(Rename(f"decoder.up_blocks.{index}.proj", f"{start}blocks.{index + 1}.proj"))
    return (*rows, Rename("decoder.proj_out", f"{start}output_proj"))


# The last rows are those of a file that is the decoder alone, whose names have no beginning.
VAE_KEYS = KeyTable((*_encoder_rows(), *_decoder_rows("decoder."), *_decoder_rows("")))

_VAE = Vae("mochi", "Mochi VAE", VAE_KEYS)


class Mochi:
    """The Family protocol for Mochi."""

    id = "mochi"
    title = "Mochi"
    variants: tuple[Variant, ...] = (_PREVIEW,)
    keys = KEYS
    vaes: tuple[Vae, ...] = (_VAE,)
    lora_keys = KEYS
    targets = LoraTargets(
        attention=(r"^transformer_blocks\.\d+\.attn1\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)$",),
        feed_forward=(r"^transformer_blocks\.\d+\.ff(_context)?\.net\.(0\.proj|2)$",),
    )
    blocks: tuple[str, ...] = ("transformer_blocks",)
    precisions: tuple[PrecisionName, ...] = ("bf16", "fp32")
    chunked: tuple[ChunkedForward, ...] = CHUNKED
    control: ControlLoras | None = None
    trial = TRIAL

    def latent(self, variant: Variant) -> LatentSpec:
        return LATENT

    def sampling(self, variant: Variant) -> Sampling:
        return Sampling(steps=30, shift=6.0, cfg=4.5, schedule=simple_schedule)

    def comfyui(self, variant: Variant) -> ComfyNames:
        return ComfyNames("MOCHI", "Mochi", "MochiT5Tokenizer", ("genmo.vae.model.VideoVAE",), t5=ComfyT5("genmo", "mochi_te", "t5xxl"))

    def first_frame(self, variant: Variant) -> FirstFrameRule | None:
        return None

    def detect(self, checkpoint: Checkpoint) -> Detection | None:
        """See Family. Raises CheckpointError for a Mochi with unknown keys."""
        tensors = checkpoint.tensors
        is_diffusers = tensors.keys() >= set(_TELLING_DIFFUSERS)
        if not is_diffusers and not tensors.keys() >= set(_TELLING):
            return None
        shapes = _shapes(checkpoint, KEYS, is_diffusers)
        config = _config_from_shapes(shapes) | checkpoint.config_fields("MochiTransformer3DModel", tuple(_CONSTANTS))
        return Detection(FAMILY, (_PREVIEW,), config, reason=_reason(config))

    def build(self, config: Mapping[str, Any]) -> torch.nn.Module:
        """See Family. Attention is ours (see `_mochi_attention`), and the rope tables.

        Diffusers' rope asks for an autocast to float32, which torch refuses with a warning in every step.
        """
        from diffusers import MochiTransformer3DModel

        with torch.device("meta"):
            transformer = MochiTransformer3DModel(**config)
        transformer.rope._create_rope = _rope_tables
        for block in transformer.transformer_blocks:
            block.attn1.processor = JointAttention()
        assert isinstance(transformer, torch.nn.Module)
        return transformer

    def detect_vae(self, checkpoint: Checkpoint) -> VaeDetection | None:
        """See Family. Raises CheckpointError for the encoder alone, which can show no preview, and for unknown keys."""
        encodes, decodes = (any(name in checkpoint.tensors for name in names) for names in (_ENCODER, _DECODER))
        if not decodes:
            if encodes:
                raise _encoder_only(checkpoint)
            return None
        shapes = _shapes(checkpoint, VAE_KEYS, _DECODER[-1] in checkpoint.tensors)
        config = _vae_config(shapes) | checkpoint.config_fields("AutoencoderKLMochi", _VAE_FIELDS)
        return VaeDetection(FAMILY, _VAE, config, encodes)

    def build_vae(self, detection: VaeDetection) -> torch.nn.Module:
        """See Family. Without an encoder when the file has none."""
        from diffusers import AutoencoderKLMochi

        with torch.device("meta"):
            vae: Any = AutoencoderKLMochi(**detection.config)
        if not detection.encodes:
            vae.encoder = None
        assert isinstance(vae, torch.nn.Module)
        return vae

    @torch.no_grad()
    def encode_video(self, vae: torch.nn.Module, pixels_BCFHW: torch.Tensor) -> torch.Tensor:
        """See Family. Float32 (B, 12, (F - 1) / 6 + 1, H / 8, W / 8); the posterior's mean.

        The encoder's attention over time is causal, as published. ComfyUI 0.8.0 computes it without the mask, so beyond one
        latent frame its latents are others.
        """
        weight = next(vae.parameters())
        moments: Any = vae.encode(pixels_BCFHW.to(weight.device, weight.dtype)).latent_dist  # type: ignore[operator]
        mean, std = _statistics(weight.device)
        latents: torch.Tensor = (moments.mode().float() - mean) / std
        return latents

    @torch.no_grad()
    def decode_video(self, vae: torch.nn.Module, latents_BCFHW: torch.Tensor) -> torch.Tensor:
        """See Family. Float32 (B, 3, 6 (F - 1) + 1, 8 H, 8 W).

        The frames that every stage makes before the first one are dropped where they are made, as the published decoder
        does. Diffusers drops them at the end, after the causal convolutions have looked at them.
        """
        decoder: Any = vae.decoder
        weight = next(vae.parameters())
        mean, std = _statistics(weight.device)
        hidden = decoder.conv_in((latents_BCFHW.to(weight.device, torch.float32) * std + mean).to(weight.dtype))
        hidden, _ = decoder.block_in(hidden)
        for stage in decoder.up_blocks:
            hidden, _ = stage(hidden)
            hidden = hidden[:, :, stage.temporal_expansion - 1 :]
        hidden, _ = decoder.block_out(hidden)
        pixels_BFHWC: torch.Tensor = decoder.proj_out(decoder.nonlinearity(hidden).permute(0, 2, 3, 4, 1))
        return pixels_BFHWC.permute(0, 4, 1, 2, 3).float().clamp(-1.0, 1.0)

    @torch.no_grad()
    def encode_text(
        self, variant: Variant, folder: TextFolder, prompts: Sequence[str], image_HWC: torch.Tensor | None = None
    ) -> list[TextRecord]:
        """See Family. T5 rows (L, D) with L <= 256, in the encoder's dtype, on the CPU; the empty prompt is its end mark.

        Each prompt is encoded by itself and without padding; with a mask over the padding the encoder would compute the same.
        """
        tokenizer, text_encoder = folder.tokenizer(), folder.text_encoder()
        device = next(text_encoder.parameters()).device
        records = []
        for prompt in prompts:
            tokens = tokenizer(prompt, max_length=TEXT_LENGTH, truncation=True, add_special_tokens=True, return_tensors="pt")
            hidden = text_encoder(tokens.input_ids.to(device), tokens.attention_mask.to(device)).last_hidden_state
            records.append(TextRecord(hidden[0].cpu()))
        return records

    def encode_image(self, folder: TextFolder, image_HWC: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError("no variant here looks at an image")

    def text_width(self, config: Mapping[str, Any]) -> int:
        return int(config["text_embed_dim"])

    def collate_text(self, records: Sequence[TextRecord], device: torch.device, dtype: torch.dtype) -> TextBatch:
        """As many rows as the longest record has, 256 at most; zeros after a shorter one; the mask is True on its own (None: all).

        The model was trained on 256 rows, of which those that are not text are masked everywhere.
        """
        lengths = [min(len(record.embeds_LD), TEXT_LENGTH) for record in records]
        return TextBatch(padded(records, lengths, device, dtype), rows_that_count(lengths, device))

    def required(self, variant: Variant) -> frozenset[str]:
        return frozenset({"latents"})

    def prepare(self, variant: Variant, noisy_BCFHW: torch.Tensor, sigma_B: torch.Tensor, conditions: Conditions) -> ModelInput:
        """See Family. The latents as they are; times float32, one for each sample, from 0 (noise) to 1000 (clean)."""
        return ModelInput(noisy_BCFHW, timesteps=TIME_SCALE * (1.0 - sigma_B.float()))

    def predict(self, transformer: torch.nn.Module, inputs: ModelInput, text: TextBatch) -> torch.Tensor:
        """See Family. Computes in the text's dtype; the velocity is float32. The model answers with its opposite."""
        towards_clean: torch.Tensor = transformer(
            hidden_states=inputs.latents_BCFHW.to(text.embeds_BLD.dtype),
            timestep=inputs.timesteps,
            encoder_hidden_states=text.embeds_BLD,
            encoder_attention_mask=every_row(text.embeds_BLD) if text.mask_BL is None else text.mask_BL,
            return_dict=False,
        )[0]
        return -towards_clean.float()

    def cost(self, config: Mapping[str, Any], latent_shape: tuple[int, int, int, int], text_tokens: int) -> float:
        """See Family. Two for each multiply-add of every matrix product; `latent_shape` is (C, F, H, W)."""
        _, frames, height, width = latent_shape
        patch, context, text_dim = config["patch_size"], config["pooled_projection_dim"], config["text_embed_dim"]
        dim = config["num_attention_heads"] * config["attention_head_dim"]
        tokens, everything = frames * (height // patch) * (width // patch), 0
        for block in range(config["num_layers"]):
            last = block == config["num_layers"] - 1
            modulation = 4 * dim * dim + (1 if last else 4) * dim * context
            attention = 4 * tokens * dim * dim + (3 if last else 4) * text_tokens * dim * context
            attention += 2 * (tokens + text_tokens) ** 2 * dim
            feed_forward = 3 * tokens * dim * (8 * dim // 3) + (0 if last else 3 * text_tokens * context * (8 * context // 3))
            everything += modulation + attention + feed_forward
        everything += tokens * dim * patch**2 * (config["in_channels"] + (config["out_channels"] or config["in_channels"]))
        everything += dim * (config["time_embed_dim"] + dim) + 2 * dim * dim
        pooler = text_dim * (2 * (text_tokens + 1) * text_dim + text_dim + dim + 2 * (text_tokens + 1))
        return float(2 * (everything + pooler + text_tokens * text_dim * context))


FAMILY: Family = Mochi()


def _shapes(checkpoint: Checkpoint, table: KeyTable, is_diffusers: bool) -> dict[str, tuple[int, ...]]:
    """Shapes under diffusers' names, without those that are parts of a fused tensor. Raises KeyTableError for unknown names."""
    stored = checkpoint.tensors
    if is_diffusers:
        return {name: stored[name].shape for name in stored if table.to_native(name)}
    return {name: stored[place.name].shape for name, place in table.map_file(stored).items() if place.whole}


def _config_from_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Every argument of MochiTransformer3DModel."""
    _, in_channels, patch_size, _ = shapes["patch_embed.proj.weight"]
    _, heads, half_head = shapes["pos_frequencies"]
    pooled_projection_dim, text_embed_dim = shapes["time_embed.caption_proj.weight"]
    return {
        **_CONSTANTS,
        "patch_size": patch_size,
        "num_attention_heads": heads,
        "attention_head_dim": 2 * half_head,
        "num_layers": len({name.split(".")[1] for name in shapes if name.startswith("transformer_blocks.")}),
        "pooled_projection_dim": pooled_projection_dim,
        "in_channels": in_channels,
        "out_channels": shapes["proj_out.weight"][0] // patch_size**2,
        "text_embed_dim": text_embed_dim,
        "time_embed_dim": shapes["time_embed.timestep_embedder.linear_1.weight"][1],
    }


def _vae_config(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """What shapes tell of the arguments of AutoencoderKLMochi; the rest is as published."""
    blocks = ["decoder.block_out.resnets.0", *(f"decoder.up_blocks.{stage}.resnets.0" for stage in (2, 1, 0))]
    stages = [f"encoder.down_blocks.{stage}.conv_in.conv" for stage in range(3)]
    places = {
        "decoder_block_out_channels": [f"{block}.norm1.norm_layer.weight" for block in blocks],
        "encoder_block_out_channels": [f"{layer}.weight" for layer in ("encoder.proj_in", *stages)],
    }
    return {name: tuple(shapes[key][0] for key in keys) for name, keys in places.items() if shapes.keys() >= set(keys)}


def _reason(config: Mapping[str, Any]) -> str:
    width = config["num_attention_heads"] * config["attention_head_dim"]
    return f"a T5 pooler, {config['in_channels']} channels in, {config['num_layers']} blocks of width {width}"


def _rope_tables(frequencies_DHR: torch.Tensor, positions_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines (N, heads, R) of positions by the model's own frequencies, in float32."""
    angles_NHR = torch.einsum("nd,dhr->nhr", positions_ND.float(), frequencies_DHR.float())
    return angles_NHR.cos(), angles_NHR.sin()


def _encoder_only(checkpoint: Checkpoint) -> CheckpointError:
    value, rule = f"{checkpoint.path.name} holds the encoder of the Mochi VAE only", "previews are decoded with the same VAE"
    return CheckpointError(Problem(value, rule, "Give the whole VAE (mochi_vae.safetensors, or the folder of a diffusers model)."))


def _statistics(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The latents' mean and std, (1, C, 1, 1, 1)."""
    mean, std = (torch.tensor(values, device=device).view(1, -1, 1, 1, 1) for values in (LATENT.mean, LATENT.std))
    return mean, std
