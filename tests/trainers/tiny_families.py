"""What the contract suite is told of each family: the published files, and a tiny model of every variant.

A family is added to the suite by its file in `trainers/families/` and one entry in `TINY`.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from trainers.data.cache import Cache
from trainers.data.encoded import Encoded, EncodedItem
from trainers.family import (
    FIRST_FRAME,
    FIRST_FRAME_CLIP,
    IMAGE_EMBEDS,
    IMAGE_TEXT,
    Conditions,
    Family,
    TextRecord,
    Vae,
    VaeDetection,
    Variant,
    families,
)
from trainers.job import Job, parse_job
from trainers.load import native_state
from trainers.stable_file import save_file

Config = dict[str, Any]


@dataclass(frozen=True)
class Published:
    """A published transformer: its list in `assets/keys`, a name it goes by, what it is, its config where it differs from the
    defaults of the diffusers class, and the config in its header, if it has one.
    """

    keys: str
    file_name: str
    variant: str
    config: Config
    header: Config | None = None

    @property
    def metadata(self) -> dict[str, str] | None:
        return {"config": json.dumps(self.header)} if self.header else None


@dataclass(frozen=True)
class TinyFamily:
    """`config` gives the config of a tiny transformer of a variant, where it differs from the class's defaults. `vaes`: for
    each kind the list of its keys, and the config of a small one. `text_dim`, `pooled_dim` and `image_dim` are the widths of
    the tiny model's conditions.
    """

    diffusers_class: str
    published: tuple[Published, ...]
    config: Callable[[str], Config]
    vaes: Mapping[str, tuple[str, Config]]
    text_dim: int = 32
    pooled_dim: int | None = None
    image_dim: int = 32


# Wan

_WAN_1_3B = {"num_attention_heads": 12, "num_layers": 30, "ffn_dim": 8960}
_WAN_5B = {"num_attention_heads": 24, "num_layers": 30, "ffn_dim": 14336, "in_channels": 48, "out_channels": 48}
_WAN_I2V = {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120}
_WAN_T2V_14B = "wan2.1_t2v_14B__wan2.2_t2v_A14B"


def _wan(variant: str) -> Config:
    sizes = {"num_attention_heads": 1, "attention_head_dim": 128, "num_layers": 2, "ffn_dim": 64, "text_dim": 32, "freq_dim": 32}
    if "ti2v" in variant:
        return sizes | {"in_channels": 48, "out_channels": 48}
    image = {"image_dim": 32, "added_kv_proj_dim": 128} if "2.1-i2v" in variant else {}
    return sizes | {"in_channels": 36 if "i2v" in variant else 16} | image


WAN = TinyFamily(
    "WanTransformer3DModel",
    (
        Published("wan2.1_t2v_1.3B", "wan2.1_t2v_1.3B_bf16.safetensors", "wan2.1-t2v-1.3b", _WAN_1_3B),
        Published(_WAN_T2V_14B, "wan2.1_t2v_14B_bf16.safetensors", "wan2.1-t2v-14b", {}),
        Published("wan2.1_i2v_14B", "wan2.1_i2v_480p_14B_fp16.safetensors", "wan2.1-i2v-14b", _WAN_I2V),
        Published(_WAN_T2V_14B, "wan2.2_t2v_high_noise_14B_fp16.safetensors", "wan2.2-t2v-a14b", {}),
        Published("wan2.2_i2v_A14B", "wan2.2_i2v_low_noise_14B_fp16.safetensors", "wan2.2-i2v-a14b", {"in_channels": 36}),
        Published("wan2.2_ti2v_5B", "wan2.2_ti2v_5B_fp16.safetensors", "wan2.2-ti2v-5b", _WAN_5B),
    ),
    _wan,
    {
        "wan2.1": ("vae_wan2.1", {"base_dim": 4, "z_dim": 16}),
        "wan2.2": (
            "vae_wan2.2",
            {
                "base_dim": 4,
                "decoder_base_dim": 4,
                "z_dim": 48,
                "is_residual": True,
                "in_channels": 12,
                "out_channels": 12,
                "patch_size": 2,
                "scale_factor_spatial": 16,
                "temperal_downsample": [False, True, True],
            },
        ),
    },
)

# LTX-Video

_LTX_COMMON = {"cross_attention_dim": 2048, "attention_head_dim": 64, "num_layers": 28}
_LTX_13B = {"cross_attention_dim": 4096, "attention_head_dim": 128, "num_layers": 48}
_LTX_CAUSAL = {"causal_temporal_positioning": True}
_LTX_HEADER = {"transformer": _LTX_CAUSAL}
_LTX_DISTILLED = _LTX_HEADER | {"allowed_inference_steps": [1.0, 0.9937]}
_LTX_PADDED = {"encoder_padding": "zeros", "decoder_padding": "reflect"}


def _ltx(variant: str) -> Config:
    sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "cross_attention_dim": 32, "num_layers": 2, "caption_channels": 32}
    return sizes | {"causal_temporal_positioning": variant != "ltxv-2b-0.9"}


LTX = TinyFamily(
    "LTXVideoTransformer3DModel",
    (
        Published(
            "ltxv_2B",
            "ltx-video-2b-v0.9.safetensors",
            "ltxv-2b-0.9",
            {"causal_temporal_positioning": False},
            {"transformer": {"causal_temporal_positioning": False}},
        ),
        Published("ltxv_2B", "ltx-video-2b-v0.9.5.safetensors", "ltxv-2b-0.9.5", _LTX_CAUSAL, _LTX_HEADER),
        Published("ltxv_2B", "ltxv-2b-0.9.8-distilled.safetensors", "ltxv-2b-distilled", _LTX_CAUSAL, _LTX_DISTILLED),
        Published("ltxv_13B", "ltxv-13b-0.9.7-dev.safetensors", "ltxv-13b", _LTX_13B | _LTX_CAUSAL, _LTX_HEADER),
        Published("ltxv_13B", "ltxv-13b-0.9.8-distilled.safetensors", "ltxv-13b-distilled", _LTX_13B | _LTX_CAUSAL, _LTX_DISTILLED),
    ),
    _ltx,
    {
        "ltx-0.9": (
            "vae_ltx_0.9",
            _LTX_PADDED
            | {
                "block_out_channels": (8, 16, 32, 32),
                "layers_per_block": (1, 1, 1, 1, 1),
                "decoder_block_out_channels": (8, 16, 32, 32),
                "decoder_layers_per_block": (1, 1, 1, 1, 1),
            },
        ),
        "ltx-0.9.1": (
            "vae_ltx_0.9.1",
            _LTX_PADDED
            | {
                "block_out_channels": (8, 16, 32, 32),
                "layers_per_block": (1, 1, 1, 1, 1),
                "decoder_block_out_channels": (16, 16, 16),
                "decoder_layers_per_block": (1, 1, 1, 1),
                "decoder_spatio_temporal_scaling": (True, True, True),
                "decoder_inject_noise": (True, False, True, False),
                "upsample_residual": (True, True, True),
                "upsample_factor": (2, 1, 1),
                "timestep_conditioning": True,
            },
        ),
        "ltx-0.9.5": (
            "vae_ltx_0.9.5",
            _LTX_PADDED
            | {
                "block_out_channels": (16, 32, 32, 32, 32),
                "down_block_types": ("LTXVideo095DownBlock3D",) * 4,
                "downsample_type": ("spatial", "temporal", "spatiotemporal", "spatiotemporal"),
                "layers_per_block": (1, 1, 1, 1, 1),
                "spatio_temporal_scaling": (True,) * 4,
                "decoder_block_out_channels": (16, 16, 32),
                "decoder_layers_per_block": (1, 1, 1, 1),
                "decoder_spatio_temporal_scaling": (True, True, True),
                "decoder_inject_noise": (False, False, False, False),
                "upsample_residual": (True, True, True),
                "upsample_factor": (1, 1, 2),
                "timestep_conditioning": True,
            },
        ),
    },
)

# HunyuanVideo

_HUNYUAN: Mapping[str, Config] = {
    "hunyuan-t2v": {},
    "hunyuan-i2v-v1": {"in_channels": 33, "guidance_embeds": False, "image_condition_type": "latent_concat"},
    "hunyuan-i2v-v2": {"image_condition_type": "token_replace"},
}
_HUNYUAN_SIZES = {"num_attention_heads": 1, "num_layers": 2, "num_single_layers": 2, "text_embed_dim": 32, "pooled_projection_dim": 16}


def _hunyuan(variant: str) -> Config:
    return _HUNYUAN_SIZES | _HUNYUAN[variant]


HUNYUAN = TinyFamily(
    "HunyuanVideoTransformer3DModel",
    tuple(
        Published(keys, f"hunyuan_video_{name}.safetensors", variant, _HUNYUAN[variant])
        for keys, name, variant in (
            ("hunyuan_video_t2v__i2v_v2", "t2v_720p_bf16", "hunyuan-t2v"),
            ("hunyuan_video_i2v_v1", "image_to_video_720p_bf16", "hunyuan-i2v-v1"),
            ("hunyuan_video_t2v__i2v_v2", "v2_replace_image_to_video_720p_bf16", "hunyuan-i2v-v2"),
        )
    ),
    _hunyuan,
    {"hunyuan": ("vae_hunyuan_video", {"block_out_channels": (32, 32, 64, 64)})},
    pooled_dim=16,
)

# Mochi

_MOCHI_CHANNELS = {"encoder_block_out_channels": (32, 64, 96, 128), "decoder_block_out_channels": (32, 64, 96, 128)}


def _mochi(variant: str) -> Config:
    sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "time_embed_dim": 32}
    return sizes | {"pooled_projection_dim": 24, "text_embed_dim": 32, "in_channels": 12, "out_channels": 12}


MOCHI = TinyFamily(
    "MochiTransformer3DModel",
    (Published("mochi_preview", "mochi_preview_bf16.safetensors", "mochi-1-preview", {"out_channels": 12}),),
    _mochi,
    {"mochi": ("vae_mochi", _MOCHI_CHANNELS)},
)

TINY: Mapping[str, TinyFamily] = {"wan": WAN, "ltx": LTX, "hunyuan": HUNYUAN, "mochi": MOCHI}


# Models


def variant_cases() -> list[Any]:
    """(family, variant) for every variant, as parameters. One whose tiny model and conditions an earlier one has is slow."""
    seen: list[object] = []
    cases = []
    for family in families().values():
        for variant in family.variants:
            given = family.required(variant), family.first_frame(variant), variant.boundary
            alike = (family.id, TINY[family.id].config(variant.id), given)
            cases.append(pytest.param(family, variant, id=variant.id, marks=[pytest.mark.slow] if alike in seen else []))
            seen.append(alike)
    return cases


of_every_variant = pytest.mark.parametrize(("family", "variant"), variant_cases())

BLOCKS = ("wan2.1-t2v-1.3b", "wan2.1-i2v-14b", "wan2.2-ti2v-5b", "ltxv-2b-0.9.5", "hunyuan-t2v", "hunyuan-i2v-v2", "mochi-1-preview")
"""Variants that have every kind of block between them, and every kind of input of one; the others differ outside their blocks."""
of_every_kind_of_block = pytest.mark.parametrize(
    ("family", "variant"),
    [
        pytest.param(family, variant, id=variant.id, marks=[] if variant.id in BLOCKS else [pytest.mark.slow])
        for family in families().values()
        for variant in family.variants
    ],
)


def class_defaults(family: Family) -> Config:
    """The arguments of the family's diffusers class, as they are when nothing is said."""
    import diffusers

    parameters = inspect.signature(getattr(diffusers, TINY[family.id].diffusers_class).__init__).parameters
    return {name: parameter.default for name, parameter in parameters.items() if name != "self"}


def tiny_config(family: Family, variant: Variant) -> Config:
    return class_defaults(family) | TINY[family.id].config(variant.id)


@torch.no_grad()
def filled(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """A module on the meta device with random weights that make every part count; what is computed at its making stays."""
    chance = torch.Generator().manual_seed(seed)
    state = {name: _weights(name, like, chance) for name, like in module.state_dict().items()}
    module.load_state_dict(state, strict=True, assign=True)
    return module.eval().requires_grad_(False)


def _weights(name: str, like: torch.Tensor, chance: torch.Generator) -> torch.Tensor:
    values = torch.randn(like.shape, generator=chance)
    scale = like[0].numel() ** -0.5 if like.ndim > 1 else 0.1
    return values * scale + float("norm" in name and like.ndim == 1 and name.endswith("weight"))


def tiny_transformer_of(family: Family, variant: Variant) -> torch.nn.Module:
    return filled(family.build(tiny_config(family, variant)))


def tiny_vae_of(family: Family, vae: Vae) -> torch.nn.Module:
    return filled(family.build_vae(VaeDetection(family, vae, TINY[family.id].vaes[vae.id][1])))


# What they are asked


def tiny_latents(family: Family, variant: Variant, count: int, seed: int = 0, pixels: tuple[int, int] | None = None) -> torch.Tensor:
    """Latents of clips of three latent frames (B, C, 3, H, W), of the smallest size or of `pixels` (height, width)."""
    latent = family.latent(variant)
    shape = latent.shape(2 * latent.temporal_stride + 1, *(pixels or _pixels(family, variant)))
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))


def _pixels(family: Family, variant: Variant) -> tuple[int, int]:
    """The smallest sides that are two and three patches."""
    step = family.latent(variant).spatial_step
    return 2 * step, 3 * step


def tiny_text(family: Family, length: int, seed: int = 0) -> TextRecord:
    tiny, chance = TINY[family.id], torch.Generator().manual_seed(seed)
    pooled = None if tiny.pooled_dim is None else torch.randn(tiny.pooled_dim, generator=chance)
    return TextRecord(torch.randn(length, tiny.text_dim, generator=chance), pooled)


def tiny_conditions(family: Family, variant: Variant, clean_BCFHW: torch.Tensor, keep: list[bool]) -> Conditions:
    """All that the variant may be given; `keep` says which samples keep their first frame."""
    if family.first_frame(variant) is None:
        return Conditions()
    tensors = {FIRST_FRAME: clean_BCFHW[:, :, :1]}
    for kind in family.required(variant) & {FIRST_FRAME_CLIP, IMAGE_EMBEDS}:
        tensors[kind] = torch.stack([_extra(kind, family, clean_CFHW) for clean_CFHW in clean_BCFHW])
    return Conditions(tensors, torch.tensor(keep))


def _extra(kind: str, family: Family, clean_CFHW: torch.Tensor) -> torch.Tensor:
    """What is encoded besides the latents of one clip."""
    if kind == FIRST_FRAME:
        return clean_CFHW[:, :1].clone()
    if kind == FIRST_FRAME_CLIP:
        return torch.cat([clean_CFHW[:, :1], torch.full_like(clean_CFHW[:, 1:], 0.3)], dim=1)
    assert kind == IMAGE_EMBEDS, kind
    return torch.randn(257, TINY[family.id].image_dim, generator=torch.Generator().manual_seed(3))


# Files and jobs


def write_native(path: Path, family: Family, variant: Variant) -> Path:
    """The tiny transformer as a native single file."""
    save_file(native_state(tiny_transformer_of(family, variant).state_dict(), family.keys), path)
    return path


def write_native_vae(path: Path, family: Family, vae: Vae) -> Path:
    save_file(native_state(tiny_vae_of(family, vae).state_dict(), vae.keys), path)
    return path


def write_encoded_of(
    folder: Path, family: Family, variant: Variant, clips: int = 4, held_out: int = 0, pixels: tuple[int, int] | None = None
) -> Path:
    """An encoded folder of random clips with all that the variant requires; the last `held_out` of them are held out."""
    cache, latent = Cache(folder / "cache"), family.latent(variant)
    size = 2 * latent.temporal_stride + 1, *(pixels or _pixels(family, variant))
    texts = {text: cache.text_key(text, "tiny") for text in ["", *(f"clip {index}" for index in range(clips))]}
    for index, key in enumerate(texts.values()):
        cache.write_text(key, tiny_text(family, 3 + index, seed=index))
    items = []
    for index, clean_CFHW in enumerate(tiny_latents(family, variant, clips, 1, pixels)):
        key = cache.latents_key(f"clip {index}", 0.0, size[0], latent.fps, size[1], size[2], "tiny")
        cache.write_latents(key, clean_CFHW)
        caption = f"clip {index}"
        given = (key, texts[caption], caption, f"{index}.mp4", 0.0, *size, latent.fps, 1, index >= clips - held_out)
        items.append(EncodedItem(*given, **_more(cache, family, variant, clean_CFHW, key, texts[""])))
    Encoded(folder, family.id, variant.id, tuple(items), {"": texts[""]}, cache).save()
    return folder


def _more(cache: Cache, family: Family, variant: Variant, clean_CFHW: torch.Tensor, key: str, no_text: str) -> dict[str, Any]:
    """The fields of an item of a variant that requires more than latents."""
    required = family.required(variant)
    extras = {}
    for kind in sorted(required & {FIRST_FRAME, FIRST_FRAME_CLIP, IMAGE_EMBEDS}):
        extras[kind] = cache.text_key(kind, key)
        cache.write(kind, extras[kind], _extra(kind, family, clean_CFHW))
    more: dict[str, Any] = {"extras": extras} if extras else {}
    return more | ({"text_without_caption": no_text} if IMAGE_TEXT in required else {})


def tiny_job_of(folder: Path, family: Family, variant: Variant, **fields: object) -> Job:
    """A job of four steps over a new tiny base and data set, on the CPU."""
    folder.mkdir(parents=True, exist_ok=True)
    values = {
        "name": "tiny",
        "base": {"transformer": str(write_native(folder / "base.safetensors", family, variant))},
        "encoded": str(write_encoded_of(folder / "encoded", family, variant)),
        "runs_folder": str(folder / "runs"),
        "loras_folder": str(folder / "loras"),
        "device": "cpu",
        "steps": 4,
        "batch_size": 2,
        "lora": {"rank": 2},
        "optimizer": {"learning_rate": 1e-2},
        "gradient_checkpointing": False,
        "tensorboard": False,
        "held_out": {"every_steps": 0},
    }
    if variant.boundary is not None:
        values["experts"] = {"train": "high"}
    return parse_job(values | fields)
