"""Wan 2.1, text to video (https://arxiv.org/abs/2503.20314), trained as diffusers' WanTransformer3DModel.

Time is fed as 1000 * sigma, the target is noise - clean: only names and normalisation differ from the common language.
Text is always 512 rows, zeros after the caption; the transformer sees no mask. Other Wan models have the same keys and
other numbers of channels: they are told apart here, and refused by name until they are trained.
"""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import torch

from ..errors import CheckpointError, Problem
from ..family import (
    ComfyNames,
    ComfyT5,
    Conditions,
    Detection,
    Family,
    FirstFrameRule,
    LatentSpec,
    LoraTargets,
    ModelInput,
    Sampling,
    TextBatch,
    TextFolder,
    TextRecord,
    Vae,
    VaeDetection,
    Variant,
)
from ..keytable import KeyTable, Rename

if TYPE_CHECKING:
    from pathlib import Path

    from ..checkpoint import Checkpoint

TEXT_LENGTH = 512
TIME_SCALE = 1000.0

# Per channel of the Wan 2.1 VAE's latents; diffusers' AutoencoderKLWan and ComfyUI's Wan21 agree on them.
# fmt: off
_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)
_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)
# fmt: on
LATENT = LatentSpec(16, temporal_stride=4, spatial_stride=8, spatial_step=16, fps=16.0, mean=_MEAN, std=_STD)


@dataclass(frozen=True)
class _Kind:
    """What a header must look like to be a variant; `size` is (width, blocks), None: any."""

    variant: Variant
    in_channels: int
    out_channels: int = 16
    image_embedder: bool = False
    last_frame: bool = False
    size: tuple[int, int] | None = None
    trained: bool = False


_1_3B, _14B = (1536, 30), (5120, 40)
_T2V_1_3B = Variant("wan2.1-t2v-1.3b", "Wan 2.1 T2V 1.3B")
_T2V_14B = Variant("wan2.1-t2v-14b", "Wan 2.1 T2V 14B")
_T2V = Variant("wan2.1-t2v", "Wan 2.1 T2V (other size)")

# The first that fits is the answer. What is not trained yet is here so that it is refused by its name.
_KINDS = (
    _Kind(_T2V_1_3B, 16, size=_1_3B, trained=True),
    _Kind(_T2V_14B, 16, size=_14B, trained=True),
    _Kind(_T2V, 16, trained=True),
    _Kind(Variant("wan2.1-flf2v-14b", "Wan 2.1 FLF2V (first and last frame)"), 36, image_embedder=True, last_frame=True),
    _Kind(Variant("wan2.1-i2v-14b", "Wan 2.1 I2V 14B"), 36, image_embedder=True, size=_14B),
    _Kind(Variant("wan2.1-fun-inp", "Wan 2.1 Fun InP"), 36, image_embedder=True),
    _Kind(Variant("wan2.1-fun-control", "Wan 2.1 Fun Control"), 48, image_embedder=True),
    _Kind(Variant("wan2.2-i2v-a14b", "Wan 2.2 I2V A14B"), 36),
    _Kind(Variant("wan2.2-ti2v-5b", "Wan 2.2 TI2V 5B"), 48, out_channels=48),
    _Kind(Variant("wan2.2-fun-control-a14b", "Wan 2.2 Fun Control A14B"), 52),
    _Kind(Variant("wan2.1-control", "Wan 2.1 with control channels"), 32),
)
# Published models with a branch of their own, by the beginning of its keys.
_BRANCHES = {
    "vace_": "Wan VACE",
    "control_adapter": "Wan Fun Camera",
    "face_adapter": "Wan 2.2 Animate",
    "casual_audio_encoder": "Wan 2.2 S2V",
}
_VERSION = re.compile(r"wan[-_ ]?2[._]?(?P<minor>[12])(?!\d)|(?P<expert>(high|low)[-_ ]?noise|a14b)", re.IGNORECASE)
_A14B_NOTE = "The tensors are also those of Wan 2.2 T2V A14B, high or low noise; only a name can tell, and this one does not."

# What a Wan transformer has and other models have not, and what its config is read from.
_TELLING = {f"{name}.weight" for name in ("patch_embedding", "text_embedding.0", "time_embedding.0", "blocks.0.ffn.0", "head.head")}
_TELLING |= {"head.modulation"}

# Arguments of the diffusers classes that no shape tells: the values of every published model, or those of a config.json.
_CONSTANTS = {"attention_head_dim": 128, "eps": 1e-6, "qk_norm": "rms_norm_across_heads", "rope_max_seq_len": 1024}
_TRANSFORMER_FIELDS = (*_CONSTANTS, "num_attention_heads")
_VAE_FIELDS = ("base_dim", "z_dim", "dim_mult", "num_res_blocks", "attn_scales", "temperal_downsample", "dropout")


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


VAE_KEYS = KeyTable(
    (
        Rename("quant_conv", "conv1"),
        Rename("post_quant_conv", "conv2"),
        *_both_halves("encoder"),
        *_both_halves("decoder"),
        *_residual("encoder.down_blocks.{}", "encoder.downsamples.{}"),
        Rename("encoder.down_blocks.{}.resample", "encoder.downsamples.{}.resample"),
        Rename("encoder.down_blocks.{}.time_conv", "encoder.downsamples.{}.time_conv"),
        *(row for level in range(4) for row in _up_level(level)),
    )
)

_UMT5 = ComfyT5("wan", "te", "umt5xxl", tokenizer_in_file=True)
_VAE_2_1 = Vae("wan2.1", "Wan 2.1 VAE", VAE_KEYS)


class Wan:
    """The Family protocol for Wan."""

    id = "wan"
    title = "Wan"
    variants: tuple[Variant, ...] = (_T2V_1_3B, _T2V_14B, _T2V)
    keys = KEYS
    vaes: tuple[Vae, ...] = (_VAE_2_1,)
    lora_keys = KEYS
    targets = LoraTargets(
        attention=(r"^blocks\.\d+\.attn[12]\.to_[qkv]$", r"^blocks\.\d+\.attn[12]\.to_out\.0$"),
        feed_forward=(r"^blocks\.\d+\.ffn\.net\.0\.proj$", r"^blocks\.\d+\.ffn\.net\.2$"),
    )
    blocks: tuple[str, ...] = ("blocks",)

    def latent(self, variant: Variant) -> LatentSpec:
        return LATENT

    def sampling(self, variant: Variant) -> Sampling:
        return Sampling(steps=30, shift=5.0, cfg=6.0)

    def comfyui(self, variant: Variant) -> ComfyNames:
        return ComfyNames("WAN", "Wan21", "WanT5Tokenizer", ("WanVAE", "TAEHV"), t5=_UMT5)

    def first_frame(self, variant: Variant) -> FirstFrameRule | None:
        return None

    def detect(self, checkpoint: Checkpoint) -> Detection | None:
        """See Family. Raises CheckpointError for a Wan model that is not trained yet, or with unknown keys."""
        shapes = _native_shapes(checkpoint)
        if not shapes.keys() >= _TELLING:
            return None
        branches = [title for start, title in _BRANCHES.items() if any(name.startswith(start) for name in shapes)]
        if branches:
            raise _not_trained(checkpoint, branches[0])
        config = _config_from_shapes(shapes) | _known(checkpoint.config, "WanTransformer3DModel", _TRANSFORMER_FIELDS)
        kind = _kind(config)
        if kind is None:
            raise _not_trained(checkpoint, f"a Wan with {config['in_channels']} channels in and {config['out_channels']} out")
        if not kind.trained:
            raise _not_trained(checkpoint, kind.variant.title)
        KEYS.map_file(shapes)
        version = _version_by_name(checkpoint.path)
        notes = (_A14B_NOTE,) if kind.variant == _T2V_14B and version is None else ()
        doubt = _named_2_2(checkpoint) if kind.variant == _T2V_14B and version == "2.2" else None
        return Detection(FAMILY, (kind.variant,), config, notes, _reason(config), doubt)

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
        """See Family. Raises CheckpointError for the VAE of Wan 2.2, which is another one."""
        tensors = checkpoint.tensors
        if "decoder.upsamples.0.upsamples.0.residual.2.weight" in tensors or "decoder.up_blocks.0.upsampler.time_conv.weight" in tensors:
            raise _not_trained(checkpoint, "the VAE of Wan 2.2 TI2V 5B", "Give the VAE of Wan 2.1 (wan_2.1_vae.safetensors).")
        native = "decoder.middle.0.residual.0.gamma" in tensors
        if not native and "decoder.mid_block.resnets.0.norm1.gamma" not in tensors:
            return None
        names = ("encoder.conv1.weight", "conv2.weight") if native else ("encoder.conv_in.weight", "post_quant_conv.weight")
        base_dim, z_dim = (tensors[name].shape[0] for name in names)
        config = {"base_dim": base_dim, "z_dim": z_dim} | _known(checkpoint.config, "AutoencoderKLWan", _VAE_FIELDS)
        return VaeDetection(FAMILY, _VAE_2_1, config)

    def build_vae(self, detection: VaeDetection) -> torch.nn.Module:
        from diffusers import AutoencoderKLWan

        with torch.device("meta"):
            vae = AutoencoderKLWan(**detection.config)
        assert isinstance(vae, torch.nn.Module)
        return vae

    @torch.no_grad()
    def encode_video(self, vae: torch.nn.Module, pixels_BCFHW: torch.Tensor) -> torch.Tensor:
        """See Family. Float32 (B, 16, (F - 1) / 4 + 1, H / 8, W / 8); the posterior's mean, as ComfyUI encodes."""
        weight = next(vae.parameters())
        moments: Any = vae.encode(pixels_BCFHW.to(weight.device, weight.dtype)).latent_dist  # type: ignore[operator]
        mean, std = _statistics(weight.device)
        latents: torch.Tensor = (moments.mode().float() - mean) / std
        return latents

    @torch.no_grad()
    def decode_video(self, vae: torch.nn.Module, latents_BCFHW: torch.Tensor) -> torch.Tensor:
        """See Family. Float32 (B, 3, 4 (F - 1) + 1, 8 H, 8 W)."""
        weight = next(vae.parameters())
        mean, std = _statistics(weight.device)
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

    def encode_image(self, folder: TextFolder, image_HWC: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError("no variant here looks at an image")

    def collate_text(self, records: Sequence[TextRecord], device: torch.device, dtype: torch.dtype) -> TextBatch:
        """Exactly 512 rows for each record: zeros after a shorter one, a longer one cut. No mask."""
        width = records[0].embeds_LD.shape[1]
        embeds_BLD = torch.zeros(len(records), TEXT_LENGTH, width, device=device, dtype=dtype)
        for row, record in zip(embeds_BLD, records, strict=True):
            kept = record.embeds_LD[:TEXT_LENGTH]
            row[: kept.shape[0]] = kept.to(device, dtype)
        return TextBatch(embeds_BLD)

    def required(self, variant: Variant) -> frozenset[str]:
        return frozenset({"latents"})

    def prepare(self, variant: Variant, noisy_BCFHW: torch.Tensor, sigma_B: torch.Tensor, conditions: Conditions) -> ModelInput:
        """See Family. The latents as they are; times float32, one for each sample."""
        return ModelInput(noisy_BCFHW, timesteps=TIME_SCALE * sigma_B.float())

    def predict(self, transformer: torch.nn.Module, inputs: ModelInput, text: TextBatch) -> torch.Tensor:
        """See Family. Computes in the text's dtype; the velocity is float32, so that the loss is."""
        velocity: torch.Tensor = transformer(
            hidden_states=inputs.latents_BCFHW.to(text.embeds_BLD.dtype),
            timestep=inputs.timesteps,
            encoder_hidden_states=text.embeds_BLD,
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
        return float(2 * (config["num_layers"] * (self_attention + cross_attention + feed_forward) + patches + embedders))


FAMILY: Family = Wan()


def _native_shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """Every shape under its native name; names that the table does not know stay as they are."""
    is_diffusers = "condition_embedder.time_proj.weight" in checkpoint.tensors
    shapes = {}
    for name, stored in checkpoint.tensors.items():
        try:
            shapes[KEYS.to_native(name).name if is_diffusers else name] = stored.shape
        except CheckpointError:
            shapes[name] = stored.shape
    return shapes


def _config_from_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Every argument of WanTransformer3DModel."""
    dim, in_channels, *patch_size = shapes["patch_embedding.weight"]
    image_norm, image_key = shapes.get("img_emb.proj.0.weight"), shapes.get("blocks.0.cross_attn.k_img.weight")
    positions = shapes.get("img_emb.emb_pos")
    return {
        **_CONSTANTS,
        "patch_size": tuple(patch_size),
        "num_attention_heads": dim // 128,
        "in_channels": in_channels,
        "out_channels": shapes["head.head.weight"][0] // prod(patch_size),
        "text_dim": shapes["text_embedding.0.weight"][1],
        "freq_dim": shapes["time_embedding.0.weight"][1],
        "ffn_dim": shapes["blocks.0.ffn.0.weight"][0],
        "num_layers": len({name.split(".")[1] for name in shapes if name.startswith("blocks.")}),
        "cross_attn_norm": "blocks.0.norm3.weight" in shapes,
        "image_dim": image_norm[0] if image_norm else None,
        "added_kv_proj_dim": image_key[1] if image_key else None,
        "pos_embed_seq_len": positions[1] if positions else None,
    }


def _known(config: Mapping[str, Any] | None, class_name: str, fields: Sequence[str]) -> dict[str, Any]:
    """The named fields of a config.json, if it is the one of that diffusers class."""
    if config is None or config.get("_class_name") != class_name:
        return {}
    return {name: config[name] for name in fields if name in config}


def _kind(config: Mapping[str, Any]) -> _Kind | None:
    size = config["num_attention_heads"] * config["attention_head_dim"], config["num_layers"]
    found = (config["in_channels"], config["out_channels"], config["image_dim"] is not None, config["pos_embed_seq_len"] is not None)
    for kind in _KINDS:
        if found == (kind.in_channels, kind.out_channels, kind.image_embedder, kind.last_frame) and kind.size in (None, size):
            return kind
    return None


def _reason(config: Mapping[str, Any]) -> str:
    width, blocks = config["num_attention_heads"] * config["attention_head_dim"], config["num_layers"]
    image = "an" if config["image_dim"] else "no"
    return f"{config['in_channels']} channels in, {config['out_channels']} out, {blocks} blocks of width {width}, {image} image embedder"


def _version_by_name(path: Path) -> str | None:
    """Whether it is "2.1" or "2.2", if the name of the file, else of the folders it is in, says so."""
    path = path.absolute()
    for name in (path.name, path.parent.name, path.parent.parent.name):
        if match := _VERSION.search(name):
            return f"2.{match['minor'] or 2}"
    return None


def _not_trained(checkpoint: Checkpoint, what: str, remedy: str = "Give a Wan 2.1 text-to-video model.") -> CheckpointError:
    return CheckpointError(Problem(f"{checkpoint.path.name} is {what}", "only Wan 2.1 text to video is trained yet", remedy))


def _named_2_2(checkpoint: Checkpoint) -> Problem:
    value, rule = f"{checkpoint.path.name} is Wan 2.2 T2V A14B, by its name", "only Wan 2.1 text to video is trained yet"
    return Problem(value, rule, f"Give a Wan 2.1 model, or say variant {_T2V_14B.id} if it is one (the tensors are alike).")


def _statistics(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The latents' mean and std, (1, C, 1, 1, 1)."""
    mean, std = (torch.tensor(values, device=device).view(1, -1, 1, 1, 1) for values in (LATENT.mean, LATENT.std))
    return mean, std


def _clean(prompt: str) -> str:
    """The prompt as diffusers' WanPipeline reads it: HTML entities resolved (twice), white space single."""
    return re.sub(r"\s+", " ", html.unescape(html.unescape(prompt))).strip()
