"""Which Wan a checkpoint is: the published models, what their headers look like, and what names say where headers are alike."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError, Problem
from ..family import Detection, Family, LatentSpec, Sampling, Variant, simple_schedule
from ._wan_keys import KEYS

if TYPE_CHECKING:
    from ..checkpoint import Checkpoint

# Per channel of the VAEs' latents; diffusers' Wan pipelines and ComfyUI's Wan21 and Wan22 agree on them.
# fmt: off
_MEAN_2_1 = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)
_STD_2_1 = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)
_MEAN_2_2 = (
    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891,
    0.1570, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
    -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230, -0.0313, -0.1649, 0.0117, 0.0723,
    -0.2839, -0.2083, -0.0520, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
)
_STD_2_2 = (
    0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901,
    0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
    0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944,
    0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
)
# fmt: on
LATENT = LatentSpec(16, temporal_stride=4, spatial_stride=8, spatial_step=16, fps=16.0, mean=_MEAN_2_1, std=_STD_2_1)
LATENT_2_2 = LatentSpec(48, temporal_stride=4, spatial_stride=16, spatial_step=32, fps=24.0, mean=_MEAN_2_2, std=_STD_2_2)
"""Of TI2V 5B; the other models of Wan 2.2 have the VAE of 2.1."""


def _sampling(steps: int, cfg: float) -> Sampling:
    """As in ComfyUI's templates, which shift all of Wan by 8."""
    return Sampling(steps, shift=8.0, cfg=cfg, schedule=simple_schedule)


@dataclass(frozen=True)
class Kind:
    """What a header must look like to be a variant; `size` is (width, blocks), None: any other. Without `sampling`: not trained."""

    variant: Variant
    in_channels: int
    sampling: Sampling | None = None
    out_channels: int = 16
    image_embedder: bool = False
    last_frame: bool = False
    size: tuple[int, int] | None = None

    @property
    def first_frame_beside_noise(self) -> bool:
        return self.in_channels == 36

    @property
    def first_frame_in_place(self) -> bool:
        return self.out_channels == LATENT_2_2.channels

    @property
    def version(self) -> str:
        return self.variant.id.removeprefix("wan")[:3]


_1_3B, _5B, _14B = (1536, 30), (3072, 30), (5120, 40)
_HIGH_FROM_T2V, _HIGH_FROM_I2V = 0.875, 0.9
_2_1, _2_1_I2V, _5B_WAY, _A14B = _sampling(30, cfg=6.0), _sampling(20, cfg=6.0), _sampling(20, cfg=5.0), _sampling(20, cfg=3.5)

KINDS = (
    Kind(Variant("wan2.1-t2v-1.3b", "Wan 2.1 T2V 1.3B"), 16, _2_1, size=_1_3B),
    Kind(Variant("wan2.1-t2v-14b", "Wan 2.1 T2V 14B"), 16, _2_1, size=_14B),
    Kind(Variant("wan2.1-i2v-14b", "Wan 2.1 I2V 14B"), 36, _2_1_I2V, image_embedder=True, size=_14B),
    Kind(Variant("wan2.2-ti2v-5b", "Wan 2.2 TI2V 5B"), 48, _5B_WAY, out_channels=48, size=_5B),
    Kind(Variant("wan2.2-t2v-a14b", "Wan 2.2 T2V A14B", _HIGH_FROM_T2V), 16, _A14B, size=_14B),
    Kind(Variant("wan2.2-i2v-a14b", "Wan 2.2 I2V A14B", _HIGH_FROM_I2V), 36, _A14B, size=_14B),
    Kind(Variant("wan2.2-ti2v", "Wan 2.2 TI2V (other size)"), 48, _5B_WAY, out_channels=48),
    Kind(Variant("wan2.2-i2v", "Wan 2.2 I2V (other size)", _HIGH_FROM_I2V), 36, _A14B),
    Kind(Variant("wan2.1-i2v", "Wan 2.1 I2V (other size)"), 36, _2_1_I2V, image_embedder=True),
    Kind(Variant("wan2.1-t2v", "Wan 2.1 T2V (other size)"), 16, _2_1),
    Kind(Variant("wan2.2-t2v", "Wan 2.2 T2V (other size)", _HIGH_FROM_T2V), 16, _A14B),
    # What is not trained is here so that it is refused by its name.
    Kind(Variant("wan2.1-flf2v-14b", "Wan 2.1 FLF2V (first and last frame)"), 36, image_embedder=True, last_frame=True),
    Kind(Variant("wan2.1-fun-inp", "Wan 2.1 Fun InP"), 36, image_embedder=True, size=_1_3B),
    Kind(Variant("wan2.1-fun-control", "Wan 2.1 Fun Control"), 48, image_embedder=True),
    Kind(Variant("wan2.2-fun-control-a14b", "Wan 2.2 Fun Control A14B"), 52),
    Kind(Variant("wan2.1-control", "Wan 2.1 with control channels"), 32),
)
KIND_OF = {kind.variant.id: kind for kind in KINDS}
SAMPLING_OF = {kind.variant.id: kind.sampling for kind in KINDS if kind.sampling}
_TRAINED = "trained are Wan 2.1 T2V and I2V, Wan 2.2 TI2V 5B, T2V A14B and I2V A14B"
# Published models with a branch of their own, by the beginning of its keys.
_BRANCHES = {
    "vace_": "Wan VACE",
    "control_adapter": "Wan Fun Camera",
    "face_adapter": "Wan 2.2 Animate",
    "casual_audio_encoder": "Wan 2.2 S2V",
    "audio_proj": "Wan HuMo",
}
_VERSION = re.compile(r"wan[-_ ]?2[._]?(?P<minor>[12])(?!\d)|(?P<expert>(high|low)[-_ ]?noise|a14b)", re.IGNORECASE)
_EXPERT_OF_FILE = re.compile(r"(?<![a-z])(high|low)([-_ ]?noise)?(?![a-z]|[-_ ]?v?ram)", re.IGNORECASE)
_EXPERT_OF_FOLDER = re.compile(r"(?<![a-z])(high|low)[-_ ]?noise", re.IGNORECASE)
_FUN = re.compile(r"(?<![a-z])fun(?![a-z])", re.IGNORECASE)
_FUN_FOLDER = re.compile(r"wan.*(?<![a-z])fun(?![a-z])", re.IGNORECASE)

# What a Wan transformer has and other models have not, and what its config is read from.
_TELLING = {f"{name}.weight" for name in ("patch_embedding", "text_embedding.0", "time_embedding.0", "blocks.0.ffn.0", "head.head")}
_TELLING |= {"head.modulation"}

# Arguments of the diffusers classes that no shape tells: the values of every published model, or those of a config.json.
_CONSTANTS = {"attention_head_dim": 128, "eps": 1e-6, "qk_norm": "rms_norm_across_heads", "rope_max_seq_len": 1024}
_TRANSFORMER_FIELDS = (*_CONSTANTS, "num_attention_heads")


def detect(checkpoint: Checkpoint, family: Family) -> Detection | None:
    """What `Family.detect` says. Raises CheckpointError for a Wan model that is not trained, or with unknown keys."""
    shapes = _native_shapes(checkpoint)
    if not shapes.keys() >= _TELLING:
        return None
    branches = [title for start, title in _BRANCHES.items() if any(name.startswith(start) for name in shapes)]
    if branches:
        raise _not_trained(checkpoint, branches[0])
    config = _config_from_shapes(shapes) | checkpoint.config_fields("WanTransformer3DModel", _TRANSFORMER_FIELDS)
    kinds = _kinds(config)
    if not kinds:
        raise _not_trained(checkpoint, f"a Wan with {config['in_channels']} channels in and {config['out_channels']} out")
    if not kinds[0].sampling:
        raise _not_trained(checkpoint, kinds[0].variant.title)
    KEYS.map_file(shapes)
    version = _version_by_name(checkpoint)
    kinds.sort(key=lambda kind: kind.version != version)
    expert = _expert_by_name(checkpoint) if kinds[0].variant.boundary else None
    doubt = _named_fun(checkpoint, kinds[0]) if kinds[0].first_frame_beside_noise else None
    variants = tuple(kind.variant for kind in kinds)
    return Detection(family, variants, config, _notes(kinds, version, expert), _reason(config), doubt, expert)


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


def _kinds(config: Mapping[str, Any]) -> list[Kind]:
    """What a model of this config may be: those of exactly its size, else those of any."""
    size = config["num_attention_heads"] * config["attention_head_dim"], config["num_layers"]
    found = (config["in_channels"], config["out_channels"], config["image_dim"] is not None, config["pos_embed_seq_len"] is not None)
    alike = [kind for kind in KINDS if found == (kind.in_channels, kind.out_channels, kind.image_embedder, kind.last_frame)]
    return [kind for kind in alike if kind.size == size] or [kind for kind in alike if kind.size is None]


def _reason(config: Mapping[str, Any]) -> str:
    width, blocks = config["num_attention_heads"] * config["attention_head_dim"], config["num_layers"]
    image = "an" if config["image_dim"] else "no"
    return f"{config['in_channels']} channels in, {config['out_channels']} out, {blocks} blocks of width {width}, {image} image embedder"


def _names(checkpoint: Checkpoint) -> tuple[str, str, str]:
    """The names of the file and of the two folders it is in."""
    path = checkpoint.path.absolute()
    return path.name, path.parent.name, path.parent.parent.name


def _version_by_name(checkpoint: Checkpoint) -> str | None:
    """Whether it is "2.1" or "2.2", if its name, else those of its folders, says so."""
    if _expert_by_folder(checkpoint):
        return "2.2"
    for name in _names(checkpoint):
        if match := _VERSION.search(name):
            return f"2.{match['minor'] or 2}"
    return None


def _expert_by_name(checkpoint: Checkpoint) -> str | None:
    """Whether it is the "high" or the "low" noise expert, if its name or folder says so."""
    name, *folders = _names(checkpoint)
    match = _EXPERT_OF_FILE.search(name) or _EXPERT_OF_FOLDER.search(folders[0])
    return match[1].lower() if match else _expert_by_folder(checkpoint)


def _expert_by_folder(checkpoint: Checkpoint) -> str | None:
    """In a diffusers folder of two transformers the first is the high-noise expert."""
    folder = checkpoint.files[0].absolute().parent
    if folder.name == "transformer_2":
        return "low"
    return "high" if folder.name == "transformer" and folder.with_name("transformer_2").is_dir() else None


def _notes(kinds: Sequence[Kind], version: str | None, expert: str | None) -> tuple[str, ...]:
    """What the tensors cannot tell and no name told."""
    others = " or ".join(kind.variant.title for kind in kinds[1:])
    if others and version is None:
        return (f"The tensors are also those of {others}; only a name can tell, and this one does not.",)
    if kinds[0].variant.boundary and expert is None:
        return ("Its name does not say whether it is the high-noise or the low-noise expert.",)
    return ()


def _not_trained(checkpoint: Checkpoint, what: str) -> CheckpointError:
    return CheckpointError(Problem(f"{checkpoint.path.name} is {what}", _TRAINED, "Give one of these."))


def _named_fun(checkpoint: Checkpoint, kind: Kind) -> Problem | None:
    """Fun InP has the tensors of I2V, and was trained on other masks."""
    if not _FUN.search(checkpoint.path.name) and not _FUN_FOLDER.search(_names(checkpoint)[1]):
        return None
    value = f"{checkpoint.path.name} is a Wan Fun model, by its name"
    return Problem(value, _TRAINED, f"Give one of these, or say variant {kind.variant.id} if it is one (the tensors are alike).")
