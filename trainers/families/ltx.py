"""LTX-Video (https://arxiv.org/abs/2501.00103), trained as diffusers' LTXVideoTransformer3DModel.

Time is fed as 1000 * sigma, for each token where a first frame is given; the target is noise - clean. Latents go in as a
row of tokens. Positions are seconds and pixels, so frames per second are part of the input. Models from 0.9.5 on count
frames as their causal VAE does (latent frame 0 is one frame of pixels, each later one eight); ComfyUI knows it by the
config in the file's header, and counts as for 0.9 when that was stripped: so does the training, on the same file.

LTX-2 is another model, and Lightricks' own fp8 files hold rotated weights that only their kernels understand: both are refused.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..errors import CheckpointError, KeyTableError, Problem
from ..family import (
    FIRST_FRAME,
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
from ..keytable import KeyTable, Rename, same
from ..offload.chunks import ChunkedForward
from ..text_masks import padded, rows_that_count
from ._ltx_block import CHUNKED
from ._ltx_files import KINDS, candidates, header_config, notes_on, perhaps_rotated, read_header, refuse_rotated
from ._ltx_trial import TRIAL
from ._ltx_vae import VAE_KEYS_0_9, VAE_KEYS_0_9_1, VAE_KEYS_0_9_5, vae_config

if TYPE_CHECKING:
    from ..checkpoint import Checkpoint

TIME_SCALE = 1000.0
# The statistics of the latents are in the VAE's own file, not here.
LATENT = LatentSpec(128, temporal_stride=8, spatial_stride=32, spatial_step=32, fps=25.0, mean=(0.0,) * 128, std=(1.0,) * 128)
NEGATIVE = "worst quality, inconsistent motion, blurry, jittery, distorted"
"""Of Lightricks' inference.py."""

# What ComfyUI adds to the latents, and the time it tells a timed decoder.
DECODE_NOISE, DECODE_TIME = 0.025, 0.05


# What an LTX-Video transformer has and other models have not, and what its config is read from.
_TELLING = {f"{name}.weight" for name in ("patchify_proj", "proj_out", "caption_projection.linear_1", "transformer_blocks.0.attn2.to_k")}

# Arguments of the diffusers class that no shape tells: the values of every published model, or those of a config.json.
_CONSTANTS = {
    "patch_size": 1,
    "patch_size_t": 1,
    "activation_fn": "gelu-approximate",
    "qk_norm": "rms_norm_across_heads",
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
    "attention_bias": True,
    "attention_out_bias": True,
}


def _attention(attention: str) -> tuple[Rename, ...]:
    block = f"transformer_blocks.{{}}.{attention}"
    norms = (Rename(f"{block}.norm_q", f"{block}.q_norm"), Rename(f"{block}.norm_k", f"{block}.k_norm"))
    return *norms, *same(*(f"{block}.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")))


KEYS = KeyTable(
    (
        Rename("proj_in", "patchify_proj"),
        Rename("time_embed", "adaln_single"),
        *same("caption_projection.linear_1", "caption_projection.linear_2", "scale_shift_table", "proj_out"),
        *_attention("attn1"),
        *_attention("attn2"),
        *same(*(f"transformer_blocks.{{}}.{name}" for name in ("ff.net.0.proj", "ff.net.2", "scale_shift_table"))),
    )
)


_OLD, _NEW = ("ltxv-2b-0.9",), tuple(kind.variant.id for kind in KINDS if kind.causal)
_VAE_0_9 = Vae("ltx-0.9", "LTX-Video VAE 0.9", VAE_KEYS_0_9, _OLD)
_VAE_0_9_1 = Vae("ltx-0.9.1", "LTX-Video VAE 0.9.1", VAE_KEYS_0_9_1, _OLD)
_VAE_0_9_5 = Vae("ltx-0.9.5", "LTX-Video VAE 0.9.5 or later", VAE_KEYS_0_9_5, _NEW)


def schedule(steps: int, shift: float, tokens: int) -> list[float]:
    """The `steps + 1` noise levels of ComfyUI's LTXVScheduler, `shift` its max_shift, stretched so that the last is 0.1.

    The logarithm of the shift grows with the number of tokens, from 0.95 at 1024 to `shift` at 4096 and on along that line.
    """
    exponent = 0.95 + (shift - 0.95) * (tokens - 1024) / (4096 - 1024)
    levels = [(steps - step) / steps for step in range(steps)]
    shifted = [1 / (1 + math.exp(-exponent) * (1 / level - 1)) for level in levels]
    stretch = (1 - 0.1) / (1 - shifted[-1]) if steps > 1 else 1.0
    return [*(1 - (1 - sigma) * stretch for sigma in shifted), 0.0]


# "allowed_inference_steps" in the header's config of distilled checkpoints: ManualSigmas in ComfyUI.
_DISTILLED_SIGMAS = (1.0, 0.9937, 0.9875, 0.9812, 0.975, 0.9094, 0.725, 0.4219, 0.0)


def distilled_schedule(steps: int, shift: float, tokens: int) -> list[float]:
    """The noise levels that distilled models were made for; with another number of steps those of `schedule`."""
    return list(_DISTILLED_SIGMAS) if steps == len(_DISTILLED_SIGMAS) - 1 else schedule(steps, shift, tokens)


class CausalRope(torch.nn.Module):
    """The rotary embedding of a causal model: pixel frame max(0, 8f - 7) where `rope` alone says 8f. Holds no weights."""

    def __init__(self, rope: torch.nn.Module) -> None:
        super().__init__()
        self.rope = rope

    def forward(
        self,
        hidden_states: torch.Tensor,
        num_frames: int,
        height: int,
        width: int,
        rope_interpolation_scale: tuple[torch.Tensor, float, float],
        video_coords: torch.Tensor | None = None,
    ) -> Any:
        """As diffusers' rope; the scale is that of one latent frame in seconds (B, 1, 1, 1, 1), and pixels in height and width."""
        assert video_coords is None, "positions are made here"
        seconds_B1111, *pixels = rope_interpolation_scale
        stride, device = LATENT.temporal_stride, hidden_states.device
        frames = (torch.arange(num_frames, dtype=torch.float32, device=device) - (stride - 1) / stride).clamp(min=0)
        rows, columns = (
            torch.arange(n, dtype=torch.float32, device=device) * size for n, size in zip((height, width), pixels, strict=True)
        )
        grid_3FHW = torch.stack(torch.meshgrid(frames, rows, columns, indexing="ij"))
        coords_B3N = grid_3FHW.flatten(1).repeat(len(hidden_states), 1, 1)
        coords_B3N[:, 0] *= seconds_B1111.flatten(1)
        return self.rope(hidden_states, video_coords=coords_B3N)


class Ltx:
    """The Family protocol for LTX-Video."""

    id = "ltx"
    title = "LTX-Video"
    variants: tuple[Variant, ...] = tuple(kind.variant for kind in KINDS)
    keys = KEYS
    vaes: tuple[Vae, ...] = (_VAE_0_9, _VAE_0_9_1, _VAE_0_9_5)
    lora_keys = KEYS
    targets = LoraTargets(
        attention=(r"^transformer_blocks\.\d+\.attn[12]\.to_[qkv]$", r"^transformer_blocks\.\d+\.attn[12]\.to_out\.0$"),
        feed_forward=(r"^transformer_blocks\.\d+\.ff\.net\.0\.proj$", r"^transformer_blocks\.\d+\.ff\.net\.2$"),
    )
    blocks: tuple[str, ...] = ("transformer_blocks",)
    precisions: tuple[PrecisionName, ...] = ("bf16", "fp32")
    chunked: tuple[ChunkedForward, ...] = CHUNKED
    control: ControlLoras | None = ControlLoras(
        "reference", r"(lora_unet_)?transformer_blocks[._]\d+[._](attn1|attn2|ff)[._]", comfyui_model="LTXV"
    )
    trial = TRIAL

    def latent(self, variant: Variant) -> LatentSpec:
        return LATENT

    def sampling(self, variant: Variant) -> Sampling:
        """See Family. ComfyUI's official graph; distilled models take their own eight steps and no guidance."""
        if any(kind.distilled for kind in KINDS if kind.variant == variant):
            return Sampling(steps=8, shift=2.05, cfg=1.0, negative=NEGATIVE, schedule=distilled_schedule)
        return Sampling(steps=30, shift=2.05, cfg=3.0, negative=NEGATIVE, schedule=schedule)

    def comfyui(self, variant: Variant) -> ComfyNames:
        vaes = ("causal_video_autoencoder.VideoVAE",)
        return ComfyNames("LTXV", "LTXV", "LTXVT5Tokenizer", vaes, t5=ComfyT5("lt", "ltxv_te", "t5xxl"))

    def first_frame(self, variant: Variant) -> FirstFrameRule | None:
        return FirstFrameRule(probability=0.1)

    def detect(self, checkpoint: Checkpoint) -> Detection | None:
        """See Family. Raises CheckpointError for LTX-2, Lightricks' rotated fp8 files, and unknown keys."""
        is_diffusers = "proj_in.weight" in checkpoint.tensors
        shapes = _native_shapes(checkpoint, KEYS if is_diffusers else None)
        if not shapes.keys() >= _TELLING:
            return None
        if any(name.startswith("audio_") for name in shapes):
            value, remedy = (
                f"{checkpoint.path.name} is LTX-2 (video with sound)",
                "Give an LTX-Video 0.9 model, or train it with LTX-2's own.",
            )
            raise CheckpointError(Problem(value, "only LTX-Video 0.9 to 0.9.8 is trained here", remedy))
        refuse_rotated(checkpoint)
        KEYS.map_file(shapes)
        found = read_header(checkpoint, is_diffusers)
        known = checkpoint.config_fields("LTXVideoTransformer3DModel", (*_CONSTANTS, "num_attention_heads", "attention_head_dim"))
        config = _config_from_shapes(shapes, found.heads) | known
        size = shapes["patchify_proj.weight"][0], config["num_layers"]
        metadata = {"config": json.dumps({"transformer": {"causal_temporal_positioning": found.causal}})} if is_diffusers else {}
        return Detection(
            FAMILY,
            candidates(size, found),
            config | {"causal_temporal_positioning": found.causal},
            tuple(notes_on(size, found)),
            f"{size[1]} blocks of width {size[0]}, {'' if found.causal else 'not '}causal {found.by}",
            perhaps_rotated(checkpoint),
            native_metadata=metadata,
        )

    def build(self, config: Mapping[str, Any]) -> torch.nn.Module:
        """See Family. A model with causal positions has another rope module; it holds no weights."""
        from diffusers import LTXVideoTransformer3DModel

        arguments = {name: value for name, value in config.items() if name != "causal_temporal_positioning"}
        with torch.device("meta"):
            transformer = LTXVideoTransformer3DModel(**arguments)
        if config.get("causal_temporal_positioning"):
            transformer.rope = CausalRope(transformer.rope)
        assert isinstance(transformer, torch.nn.Module)
        return transformer

    def detect_vae(self, checkpoint: Checkpoint) -> VaeDetection | None:
        """See Family. Raises CheckpointError for the VAE of LTX-2, and for a file without the encoder."""
        tensors = checkpoint.tensors
        native = "decoder.up_blocks.0.res_blocks.0.conv1.conv.weight" in tensors
        name = (checkpoint.config or {}).get("_class_name")
        if not native and (name != "AutoencoderKLLTXVideo" or "latents_mean" not in tensors):
            return None
        timed = f"decoder.{'last_' if native else ''}time_embedder.timestep_embedder.linear_1.weight" in tensors
        folded = f"encoder.down_blocks.{'1' if native else '0.downsamplers.0'}.conv.conv.weight" in tensors
        if "encoder.conv_in.conv.weight" not in tensors or (folded and not timed):
            value = f"{checkpoint.path.name} is {'the VAE of LTX-2' if folded else 'an LTX-Video VAE without its encoder'}"
            raise CheckpointError(
                Problem(value, "LTX-Video needs its own whole VAE", "Give the LTX-Video checkpoint that the model came in.")
            )
        vae = _VAE_0_9_5 if folded else _VAE_0_9_1 if timed else _VAE_0_9
        shapes = _native_shapes(checkpoint, None if native else vae.keys)
        vae.keys.map_file(shapes)
        config = vae_config(shapes, folded=folded, timed=timed) | _vae_header(checkpoint)
        return VaeDetection(FAMILY, vae, config)

    def build_vae(self, detection: VaeDetection) -> torch.nn.Module:
        """See Family. Convolutions are padded as ComfyUI pads them: those of the decoder by reflection, which diffusers does not."""
        from diffusers import AutoencoderKLLTXVideo

        arguments = dict(detection.config)
        paddings = {half: arguments.pop(f"{half}_padding") for half in ("encoder", "decoder")}
        with torch.device("meta"):
            vae = AutoencoderKLLTXVideo(**arguments)
        for half, padding in paddings.items():
            for module in getattr(vae, half).modules():
                if isinstance(module, torch.nn.Conv3d):
                    module.padding_mode = padding
        assert isinstance(vae, torch.nn.Module)
        return vae

    @torch.no_grad()
    def encode_video(self, vae: torch.nn.Module, pixels_BCFHW: torch.Tensor) -> torch.Tensor:
        """See Family. Float32 (B, 128, (F - 1) / 8 + 1, H / 32, W / 32); the posterior's mean, as ComfyUI encodes."""
        weight = next(vae.parameters())
        moments: Any = vae.encode(pixels_BCFHW.to(weight.device, weight.dtype)).latent_dist  # type: ignore[operator]
        mean, std = _statistics(vae)
        latents: torch.Tensor = (moments.mode().float() - mean) / std
        return latents

    @torch.no_grad()
    def decode_video(self, vae: torch.nn.Module, latents_BCFHW: torch.Tensor) -> torch.Tensor:
        """See Family. Float32 (B, 3, 8 (F - 1) + 1, 32 H, 32 W).

        A timed decoder (0.9.1 and later) gets a little noise and a time, as in ComfyUI; the noise is the same every time.
        """
        weight = next(vae.parameters())
        mean, std = _statistics(vae)
        latents, time_B = latents_BCFHW.to(weight.device, torch.float32), None
        with torch.random.fork_rng([weight.device] if weight.device.type == "cuda" else []):
            torch.manual_seed(0)
            if vae.config.timestep_conditioning:  # type: ignore[union-attr]
                noise = torch.randn(latents.shape).to(latents)
                latents = DECODE_NOISE * noise + (1 - DECODE_NOISE) * latents
                time_B = torch.full((len(latents),), DECODE_TIME, device=weight.device, dtype=weight.dtype)
            pixels: torch.Tensor = vae.decode((latents * std + mean).to(weight.dtype), time_B, return_dict=False)[0]  # type: ignore[operator]
        return pixels.float().clamp(-1.0, 1.0)

    @torch.no_grad()
    def encode_text(
        self, variant: Variant, folder: TextFolder, prompts: Sequence[str], image_HWC: torch.Tensor | None = None
    ) -> list[TextRecord]:
        """See Family. T5 rows (L, D) of all of a prompt's tokens, in the encoder's dtype, on the CPU.

        As ComfyUI and Lightricks' inference encode: padding is masked, or here not there at all, and nothing is cut.
        diffusers' pipeline cuts at 128 tokens and lets T5 see the padding.
        """
        tokenizer, text_encoder = folder.tokenizer(), folder.text_encoder()
        device = next(text_encoder.parameters()).device
        records = []
        for prompt in prompts:
            tokens = tokenizer(prompt, add_special_tokens=True, truncation=False, return_tensors="pt")
            hidden = text_encoder(tokens.input_ids.to(device), tokens.attention_mask.to(device)).last_hidden_state
            records.append(TextRecord(hidden[0].cpu()))
        return records

    def encode_image(self, folder: TextFolder, image_HWC: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError("no variant here looks at an image")

    def text_width(self, config: Mapping[str, Any]) -> int:
        return int(config["caption_channels"])

    def collate_text(self, records: Sequence[TextRecord], device: torch.device, dtype: torch.dtype) -> TextBatch:
        """As many rows as the longest record has, zeros after a shorter one; the mask is 1 where a row counts (None: all do)."""
        lengths = [len(record.embeds_LD) for record in records]
        mask_BL = rows_that_count(lengths, device)
        return TextBatch(padded(records, lengths, device, dtype), None if mask_BL is None else mask_BL.long())

    def required(self, variant: Variant) -> frozenset[str]:
        return frozenset({"latents"})

    def prepare(self, variant: Variant, noisy_BCFHW: torch.Tensor, sigma_B: torch.Tensor, conditions: Conditions) -> ModelInput:
        """See Family. Float32 times (B,), or (B, N) with those of a given first frame at 0; `extra` holds fps (B,)."""
        fps_B = conditions.fps_B if conditions.fps_B is not None else torch.full_like(sigma_B, LATENT.fps)
        extra = {"fps": fps_B.to(noisy_BCFHW.device, torch.float32)}
        times_B, given_B = TIME_SCALE * sigma_B.float(), conditions.first_frame_B
        if given_B is None or noisy_BCFHW.shape[2] == 1:
            return ModelInput(noisy_BCFHW, times_B, extra=extra)
        mask_BCFHW = torch.ones_like(noisy_BCFHW[:, :1])
        mask_BCFHW[:, :, 0] = (~given_B).to(mask_BCFHW).view(-1, 1, 1, 1)
        first_BCFHW = conditions.tensors[FIRST_FRAME].to(noisy_BCFHW)
        latents_BCFHW = torch.where(mask_BCFHW.bool(), noisy_BCFHW, first_BCFHW)
        return ModelInput(latents_BCFHW, times_B[:, None] * mask_BCFHW.flatten(1).float(), mask_BCFHW, extra)

    def predict(self, transformer: torch.nn.Module, inputs: ModelInput, text: TextBatch) -> torch.Tensor:
        """See Family. Computes in the text's dtype; the velocity is float32, so that the loss is."""
        frames, height, width = inputs.latents_BCFHW.shape[2:]
        seconds_B1111 = (LATENT.temporal_stride / inputs.extra["fps"]).view(-1, 1, 1, 1, 1)
        velocity_BNC: torch.Tensor = transformer(
            hidden_states=inputs.latents_BCFHW.flatten(2).transpose(1, 2).to(text.embeds_BLD.dtype),
            timestep=inputs.timesteps,
            encoder_hidden_states=text.embeds_BLD,
            encoder_attention_mask=text.mask_BL,
            num_frames=frames,
            height=height,
            width=width,
            rope_interpolation_scale=(seconds_B1111, LATENT.spatial_stride, LATENT.spatial_stride),
            return_dict=False,
        )[0]
        return velocity_BNC.float().transpose(1, 2).reshape(len(velocity_BNC), -1, frames, height, width)

    def cost(self, config: Mapping[str, Any], latent_shape: tuple[int, int, int, int], text_tokens: int) -> float:
        """See Family. Two for each multiply-add of every matrix product; `latent_shape` is (C, F, H, W)."""
        tokens = math.prod(latent_shape[1:])
        dim = config["num_attention_heads"] * config["attention_head_dim"]
        self_attention = 4 * tokens * dim * dim + 2 * tokens * tokens * dim
        cross_attention = 2 * tokens * dim * dim + 2 * text_tokens * config["cross_attention_dim"] * dim + 2 * tokens * text_tokens * dim
        feed_forward = 8 * tokens * dim * dim
        ends = tokens * dim * (config["in_channels"] + config["out_channels"])
        embedders = text_tokens * dim * (config["caption_channels"] + dim) + dim * (256 + dim + 6 * dim)
        return float(2 * (config["num_layers"] * (self_attention + cross_attention + feed_forward) + ends + embedders))


FAMILY: Family = Ltx()


def _native_shapes(checkpoint: Checkpoint, diffusers: KeyTable | None) -> dict[str, tuple[int, ...]]:
    """Every shape under its native name, from diffusers names by that table; names that it does not know stay as they are."""
    shapes = {}
    for name, stored in checkpoint.tensors.items():
        try:
            shapes[diffusers.to_native(name).name if diffusers else name] = stored.shape
        except KeyTableError:
            shapes[name] = stored.shape
    return shapes


def _config_from_shapes(shapes: Mapping[str, tuple[int, ...]], heads: int) -> dict[str, Any]:
    """Every argument of LTXVideoTransformer3DModel."""
    dim, in_channels = shapes["patchify_proj.weight"]
    return {
        **_CONSTANTS,
        "in_channels": in_channels,
        "out_channels": shapes["proj_out.weight"][0],
        "num_attention_heads": heads,
        "attention_head_dim": dim // heads,
        "cross_attention_dim": shapes["transformer_blocks.0.attn2.to_k.weight"][1],
        "num_layers": len({name.split(".")[1] for name in shapes if name.startswith("transformer_blocks.")}),
        "caption_channels": shapes["caption_projection.linear_1.weight"][1],
    }


def _vae_header(checkpoint: Checkpoint) -> dict[str, Any]:
    """How ComfyUI pads convolutions, and whether the decoder is causal: by the header's config, else by its defaults."""
    config = header_config(checkpoint).get("vae") or {}
    paddings = {
        f"{half}_padding": config.get("spatial_padding_mode", mode) for half, mode in (("encoder", "zeros"), ("decoder", "reflect"))
    }
    return paddings | {"decoder_causal": bool(config.get("causal_decoder", False))}


def _statistics(vae: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """The latents' mean and std, (1, C, 1, 1, 1)."""
    mean, std = (getattr(vae, f"latents_{name}").float().view(1, -1, 1, 1, 1) for name in ("mean", "std"))
    return mean, std
