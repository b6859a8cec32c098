"""Wan 2.1 and 2.2 (https://arxiv.org/abs/2503.20314), trained as diffusers' WanTransformer3DModel.

Time is fed as 1000 * sigma, the target is noise - clean: only names and normalisation differ from the common language.
Text is always 512 rows, zeros after the caption; the transformer sees no mask. A first frame enters in one of two ways:

    I2V (2.1 and 2.2 A14B)  beside the noise: 4 channels that are 1 in the first latent frame, and the latents of a clip of
                            the first frame and then grey; 2.1 also sees the image encoder's rows
    2.2 TI2V 5B             in the first frame's place, without noise and at time 0

Other Wan models (Fun, FLF2V, VACE, ...) have the same keys and more channels or branches: they are refused by name.
"""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING, Any

import torch

from ..family import (
    FIRST_FRAME,
    FIRST_FRAME_CLIP,
    IMAGE_EMBEDS,
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
)
from ..offload.chunks import ChunkedForward
from ._wan_block import CHUNKED
from ._wan_keys import KEYS, VAE_KEYS_2_1, VAE_KEYS_2_2
from ._wan_trial import TRIAL
from ._wan_variants import KIND_OF, KINDS, LATENT, LATENT_2_2, SAMPLING_OF, detect

if TYPE_CHECKING:
    from ..checkpoint import Checkpoint

TEXT_LENGTH = 512
TIME_SCALE = 1000.0
MASK_CHANNELS = 4

_VAE_FIELDS = ("base_dim", "z_dim", "dim_mult", "num_res_blocks", "attn_scales", "temperal_downsample", "dropout")

_UMT5 = ComfyT5("wan", "te", "umt5xxl", tokenizer_in_file=True)
_VAE_2_1 = Vae("wan2.1", "Wan 2.1 VAE", VAE_KEYS_2_1, tuple(kind.variant.id for kind in KINDS if not kind.first_frame_in_place))
_VAE_2_2 = Vae("wan2.2", "Wan 2.2 VAE (of TI2V 5B)", VAE_KEYS_2_2, tuple(kind.variant.id for kind in KINDS if kind.first_frame_in_place))
_RESIDUAL_VAE = {"is_residual": True, "in_channels": 12, "out_channels": 12, "patch_size": 2, "scale_factor_spatial": 16}
_IMAGE_ROWS = 257
"""Rows that the published image encoder gives for an image of any size."""


class Wan:
    """The Family protocol for Wan."""

    id = "wan"
    title = "Wan"
    variants: tuple[Variant, ...] = tuple(kind.variant for kind in KINDS if kind.sampling)
    keys = KEYS
    vaes: tuple[Vae, ...] = (_VAE_2_1, _VAE_2_2)
    lora_keys = KEYS
    targets = LoraTargets(
        attention=(r"^blocks\.\d+\.attn[12]\.to_[qkv]$", r"^blocks\.\d+\.attn[12]\.to_out\.0$"),
        feed_forward=(r"^blocks\.\d+\.ffn\.net\.0\.proj$", r"^blocks\.\d+\.ffn\.net\.2$"),
    )
    blocks: tuple[str, ...] = ("blocks",)
    precisions: tuple[PrecisionName, ...] = ("bf16", "fp16", "fp32")
    chunked: tuple[ChunkedForward, ...] = CHUNKED
    control: ControlLoras | None = ControlLoras(
        "channels", r"(lora_unet_)?(blocks[._]\d+[._](self_attn|cross_attn|ffn)[._]|patch_embedding\.)", comfyui_model="WAN21"
    )
    trial = TRIAL

    def latent(self, variant: Variant) -> LatentSpec:
        return LATENT_2_2 if KIND_OF[variant.id].first_frame_in_place else LATENT

    def sampling(self, variant: Variant) -> Sampling:
        return SAMPLING_OF[variant.id]

    def comfyui(self, variant: Variant) -> ComfyNames:
        latent_format = "Wan22" if KIND_OF[variant.id].first_frame_in_place else "Wan21"
        return ComfyNames("WAN", latent_format, "WanT5Tokenizer", ("WanVAE", "TAEHV"), t5=_UMT5)

    def first_frame(self, variant: Variant) -> FirstFrameRule | None:
        kind = KIND_OF[variant.id]
        if kind.first_frame_beside_noise:
            return FirstFrameRule(1.0, always=True)
        return FirstFrameRule(0.5) if kind.first_frame_in_place else None

    def detect(self, checkpoint: Checkpoint) -> Detection | None:
        return detect(checkpoint, FAMILY)

    def build(self, config: Mapping[str, Any]) -> torch.nn.Module:
        """See Family. The rope tables are computed, not stored in any file, and so are real tensors on the CPU."""
        from diffusers import WanTransformer3DModel

        with torch.device("meta"):
            transformer = WanTransformer3DModel(**config)
        with torch.device("cpu"):
            transformer.rope = type(transformer.rope)(config["attention_head_dim"], config["patch_size"], config["rope_max_seq_len"])
        assert isinstance(transformer, torch.nn.Module)
        return transformer

    def detect_vae(self, checkpoint: Checkpoint) -> VaeDetection | None:
        """See Family."""
        tensors = checkpoint.tensors
        native = "decoder.middle.0.residual.0.gamma" in tensors
        if not native and "decoder.mid_block.resnets.0.norm1.gamma" not in tensors:
            return None
        first, last = ("encoder.conv1.weight", "conv2.weight") if native else ("encoder.conv_in.weight", "post_quant_conv.weight")
        config = {"base_dim": tensors[first].shape[0], "z_dim": tensors[last].shape[0]}
        told = checkpoint.config_fields("AutoencoderKLWan", _VAE_FIELDS)
        if not tensors.keys() & {"decoder.upsamples.0.upsamples.0.residual.2.weight", "decoder.up_blocks.0.upsampler.resample.1.weight"}:
            return VaeDetection(FAMILY, _VAE_2_1, config | told)
        width = tensors["decoder.head.0.gamma" if native else "decoder.norm_out.gamma"].shape[0]
        return VaeDetection(FAMILY, _VAE_2_2, _RESIDUAL_VAE | config | {"decoder_base_dim": width} | told)

    def build_vae(self, detection: VaeDetection) -> torch.nn.Module:
        from diffusers import AutoencoderKLWan

        with torch.device("meta"):
            vae = AutoencoderKLWan(**detection.config)
        assert isinstance(vae, torch.nn.Module)
        return vae

    @torch.no_grad()
    def encode_video(self, vae: torch.nn.Module, pixels_BCFHW: torch.Tensor) -> torch.Tensor:
        """See Family. Float32 (B, C, (F - 1) / 4 + 1, H / stride, W / stride); the posterior's mean, as ComfyUI encodes."""
        weight = next(vae.parameters())
        moments: Any = vae.encode(pixels_BCFHW.to(weight.device, weight.dtype)).latent_dist  # type: ignore[operator]
        mean, std = _statistics(vae, weight.device)
        latents: torch.Tensor = (moments.mode().float() - mean) / std
        return latents

    @torch.no_grad()
    def decode_video(self, vae: torch.nn.Module, latents_BCFHW: torch.Tensor) -> torch.Tensor:
        """See Family. Float32 (B, 3, 4 (F - 1) + 1, stride * H, stride * W)."""
        weight = next(vae.parameters())
        mean, std = _statistics(vae, weight.device)
        latents = latents_BCFHW.to(weight.device, torch.float32) * std + mean
        pixels: torch.Tensor = vae.decode(latents.to(weight.dtype), return_dict=False)[0]  # type: ignore[operator]
        return pixels.float().clamp(-1.0, 1.0)

    @torch.no_grad()
    def encode_text(
        self, variant: Variant, folder: TextFolder, prompts: Sequence[str], image_HWC: torch.Tensor | None = None
    ) -> list[TextRecord]:
        """See Family. UMT5 rows (L, D) with L <= 512, in the encoder's dtype, on the CPU.

        Prompts are cleaned as diffusers does (HTML entities, white space; not ftfy, which may be missing) and cut at 512
        tokens. ComfyUI does neither, and reads parentheses as weights: write captions without them. Each prompt is
        encoded by itself and without padding, so that its record does not depend on its neighbours; with a mask over the
        padding the encoder would compute the same.
        """
        tokenizer, text_encoder = folder.tokenizer(), folder.text_encoder()
        device = next(text_encoder.parameters()).device
        records = []
        for prompt in prompts:
            tokens = tokenizer(_clean(prompt), max_length=TEXT_LENGTH, truncation=True, add_special_tokens=True, return_tensors="pt")
            hidden = text_encoder(tokens.input_ids.to(device), tokens.attention_mask.to(device)).last_hidden_state
            records.append(TextRecord(hidden[0].cpu()))
        return records

    @torch.no_grad()
    def encode_image(self, folder: TextFolder, image_HWC: torch.Tensor) -> torch.Tensor:
        """See Family. CLIP's rows before its last layer (257, 1280 for the published ViT-H), on the CPU.

        The whole image is squashed to the encoder's square, as ComfyUI's CLIP Vision Encode does with crop "none";
        diffusers' pipeline cuts the sides off instead.
        """
        processor, encoder = folder.image_processor(), folder.image_encoder()
        weight, side = next(encoder.parameters()), encoder.config.image_size
        image_BCHW = image_HWC.permute(2, 0, 1)[None, :3].float()
        squashed = torch.nn.functional.interpolate(image_BCHW, size=(side, side), mode="bicubic", antialias=True)
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (processor.image_mean, processor.image_std))
        pixels = ((squashed.clamp(0, 1) * 255).round() / 255 - mean) / std
        rows_BLD: torch.Tensor = encoder(pixels.to(weight.device, weight.dtype), output_hidden_states=True).hidden_states[-2]
        return rows_BLD[0].cpu()

    def text_width(self, config: Mapping[str, Any]) -> int:
        return int(config["text_dim"])

    def collate_text(self, records: Sequence[TextRecord], device: torch.device, dtype: torch.dtype) -> TextBatch:
        """Exactly 512 rows for each record: zeros after a shorter one, a longer one cut. No mask."""
        width = records[0].embeds_LD.shape[1]
        embeds_BLD = torch.zeros(len(records), TEXT_LENGTH, width, device=device, dtype=dtype)
        for row, record in zip(embeds_BLD, records, strict=True):
            kept = record.embeds_LD[:TEXT_LENGTH]
            row[: kept.shape[0]] = kept.to(device, dtype)
        return TextBatch(embeds_BLD)

    def required(self, variant: Variant) -> frozenset[str]:
        kind, needed = KIND_OF[variant.id], {"latents"}
        if kind.first_frame_beside_noise:
            needed |= {FIRST_FRAME_CLIP} | ({IMAGE_EMBEDS} if kind.image_embedder else set())
        return frozenset(needed)

    def prepare(self, variant: Variant, noisy_BCFHW: torch.Tensor, sigma_B: torch.Tensor, conditions: Conditions) -> ModelInput:
        """See Family. Times are float32: one for each sample, or for each token where a first frame is kept in its place.

        I2V always has its first frame: `conditions.first_frame_B` is not asked.
        """
        kind, times_B = KIND_OF[variant.id], TIME_SCALE * sigma_B.float()
        if kind.first_frame_beside_noise:
            extra = {IMAGE_EMBEDS: conditions.tensors[IMAGE_EMBEDS]} if kind.image_embedder else {}
            return ModelInput(_beside_noise(noisy_BCFHW, conditions.tensors[FIRST_FRAME_CLIP]), times_B, extra=extra)
        kept_B = conditions.first_frame_B
        if kind.first_frame_in_place and kept_B is not None:
            return _in_place(noisy_BCFHW, times_B, conditions.tensors[FIRST_FRAME], kept_B)
        return ModelInput(noisy_BCFHW, times_B)

    def predict(self, transformer: torch.nn.Module, inputs: ModelInput, text: TextBatch) -> torch.Tensor:
        """See Family. Computes in the text's dtype; the velocity is float32, so that the loss is."""
        image, dtype = inputs.extra.get(IMAGE_EMBEDS), text.embeds_BLD.dtype
        velocity: torch.Tensor = transformer(
            hidden_states=inputs.latents_BCFHW.to(dtype),
            timestep=inputs.timesteps,
            encoder_hidden_states=text.embeds_BLD,
            encoder_hidden_states_image=None if image is None else image.to(inputs.latents_BCFHW.device, dtype),
            return_dict=False,
        )[0]
        return velocity.float()

    def cost(self, config: Mapping[str, Any], latent_shape: tuple[int, int, int, int], text_tokens: int) -> float:
        """See Family. Two for each multiply-add of every matrix product; `latent_shape` is (C, F, H, W)."""
        _, frames, height, width = latent_shape
        patch = config["patch_size"]
        tokens = (frames // patch[0]) * (height // patch[1]) * (width // patch[2])
        dim = config["num_attention_heads"] * config["attention_head_dim"]
        self_attention = 4 * tokens * dim * dim + 2 * tokens * tokens * dim
        cross_attention = 2 * (tokens + text_tokens) * dim * dim + 2 * tokens * text_tokens * dim
        feed_forward = 2 * tokens * dim * config["ffn_dim"]
        patches = tokens * dim * prod(patch) * (config["in_channels"] + config["out_channels"])
        embedders = text_tokens * dim * (config["text_dim"] + dim) + dim * (config["freq_dim"] + dim + 6 * dim)
        if image_dim := config["image_dim"]:
            cross_attention += 2 * _IMAGE_ROWS * dim * dim + 2 * tokens * _IMAGE_ROWS * dim
            embedders += _IMAGE_ROWS * image_dim * (image_dim + dim)
        return float(2 * (config["num_layers"] * (self_attention + cross_attention + feed_forward) + patches + embedders))


FAMILY: Family = Wan()


def _beside_noise(noisy_BCFHW: torch.Tensor, clip_BCFHW: torch.Tensor) -> torch.Tensor:
    """Noise, mask (1 in the first frame) and clip along the channels, as ComfyUI's WAN21 puts them."""
    batch, _, *frames_and_size = noisy_BCFHW.shape
    mask_BCFHW = noisy_BCFHW.new_zeros(batch, MASK_CHANNELS, *frames_and_size)
    mask_BCFHW[:, :, 0] = 1
    return torch.cat([noisy_BCFHW, mask_BCFHW, clip_BCFHW.to(noisy_BCFHW)], dim=1)


def _in_place(noisy_BCFHW: torch.Tensor, times_B: torch.Tensor, first_BCFHW: torch.Tensor, kept_B: torch.Tensor) -> ModelInput:
    """The first frame clean and at time 0 in the samples that keep it; every other token at its sample's time."""
    batch, _, frames, height, width = noisy_BCFHW.shape
    given_BF = torch.zeros(batch, frames, dtype=torch.bool, device=noisy_BCFHW.device)
    given_BF[:, 0] = kept_B.to(given_BF.device)
    given_BCFHW = given_BF.view(batch, 1, frames, 1, 1)
    times_BF = times_B[:, None] * ~given_BF
    times_BN = times_BF.repeat_interleave((height // 2) * (width // 2), dim=1)
    return ModelInput(torch.where(given_BCFHW, first_BCFHW.to(noisy_BCFHW), noisy_BCFHW), times_BN, loss_mask=(~given_BCFHW).float())


def _statistics(vae: torch.nn.Module, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean and std of a VAE's latents, (1, C, 1, 1, 1)."""
    config: Any = vae.config
    latent = LATENT_2_2 if config.is_residual else LATENT
    mean, std = (torch.tensor(values, device=device).view(1, -1, 1, 1, 1) for values in (latent.mean, latent.std))
    return mean, std


def _clean(prompt: str) -> str:
    """The prompt as diffusers' WanPipeline reads it: HTML entities resolved (twice), white space single."""
    return re.sub(r"\s+", " ", html.unescape(html.unescape(prompt))).strip()
