"""The contract of a model family, and the registry that finds them.

A family is one file in `families/` with a module-level `FAMILY`. Everything that differs between models ends there:
sign, time scale, packing, rope, normalisation, names. The rest of the trainer speaks one language:

    sigma in [0, 1], 1 is pure noise;  x = (1 - sigma) * clean + sigma * noise;  velocity = noise - clean

Shape suffixes: B batch, C channels, F latent frames, H and W latent height and width, L text tokens, D text width,
N transformer tokens.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch

from .errors import CheckpointError, Problem
from .flow import sampling_sigmas, shifted
from .keytable import KeyTable

if TYPE_CHECKING:
    from .checkpoint import Checkpoint
    from .offload.chunks import ChunkedForward


PrecisionName = Literal["bf16", "fp16", "fp32"]


@dataclass(frozen=True)
class LatentSpec:
    """How pixels become latents, and which pixels are allowed.

    A clip has `temporal_stride * n + 1` frames, and sides that are multiples of `spatial_step` pixels (VAE stride times
    the transformer's patch). `mean` and `std` are per channel: latents = (posterior mean - mean) / std.
    """

    channels: int
    temporal_stride: int
    spatial_stride: int
    spatial_step: int
    fps: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(C, F, H, W) of the latents of a clip of `num_frames` x `height` x `width` pixels."""
        latent_frames = (num_frames - 1) // self.temporal_stride + 1
        return self.channels, latent_frames, height // self.spatial_stride, width // self.spatial_stride

    def tokens(self, num_frames: int, height: int, width: int) -> int:
        """How many tokens the transformer sees for such a clip."""
        latent_frames = (num_frames - 1) // self.temporal_stride + 1
        return latent_frames * (height // self.spatial_step) * (width // self.spatial_step)

    def floor_num_frames(self, num_frames: int) -> int:
        """The largest allowed number of frames that is at most `num_frames` (at least 1)."""
        return max(num_frames - 1, 0) // self.temporal_stride * self.temporal_stride + 1

    def problems(self, num_frames: int, height: int, width: int) -> list[Problem]:
        """What is wrong with a clip of this size; empty when nothing is."""
        found = []
        if num_frames < 1 or (num_frames - 1) % self.temporal_stride:
            low = self.floor_num_frames(num_frames)
            found.append(
                Problem(
                    f"num_frames is {num_frames}",
                    f"this model needs {self.temporal_stride}n+1",
                    f"Use {low} or {low + self.temporal_stride}.",
                )
            )
        for name, value in (("height", height), ("width", width)):
            if value < self.spatial_step or value % self.spatial_step:
                low = max(value // self.spatial_step, 1) * self.spatial_step
                found.append(
                    Problem(
                        f"{name} is {value}",
                        f"this model needs multiples of {self.spatial_step} pixels",
                        f"Use {low} or {low + self.spatial_step}.",
                    )
                )
        return found


@dataclass(frozen=True)
class Variant:
    """One published model of a family.

    `boundary` is the noise level at and above which the high-noise expert works, for models of two experts (Wan 2.2 A14B).
    """

    id: str
    title: str
    boundary: float | None = None


@dataclass(frozen=True)
class Detection:
    """What a file's header says: the variants it may be (the likeliest first) and the transformer's full config.

    `notes` are sentences for the user about what the tensors cannot tell; `reason` is what the choice was made by. `doubt`
    is what the file's name says against the choice: then only a user who names the variant can make it. `expert` is "high"
    or "low" when a name says which of two experts the file is. `config_of` is what the config has otherwise when a user
    chooses a candidate, by its id. `native_metadata` is what a native file's header would have to tell ComfyUI where this
    file, in another layout, has no such header.
    """

    family: Family
    variants: tuple[Variant, ...]
    config: Mapping[str, Any]
    notes: tuple[str, ...] = ()
    reason: str = ""
    doubt: Problem | None = None
    expert: str | None = None
    config_of: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    native_metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def variant(self) -> Variant:
        return self.variants[0]


@dataclass(frozen=True)
class Vae:
    """One kind of VAE. `variants` are the ids of those it belongs to; empty: all of the family.

    `tile_pixels`: the family decodes in tiles of this side, however much room there is; None: whole.
    """

    id: str
    title: str
    keys: KeyTable
    variants: tuple[str, ...] = ()
    tile_pixels: int | None = None

    def fits(self, variant: Variant) -> bool:
        return not self.variants or variant.id in self.variants


@dataclass(frozen=True)
class VaeDetection:
    """What a VAE's header says. `encodes` is False for a file that holds the decoder only."""

    family: Family
    vae: Vae
    config: Mapping[str, Any]
    encodes: bool = True


@dataclass(frozen=True)
class TextRecord:
    """One encoded caption, unpadded: `embeds_LD`, and what else the family's transformer needs."""

    embeds_LD: torch.Tensor
    pooled_D: torch.Tensor | None = None


@dataclass(frozen=True)
class TextBatch:
    """Captions of a batch, padded as the transformer expects: made by `Family.collate_text`."""

    embeds_BLD: torch.Tensor
    mask_BL: torch.Tensor | None = None
    pooled_BD: torch.Tensor | None = None


LATENTS = "latents"
FIRST_FRAME = "first_frame"
FIRST_FRAME_CLIP = "first_frame_clip"
IMAGE_EMBEDS = "image_embeds"
IMAGE_TEXT = "image_text"
"""What `Family.required` may name besides LATENTS: the latents of the first frame encoded alone (C, 1, H, W); those of a
clip of the first frame and then mid-grey (C, F, H, W); the image encoder's rows for the first frame (rows, width); captions
encoded together with the first frame (then there is one text for each window, not for each caption)."""


@dataclass(frozen=True)
class FirstFrameRule:
    """How a variant is trained on a given first frame: by default for a share of `probability`; `always`: it knows nothing else."""

    probability: float
    always: bool = False


@dataclass(frozen=True)
class Conditions:
    """What a batch is conditioned on besides text and noise level. Nothing of it: text to video.

    `tensors` by the names above, stacked (B, ...). FIRST_FRAME is there for every variant that can keep a first frame; where
    latent 0 of a clip is its first frame, it is that. `first_frame_B` (bool) says which samples keep theirs; None: none.
    `fps_B` are the clips' frames per second (None: the model's own), `guidance` what a guidance-distilled model is told
    (None: the family's own).
    """

    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)
    first_frame_B: torch.Tensor | None = None
    fps_B: torch.Tensor | None = None
    guidance: float | None = None


@dataclass(frozen=True)
class ModelInput:
    """What the transformer gets, in its own units.

    `latents_BCFHW` noisy latents (with extra channels if the variant has them), `timesteps` (B,) or (B, N). `loss_mask`
    (broadcastable to the velocity; None: everything counts) is 0 where nothing is predicted: there the latents are clean
    and given, in training and in sampling.
    """

    latents_BCFHW: torch.Tensor
    timesteps: torch.Tensor
    loss_mask: torch.Tensor | None = None
    extra: Mapping[str, torch.Tensor] = field(default_factory=dict)


def shifted_schedule(steps: int, shift: float, tokens: int) -> list[float]:
    """`steps + 1` evenly spaced noise levels from 1 to 0, shifted, whatever the number of tokens."""
    return sampling_sigmas(steps, shift)


def simple_schedule(steps: int, shift: float, tokens: int) -> list[float]:
    """The noise levels of ComfyUI's scheduler "simple": `steps` of its 1000 shifted ones, and 0, whatever the number of tokens."""
    return [*(shifted((1000 - int(index * (1000 / steps))) / 1000, shift) for index in range(steps)), 0.0]


@dataclass(frozen=True)
class Sampling:
    """How a family is sampled by default: Euler over `schedule(steps, shift, tokens)`, classifier-free guidance `cfg` (1: none).

    `guidance` is what a guidance-distilled model is told; None: the model takes none.
    """

    steps: int
    shift: float
    cfg: float
    negative: str = ""
    guidance: float | None = None
    schedule: Callable[[int, float, int], list[float]] = shifted_schedule


@dataclass(frozen=True)
class ComfyT5:
    """What ComfyUI makes the CLIP of a single T5 of: `function` in a module of its text_encoders, and the encoder's `name`.

    `tokenizer_in_file`: the tokenizer comes with the weights (UMT5); for other T5 ComfyUI has its own.
    """

    module: str
    function: str
    name: str
    tokenizer_in_file: bool = False


@dataclass(frozen=True)
class ComfyNames:
    """What ComfyUI calls a variant's parts.

    `clip_type` in its CLIPType, `latent_format` among its latent formats; `tokenizer` and `vaes` are names of the classes
    that its CLIP and VAE objects are made of, with the ends of their modules' names where two are called alike.
    `text_encoders` is how many files a CLIP is made of, `t5` what one is made of that is a T5 alone. `image_interleave`: with
    IMAGE_TEXT, each how many image tokens one is kept.
    """

    clip_type: str
    latent_format: str
    tokenizer: str
    vaes: tuple[str, ...]
    text_encoders: int = 1
    image_interleave: int | None = None
    t5: ComfyT5 | None = None


@dataclass(frozen=True)
class ControlLoras:
    """The control LoRAs of a family (see `control_lora`): how the control enters the model, a regular expression that names of
    their modules begin with (without any prefix), and ComfyUI's class of the models that they go into.
    """

    kind: Literal["channels", "reference"]
    modules: str
    comfyui_model: str


@dataclass(frozen=True)
class LoraTargets:
    """Which Linears get a LoRA: regular expressions on full diffusers module names, anchored at a block list."""

    attention: tuple[str, ...]
    feed_forward: tuple[str, ...]


@dataclass(frozen=True)
class Trial:
    """What `check` tries a device with: attention of the largest model, and a tiny model of the first variant.

    `masked`: captions of different lengths in a batch need a mask. `config` is what of a tiny model differs from the defaults of
    diffusers' class; `patch_side` in latents; `pooled_width` of a caption's second part, where a model has one.
    """

    heads: int
    head_width: int
    masked: bool
    config: Mapping[str, Any]
    patch_side: int = 2
    pooled_width: int | None = None


class Family(Protocol):
    """One model family. Implementations import diffusers inside `build*`, never at import."""

    id: str
    title: str
    variants: tuple[Variant, ...]
    keys: KeyTable
    vaes: tuple[Vae, ...]
    lora_keys: KeyTable
    """How LoRA files name the adapted modules: `keys`, unless ComfyUI and diffusers both load only other names."""
    targets: LoraTargets
    blocks: tuple[str, ...]
    """Names of the transformer's block lists, in the order they run."""
    precisions: tuple[PrecisionName, ...]
    """What it computes in without overflowing, the best to train in first."""
    chunked: tuple[ChunkedForward, ...]
    """The forward passes of its classes of blocks, for parts of the sequence where attention is not needed."""
    control: ControlLoras | None
    """Those that are applied; None: there are none."""
    trial: Trial

    def latent(self, variant: Variant) -> LatentSpec: ...

    def sampling(self, variant: Variant) -> Sampling: ...

    def comfyui(self, variant: Variant) -> ComfyNames: ...

    def first_frame(self, variant: Variant) -> FirstFrameRule | None:
        """How the variant is trained on first frames; None: it cannot be (text to video only)."""

    def detect(self, checkpoint: Checkpoint) -> Detection | None:
        """What the checkpoint is, or None when it is not of this family."""

    def build(self, config: Mapping[str, Any]) -> torch.nn.Module:
        """The transformer of a config, on the meta device, in float32."""

    def detect_vae(self, checkpoint: Checkpoint) -> VaeDetection | None:
        """Which of this family's VAEs the checkpoint is, or None when it is none of them."""

    def build_vae(self, detection: VaeDetection) -> torch.nn.Module:
        """The VAE, on the meta device."""

    def encode_video(self, vae: torch.nn.Module, pixels_BCFHW: torch.Tensor) -> torch.Tensor:
        """Normalised latents (posterior mean) of pixels in [-1, 1]."""

    def decode_video(self, vae: torch.nn.Module, latents_BCFHW: torch.Tensor) -> torch.Tensor:
        """Pixels in [-1, 1] of normalised latents."""

    def encode_text(
        self, variant: Variant, folder: TextFolder, prompts: Sequence[str], image_HWC: torch.Tensor | None = None
    ) -> list[TextRecord]:
        """One unpadded record per prompt, from the encoders of a diffusers folder; with IMAGE_TEXT together with an image."""

    def encode_image(self, folder: TextFolder, image_HWC: torch.Tensor) -> torch.Tensor:
        """IMAGE_EMBEDS of an image in 0..1; only asked of variants that require it."""

    def text_width(self, config: Mapping[str, Any]) -> int:
        """How wide the text rows are that the transformer takes."""

    def collate_text(self, records: Sequence[TextRecord], device: torch.device, dtype: torch.dtype) -> TextBatch: ...

    def required(self, variant: Variant) -> frozenset[str]:
        """What is encoded for each clip window: "latents" and, by variant, more (see FIRST_FRAME and the names beside it)."""

    def prepare(self, variant: Variant, noisy_BCFHW: torch.Tensor, sigma_B: torch.Tensor, conditions: Conditions) -> ModelInput:
        """What the transformer gets for latents at noise level `sigma_B`: the same in training and in sampling."""

    def predict(self, transformer: torch.nn.Module, inputs: ModelInput, text: TextBatch) -> torch.Tensor:
        """The velocity (noise - clean), (B, C, F, H, W); any value where `inputs.loss_mask` is 0."""

    def cost(self, config: Mapping[str, Any], latent_shape: tuple[int, int, int, int], text_tokens: int) -> float:
        """FLOPs of one forward pass of one sample."""


class TextFolder(Protocol):
    """The text and image encoders of a diffusers folder, loaded when they are first asked for.

    One kind is in memory at a time: the text encoders with their tokenizers, or the image encoder.
    """

    def tokenizer(self, number: int = 1) -> Any:
        """`tokenizer`, or `tokenizer_2`."""

    def text_encoder(self, number: int = 1) -> Any:
        """`text_encoder`, or `text_encoder_2`, on its device."""

    def image_processor(self) -> Any: ...

    def image_encoder(self) -> Any: ...


@cache
def families() -> Mapping[str, Family]:
    """Every family, by id: one for each file in `families/` (one that begins with "_" is a part of a family)."""
    package = importlib.import_module(".families", __package__)
    modules = [
        importlib.import_module(f"{package.__name__}.{info.name}")
        for info in pkgutil.iter_modules(package.__path__)
        if not info.name.startswith("_")
    ]
    return {module.FAMILY.id: module.FAMILY for module in modules}


def detect_vae(checkpoint: Checkpoint, family: Family, variant: Variant | None = None, *, to_encode: bool = False) -> VaeDetection:
    """Which VAE a checkpoint is, by its header.

    Raises CheckpointError unless it is one of `family`, of `variant` (None: of any), and one that `to_encode` can.
    """
    name = checkpoint.path.name
    found = family.detect_vae(checkpoint)
    if found is None:
        others = (vae for other in families().values() if other is not family and (vae := _quiet_vae(other, checkpoint)))
        other = next(others, None)
        what = f"is the {other.vae.title}" if other else "is no VAE that is known here"
        raise CheckpointError(Problem(f"{name} {what}", f"{family.title} needs its own VAE", _vae_remedy(family, variant)))
    if variant is not None and not found.vae.fits(variant):
        raise CheckpointError(Problem(f"{name} is the {found.vae.title}", f"{variant.title} has another", _vae_remedy(family, variant)))
    if to_encode and not found.encodes:
        value, remedy = f"{name} holds the decoder only", "Give a file with the encoder, or the VAE of the diffusers folder."
        raise CheckpointError(Problem(value, "clips are encoded with the encoder", remedy))
    return found


def _quiet_vae(family: Family, checkpoint: Checkpoint) -> VaeDetection | None:
    try:
        return family.detect_vae(checkpoint)
    except CheckpointError:
        return None


def _vae_remedy(family: Family, variant: Variant | None) -> str:
    titles = [vae.title for vae in family.vaes if variant is None or vae.fits(variant)]
    return f"Give the file or folder of the {' or '.join(titles)}."


def family_of(variant_id: str) -> tuple[Family, Variant]:
    """The family and variant of a variant's id. Raises CheckpointError naming the known ones."""
    known = {variant.id: (family, variant) for family in families().values() for variant in family.variants}
    if variant_id not in known:
        raise CheckpointError(Problem(f"variant is {variant_id!r}", "it must be a known one", f"Use one of: {', '.join(known)}."))
    return known[variant_id]


def detect(checkpoint: Checkpoint, variant_id: str | None = None) -> Detection:
    """What a checkpoint is, by its header; `variant_id` overrides the choice among the candidates.

    Raises CheckpointError when no family knows it, when its name speaks against it and no variant is chosen, or when the
    chosen variant is not a candidate.
    """
    for family in families().values():
        detection = family.detect(checkpoint)
        if detection is None:
            continue
        if variant_id is None and detection.doubt:
            raise CheckpointError(detection.doubt)
        if variant_id is None:
            return detection
        chosen = [variant for variant in detection.variants if variant.id == variant_id]
        if chosen:
            config = {**detection.config, **detection.config_of.get(variant_id, {})}
            return replace(detection, variants=tuple(chosen), config=config, doubt=None)
        can_be = ", ".join(variant.id for variant in detection.variants)
        raise CheckpointError(
            Problem(
                f"variant is {variant_id!r}", f"{checkpoint.path.name} can only be {can_be}", "Leave the variant out or use one of these."
            )
        )
    raise CheckpointError(
        Problem(
            f"{checkpoint.path.name} is no model that is known here",
            f"known are {', '.join(family.title for family in families().values())}",
            "Give the transformer's file (not the VAE, text encoder or a LoRA).",
        )
    )
