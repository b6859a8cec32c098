"""HunyuanVideo 13B (https://arxiv.org/abs/2412.03603), trained as diffusers' HunyuanVideoTransformer3DModel.

Time is fed as 1000 * sigma, guidance as 1000 * scale, the target is noise - clean. Image to video comes in two kinds, both
with the first frame encoded alone (latent 0 of a clip is another tensor here): v1 gets it as more channels, with a mask;
v2 gets it as frame 0, at time 0. Files name tensors in three ways: ComfyUI's, the original's, diffusers'.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING, Any

import torch

from ..errors import CheckpointError, KeyTableError, Problem
from ..family import (
    FIRST_FRAME,
    IMAGE_TEXT,
    ComfyNames,
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
from ..offload.chunks import ChunkedForward
from ..text_masks import every_row, padded, rows_that_count, says_nothing
from ._hunyuan_block import CHUNKED
from ._hunyuan_keys import KEYS, LORA_KEYS, VAE_KEYS
from ._hunyuan_trial import TRIAL

if TYPE_CHECKING:
    from ..checkpoint import Checkpoint

TIME_SCALE = 1000.0
GUIDANCE = 6.0

# The VAE's latents times this have unit variance (`scaling_factor` in diffusers, `scale_factor` in ComfyUI).
_SCALE = 0.476986
LATENT = LatentSpec(16, temporal_stride=4, spatial_stride=8, spatial_step=16, fps=24.0, mean=(0.0,) * 16, std=(1 / _SCALE,) * 16)

_T2V = Variant("hunyuan-t2v", "HunyuanVideo T2V")
_I2V_V1 = Variant("hunyuan-i2v-v1", "HunyuanVideo I2V v1 (concat)")
_I2V_V2 = Variant("hunyuan-i2v-v2", "HunyuanVideo I2V v2 (replace)")
_IMAGE_CONDITION = {_T2V.id: None, _I2V_V1.id: "latent_concat", _I2V_V2.id: "token_replace"}

# Published models with the same text refiner, by the beginning of keys that only they have.
_OTHERS = {
    "cond_type_embedding.": "HunyuanVideo 1.5",
    "vision_in.": "HunyuanVideo 1.5",
    "image_embedder.": "HunyuanVideo 1.5",
    "byt5_in.": "HunyuanImage",
    "context_embedder_2.": "HunyuanImage",
    "clean_x_embedder.": "FramePack",
}
_NAMED_I2V = re.compile(r"i2v|image[-_ ]?to[-_ ]?video|token[-_ ]?replace", re.IGNORECASE)
_NAMED_T2V = re.compile(r"t2v|text[-_ ]?to[-_ ]?video", re.IGNORECASE)
_ONLY_A_NAME = "The tensors are also those of HunyuanVideo I2V v2; only a name can tell, and this one does not."

# What a HunyuanVideo transformer has and other models have not, and what its config is read from (diffusers' names).
_SIGNATURE = "context_embedder.token_refiner.refiner_blocks.0.norm1.weight"
_TELLING = {_SIGNATURE, "x_embedder.proj.weight", "proj_out.weight", "context_embedder.proj_in.weight"}
_TELLING |= {"time_text_embed.text_embedder.linear_1.weight", "single_transformer_blocks.0.attn.norm_q.weight"}

# Arguments of the diffusers classes that no shape tells: the values of every published model, or those of a config.json.
_CONSTANTS: Mapping[str, Any] = {"mlp_ratio": 4.0, "qk_norm": "rms_norm", "rope_theta": 256.0, "rope_axes_dim": (16, 56, 56)}
_VAE_FIELDS = ("norm_num_groups", "mid_block_add_attention", "temporal_compression_ratio", "spatial_compression_ratio")

# What the text encoder is asked, from the model's repository (https://github.com/Tencent-Hunyuan/HunyuanVideo and -I2V).
_ASPECTS = (
    "1. The main content and theme of the video."
    "2. The color, shape, size, texture, quantity, text, and spatial relationships of the objects."
    "3. Actions, events, behaviors temporal relationships, physical movement changes of the objects."
    "4. background environment, light, style and atmosphere."
    "5. camera angles, movements, and transitions used in the video:<|eot_id|>"
)
_SYSTEM, _USER = (f"<|start_header_id|>{role}<|end_header_id|>\n\n" for role in ("system", "user"))
_TEMPLATE = f"{_SYSTEM}Describe the video by detailing the following aspects: {_ASPECTS}{_USER}{{}}<|eot_id|>"
_IMAGE_TEMPLATE = (
    f"{_SYSTEM}<image>\nDescribe the video by detailing the following aspects according to the reference image: {_ASPECTS}\n\n"
    f"{_USER}{{}}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
)
_IMAGE_TOKENS = 576
_HIDDEN_STATE = -3

_VAE = Vae("hunyuan", "HunyuanVideo VAE", VAE_KEYS, tile_pixels=256)


class Hunyuan:
    """The Family protocol for HunyuanVideo."""

    id = "hunyuan"
    title = "HunyuanVideo"
    variants: tuple[Variant, ...] = (_T2V, _I2V_V1, _I2V_V2)
    keys = KEYS
    vaes: tuple[Vae, ...] = (_VAE,)
    lora_keys = LORA_KEYS
    targets = LoraTargets(
        attention=(
            r"^transformer_blocks\.\d+\.attn\.(to_[qkv]|add_[qkv]_proj|to_out\.0|to_add_out)$",
            r"^single_transformer_blocks\.\d+\.attn\.to_[qkv]$",
        ),
        # A single block has one output for both: it is proj_out, of the attention's and the feed-forward's rows side by side.
        feed_forward=(
            r"^transformer_blocks\.\d+\.ff(_context)?\.net\.(0\.proj|2)$",
            r"^single_transformer_blocks\.\d+\.proj_(mlp|out)$",
        ),
    )
    blocks: tuple[str, ...] = ("transformer_blocks", "single_transformer_blocks")
    precisions: tuple[PrecisionName, ...] = ("bf16", "fp32")
    chunked: tuple[ChunkedForward, ...] = CHUNKED
    control: ControlLoras | None = None
    trial = TRIAL

    def latent(self, variant: Variant) -> LatentSpec:
        return LATENT

    def sampling(self, variant: Variant) -> Sampling:
        return Sampling(steps=20, shift=7.0, cfg=1.0, guidance=None if variant == _I2V_V1 else GUIDANCE, schedule=simple_schedule)

    def comfyui(self, variant: Variant) -> ComfyNames:
        interleave = {_I2V_V1.id: 2, _I2V_V2.id: 4}.get(variant.id)
        names = ("AutoencoderKL", "TAEHV")
        return ComfyNames("HUNYUAN_VIDEO", "HunyuanVideo", "HunyuanVideoTokenizer", names, text_encoders=2, image_interleave=interleave)

    def first_frame(self, variant: Variant) -> FirstFrameRule | None:
        return None if variant == _T2V else FirstFrameRule(probability=1.0, always=True)

    def detect(self, checkpoint: Checkpoint) -> Detection | None:
        """See Family. Raises CheckpointError for a relative that is not trained here, or with unknown keys."""
        shapes = _diffusers_shapes(checkpoint)
        if _SIGNATURE not in shapes:
            return None
        others = [title for start, title in _OTHERS.items() if any(name.startswith(start) for name in shapes)]
        if others:
            raise _not_trained(checkpoint, others[0])
        if not shapes.keys() >= _TELLING:
            return None
        config = _config_from_shapes(shapes)
        config |= checkpoint.config_fields("HunyuanVideoTransformer3DModel", tuple(_CONSTANTS))
        config["rope_axes_dim"] = tuple(config["rope_axes_dim"])
        channels = config["in_channels"], config["out_channels"]
        if channels not in ((16, 16), (33, 16)):
            what = "SkyReels I2V" if channels == (32, 16) else f"a HunyuanVideo with {channels[0]} channels in and {channels[1]} out"
            raise _not_trained(checkpoint, what)
        if channels[0] == 16 and not config["guidance_embeds"]:
            raise _not_trained(checkpoint, "a HunyuanVideo without a guidance embedder")
        _check_names(checkpoint)
        variants, notes = ((_I2V_V1,), ()) if config["in_channels"] == 33 else _by_name(checkpoint)
        config["image_condition_type"] = _IMAGE_CONDITION[variants[0].id]
        changes = {variant.id: {"image_condition_type": _IMAGE_CONDITION[variant.id]} for variant in variants}
        return Detection(FAMILY, variants, config, notes, _reason(config), config_of=changes)

    def build(self, config: Mapping[str, Any]) -> torch.nn.Module:
        """See Family."""
        from diffusers import HunyuanVideoTransformer3DModel

        with torch.device("meta"):
            transformer = HunyuanVideoTransformer3DModel(**config)
        if config["image_condition_type"] == "token_replace":
            transformer.time_text_embed.register_forward_hook(_guide_the_first_frame)
        _drop_masks_that_say_nothing(transformer)
        assert isinstance(transformer, torch.nn.Module)
        return transformer

    def detect_vae(self, checkpoint: Checkpoint) -> VaeDetection | None:
        """See Family."""
        tensors = checkpoint.tensors
        native = "decoder.mid.block_1.norm1.weight" in tensors
        levels = [f"decoder.up.{level}.block.0" for level in range(4)]
        if not native:
            levels = [f"decoder.up_blocks.{3 - level}.resnets.0" for level in range(4)]
        first_convolutions = [f"{level}.conv1.conv.weight" for level in levels]
        if not tensors.keys() >= {"decoder.conv_in.conv.weight", "post_quant_conv.weight", *first_convolutions}:
            return None
        if tensors["decoder.conv_in.conv.weight"].shape[1] != LATENT.channels:
            return None
        config = {"block_out_channels": tuple(tensors[name].shape[0] for name in first_convolutions)}
        config |= checkpoint.config_fields("AutoencoderKLHunyuanVideo", _VAE_FIELDS)
        encoder = "encoder.conv_in.conv.weight" in tensors
        return VaeDetection(FAMILY, _VAE, config, encoder)

    def build_vae(self, detection: VaeDetection) -> torch.nn.Module:
        from diffusers import AutoencoderKLHunyuanVideo

        with torch.device("meta"):
            vae = AutoencoderKLHunyuanVideo(**detection.config)
        assert isinstance(vae, torch.nn.Module)
        return vae

    @torch.no_grad()
    def encode_video(self, vae: torch.nn.Module, pixels_BCFHW: torch.Tensor) -> torch.Tensor:
        """See Family. Float32 (B, 16, (F - 1) / 4 + 1, H / 8, W / 8); the posterior's mean, as ComfyUI encodes.

        One frame is encoded as ComfyUI does. More are not: both cut a clip in time, at different frames.
        """
        weight = next(vae.parameters())
        vae.use_tiling = False  # type: ignore[assignment]
        moments: Any = vae.encode(pixels_BCFHW.to(weight.device, weight.dtype)).latent_dist  # type: ignore[operator]
        latents: torch.Tensor = moments.mode().float() * _SCALE
        return latents

    @torch.no_grad()
    def decode_video(self, vae: torch.nn.Module, latents_BCFHW: torch.Tensor) -> torch.Tensor:
        """See Family. Float32 (B, 3, 4 (F - 1) + 1, 8 H, 8 W); in tiles of 256 pixels, as the published graphs decode."""
        weight = next(vae.parameters())
        vae.use_tiling = True  # type: ignore[assignment]
        latents = latents_BCFHW.to(weight.device, torch.float32) / _SCALE
        pixels: torch.Tensor = vae.decode(latents.to(weight.dtype), return_dict=False)[0]  # type: ignore[operator]
        return pixels.float().clamp(-1.0, 1.0)

    @torch.no_grad()
    def encode_text(
        self, variant: Variant, folder: TextFolder, prompts: Sequence[str], image_HWC: torch.Tensor | None = None
    ) -> list[TextRecord]:
        """See Family. Llama's third hidden state from the end (L, 4096) and CLIP-L's pooled output (768), on the CPU.

        With an image in 0..1: rows of its tokens, each `image_interleave`-th, before those of the caption. As in ComfyUI the
        rows begin after the template's head and end with the caption's <|eot_id|>, and no caption is cut (diffusers cuts at
        256 tokens; with an image it drops <|eot_id|> and keeps a line break instead).
        """
        interleave = self.comfyui(variant).image_interleave
        tokenizer, llama = folder.tokenizer(), folder.text_encoder()
        pixels = None
        if interleave:
            assert image_HWC is not None, "captions of an image-to-video model are encoded together with the first frame"
            pixels = folder.image_processor()(images=image_HWC.numpy(), do_rescale=False, return_tensors="pt").pixel_values
        rows = [_llama_rows(tokenizer, llama, prompt, pixels, interleave or 1) for prompt in prompts]
        tokenizer, clip = folder.tokenizer(2), folder.text_encoder(2)
        device, records = next(clip.parameters()).device, []
        for prompt, rows_LD in zip(prompts, rows, strict=True):
            tokens = tokenizer(prompt, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
            records.append(TextRecord(rows_LD, clip(tokens.input_ids.to(device)).pooler_output[0].cpu()))
        return records

    def encode_image(self, folder: TextFolder, image_HWC: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError("images go into the captions here")

    def text_width(self, config: Mapping[str, Any]) -> int:
        return int(config["text_embed_dim"])

    def collate_text(self, records: Sequence[TextRecord], device: torch.device, dtype: torch.dtype) -> TextBatch:
        """Rows padded with zeros to the longest record, with a mask (B, L, bool) that says which are text (None: all)."""
        lengths = [len(record.embeds_LD) for record in records]
        pooled = [record.pooled_D for record in records if record.pooled_D is not None]
        assert len(pooled) == len(records), "a HunyuanVideo caption has CLIP's pooled output too"
        embeds_BLD = padded(records, lengths, device, dtype)
        return TextBatch(embeds_BLD, rows_that_count(lengths, device), torch.stack(pooled).to(device, dtype))

    def required(self, variant: Variant) -> frozenset[str]:
        return frozenset({"latents"} if variant == _T2V else {"latents", FIRST_FRAME, IMAGE_TEXT})

    def prepare(self, variant: Variant, noisy_BCFHW: torch.Tensor, sigma_B: torch.Tensor, conditions: Conditions) -> ModelInput:
        """See Family. An I2V model always keeps the first frame: v1 beside the latents, v2 as their frame 0."""
        times_B = TIME_SCALE * sigma_B.float()
        guidance = GUIDANCE if conditions.guidance is None else conditions.guidance
        extra = {"guidance": torch.full_like(times_B, TIME_SCALE * guidance)}
        if variant == _T2V:
            return ModelInput(noisy_BCFHW, times_B, extra=extra)
        first_BC1HW = conditions.tensors[FIRST_FRAME].to(noisy_BCFHW)
        given_B1FHW = torch.zeros_like(noisy_BCFHW[:, :1])
        given_B1FHW[:, :, 0] = 1.0
        if variant == _I2V_V2:
            latents = torch.cat([first_BC1HW, noisy_BCFHW[:, :, 1:]], dim=2)
            return ModelInput(latents, times_B, loss_mask=1.0 - given_B1FHW, extra=extra)
        image_BCFHW = torch.cat([first_BC1HW, torch.zeros_like(noisy_BCFHW[:, :, 1:])], dim=2)
        return ModelInput(torch.cat([noisy_BCFHW, image_BCFHW, given_B1FHW], dim=1), times_B, extra=extra)

    def predict(self, transformer: torch.nn.Module, inputs: ModelInput, text: TextBatch) -> torch.Tensor:
        """See Family. Computes in the text's dtype; the velocity is float32, so that the loss is."""
        velocity: torch.Tensor = transformer(
            hidden_states=inputs.latents_BCFHW.to(text.embeds_BLD.dtype),
            timestep=inputs.timesteps,
            encoder_hidden_states=text.embeds_BLD,
            encoder_attention_mask=every_row(text.embeds_BLD) if text.mask_BL is None else text.mask_BL,
            pooled_projections=text.pooled_BD,
            guidance=inputs.extra["guidance"],
            return_dict=False,
        )[0]
        return velocity.float()

    def cost(self, config: Mapping[str, Any], latent_shape: tuple[int, int, int, int], text_tokens: int) -> float:
        """See Family. Two for each multiply-add of every matrix product; `latent_shape` is (C, F, H, W)."""
        _, frames, height, width = latent_shape
        patch = config["patch_size_t"], config["patch_size"], config["patch_size"]
        tokens = (frames // patch[0]) * (height // patch[1]) * (width // patch[2])
        dim, ratio = config["num_attention_heads"] * config["attention_head_dim"], config["mlp_ratio"]
        joint = tokens + text_tokens
        attention = 2 * joint * joint * dim
        linears = joint * dim * dim * (4 + 2 * ratio)  # the same sum in both kinds of block
        double = config["num_layers"] * (linears + attention + 12 * dim * dim)
        single = config["num_single_layers"] * (linears + attention + 3 * dim * dim)
        refiner_block = text_tokens * dim * dim * (4 + 2 * 4) + 2 * text_tokens * text_tokens * dim + 2 * dim * dim
        times = 3 if config["guidance_embeds"] else 2
        embedders = text_tokens * dim * config["text_embed_dim"] + times * (256 + dim) * dim + 2 * dim * dim
        embedders += (config["pooled_projection_dim"] + dim + config["text_embed_dim"] + dim) * dim
        patches = tokens * dim * prod(patch) * (config["in_channels"] + config["out_channels"])
        return float(2 * (double + single + config["num_refiner_layers"] * refiner_block + embedders + patches))


FAMILY: Family = Hunyuan()


def _llama_rows(tokenizer: Any, llama: Any, prompt: str, pixels: torch.Tensor | None, interleave: int) -> torch.Tensor:
    """The rows of a caption, after those of the image (each `interleave`-th) if there is one."""
    llama = getattr(llama, "model", llama)  # without the head that makes words of rows
    device = next(llama.parameters()).device
    ids = tokenizer((_TEMPLATE if pixels is None else _IMAGE_TEMPLATE).format(prompt)).input_ids
    marks = {name: tokenizer.convert_tokens_to_ids(name) for name in ("<|end_header_id|>", "<|eot_id|>", "<image>")}
    image, given = 0, {}
    if pixels is not None:
        image = ids.index(marks["<image>"])
        ids = ids[:image] + [marks["<image>"]] * _IMAGE_TOKENS + ids[image + 1 :]
        given["pixel_values"] = pixels.to(device, llama.dtype)
    headers = [index for index, token in enumerate(ids) if token == marks["<|end_header_id|>"]]
    start = headers[1] + 2  # after the user's header and its line break
    stop = ids.index(marks["<|eot_id|>"], start) + 1
    input_ids = torch.tensor([ids], device=device)
    output = llama(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), output_hidden_states=True, **given)
    hidden_LD = output.hidden_states[_HIDDEN_STATE][0]
    image_LD = hidden_LD[image : image + _IMAGE_TOKENS : interleave] if given else hidden_LD[:0]
    rows_LD: torch.Tensor = torch.cat([image_LD, hidden_LD[start:stop]]).cpu()
    return rows_LD


def _drop_masks_that_say_nothing(transformer: Any) -> None:
    """Lets the blocks attend without a mask where every text row counts: diffusers makes one of any mask it is given.

    A block computes the same again in the backward pass, by the captions of the latest forward pass.
    """
    nothing = {"said": False}

    def look(_: torch.nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        mask_BL = named["encoder_attention_mask"] if "encoder_attention_mask" in named else given[3]
        nothing["said"] = says_nothing(mask_BL)

    def drop(_: torch.nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        return (*given[:3], None, *given[4:]) if nothing["said"] else given

    transformer.register_forward_pre_hook(look, with_kwargs=True)
    for block in (*transformer.transformer_blocks, *transformer.single_transformer_blocks):
        block.register_forward_pre_hook(drop)


def _guide_the_first_frame(embedding: torch.nn.Module, given: tuple[torch.Tensor, ...], output: tuple[torch.Tensor, ...]) -> Any:
    """What modulates the tokens of v2's first frame: all that modulates the others, at time 0.

    diffusers leaves the guidance out there, as the original does; ComfyUI, which the LoRA is for, adds it.
    """
    times_B, *others = given
    return output[0], embedding.forward(torch.zeros_like(times_B), *others)[0]


def _diffusers_shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """Every shape under its diffusers names (of a fused tensor: the whole's); unknown names stay as they are."""
    shapes = {}
    for name, stored in checkpoint.tensors.items():
        try:
            shapes.update({place.name: stored.shape for place in KEYS.to_diffusers(name)})
        except KeyTableError:
            shapes[name] = stored.shape
    return shapes


def _check_names(checkpoint: Checkpoint) -> None:
    """Raises KeyTableError unless all names are known."""
    if _SIGNATURE not in checkpoint.tensors:
        KEYS.map_file(checkpoint.tensors)
    for name in checkpoint.tensors if _SIGNATURE in checkpoint.tensors else ():
        KEYS.to_native(name)


def _config_from_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Every argument of HunyuanVideoTransformer3DModel, but the kind of image condition."""
    dim, in_channels, *patch = shapes["x_embedder.proj.weight"]
    head_dim = shapes["single_transformer_blocks.0.attn.norm_q.weight"][0]
    return {
        **_CONSTANTS,
        "in_channels": in_channels,
        "out_channels": shapes["proj_out.weight"][0] // prod(patch),
        "num_attention_heads": dim // head_dim,
        "attention_head_dim": head_dim,
        "num_layers": _count(shapes, "transformer_blocks"),
        "num_single_layers": _count(shapes, "single_transformer_blocks"),
        "num_refiner_layers": _count(shapes, "context_embedder.token_refiner.refiner_blocks"),
        "patch_size": patch[-1],
        "patch_size_t": patch[0],
        "guidance_embeds": "time_text_embed.guidance_embedder.linear_1.weight" in shapes,
        "text_embed_dim": shapes["context_embedder.proj_in.weight"][1],
        "pooled_projection_dim": shapes["time_text_embed.text_embedder.linear_1.weight"][1],
        "image_condition_type": None,
    }


def _count(shapes: Mapping[str, Any], blocks: str) -> int:
    """How many blocks a list has."""
    return len({name.removeprefix(f"{blocks}.").split(".")[0] for name in shapes if name.startswith(f"{blocks}.")})


def _by_name(checkpoint: Checkpoint) -> tuple[tuple[Variant, ...], tuple[str, ...]]:
    """(candidates, notes) for 16 channels: by config.json, else by the name of the file, else of the folders it is in."""
    kinds = checkpoint.config_fields("HunyuanVideoTransformer3DModel", ("image_condition_type",))
    if kinds:
        return ((_I2V_V2,) if kinds["image_condition_type"] == "token_replace" else (_T2V,)), ()
    path = checkpoint.path.absolute()
    for name in (path.name, path.parent.name, path.parent.parent.name):
        if _NAMED_I2V.search(name):
            return (_I2V_V2, _T2V), ()
        if _NAMED_T2V.search(name):
            return (_T2V, _I2V_V2), ()
    return (_T2V, _I2V_V2), (_ONLY_A_NAME,)


def _reason(config: Mapping[str, Any]) -> str:
    width, guidance = config["num_attention_heads"] * config["attention_head_dim"], "" if config["guidance_embeds"] else "no "
    blocks = f"{config['num_layers']} double and {config['num_single_layers']} single blocks of width {width}"
    return f"{config['in_channels']} channels in, {config['out_channels']} out, {blocks}, {guidance}guidance embedder"


def _not_trained(checkpoint: Checkpoint, what: str) -> CheckpointError:
    rule = "only HunyuanVideo T2V, I2V v1 and I2V v2 are trained"
    return CheckpointError(Problem(f"{checkpoint.path.name} is {what}", rule, "Give a transformer of one of these."))
