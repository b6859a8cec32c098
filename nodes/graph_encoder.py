"""The encoder of a graph: clips and captions through the VAE, CLIP and CLIP_VISION that are wired to a node.

So the LoRA learns on exactly the latents and conditioning that ComfyUI will use, whatever made the objects: any
quantisation, GGUF packs, LoRAs on the text encoder.

Shape suffixes: B batch, C channels, F frames, H and W pixels (or latent height and width), L text tokens, D text width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from ..trainers.encoding import Cancelled
from ..trainers.family import LatentSpec, TextRecord, family_of
from . import host
from .identity import identity_of_clip, identity_of_clip_vision, identity_of_vae
from .native import check_parts, latent_format
from .records import Base


@dataclass(frozen=True)
class Known:
    """The identities of a VAE, a CLIP and a CLIP_VISION as far as they are known without them."""

    vae: str | None = None
    text: str | None = None
    image: str | None = None


class GraphEncoder:
    """An `Encoder` (trainers.encoders) of ComfyUI's objects; one that is None must be known and is never used.

    Raises CheckpointError for objects of another family.
    """

    def __init__(self, base: Base, vae: Any = None, clip: Any = None, clip_vision: Any = None, known: Known = Known()) -> None:
        family, variant = family_of(base.variant)
        check_parts(family, variant, vae, clip, clip_vision)
        self.family_id = family.id
        self.variant_id = variant.id
        self._names = family.comfyui(variant)
        self.latent: LatentSpec = family.latent(variant)
        self.negative = family.sampling(variant).negative
        self.required = family.required(variant)
        self.known = known
        self._vae, self._clip, self._clip_vision = vae, clip, clip_vision

    @cached_property
    def own(self) -> Known:
        """The identities of the objects that are there."""
        vae = None if self._vae is None else identity_of_vae(self._vae)
        text = None if self._clip is None else identity_of_clip(self._clip)
        return Known(vae, text, None if self._clip_vision is None else identity_of_clip_vision(self._clip_vision))

    @property
    def identity_vae(self) -> str:
        return self._name(self.own.vae or self.known.vae)

    @property
    def identity_text(self) -> str:
        return self._name(self.own.text or self.known.text)

    @property
    def identity_image(self) -> str:
        return self._name(self.own.image or self.known.image)

    def _name(self, identity: str | None) -> str:
        assert identity is not None, "an object that is not there must be known"
        return f"{self.family_id} comfyui {identity}"

    def encode_video(self, pixels_BCFHW: torch.Tensor) -> torch.Tensor:
        """See Encoder. ComfyUI's VAE takes one clip as (F, H, W, C) in 0..1; the sampler's normalisation follows."""
        assert self._vae is not None, "a clip has changed while it was looked up: press Run again"
        pixels_FHWC = pixels_BCFHW[0].permute(1, 2, 3, 0).add(1.0).div(2.0)
        try:
            latents_BCFHW = self._vae.encode(pixels_FHWC)
        except host.Interrupted:
            raise Cancelled from None
        return latent_format(self._names).process_in(latents_BCFHW.float().cpu())

    def encode_text(self, prompts: Sequence[str], image_HWC: torch.Tensor | None = None) -> list[TextRecord]:
        """See Encoder. Rows that ComfyUI's CLIP adds as padding are cut off: the training pads by itself."""
        assert self._clip is not None, "a caption was not there a moment ago: press Run again"
        try:
            options = {} if image_HWC is None else self._with_image(image_HWC)
            return [self._encode_one(prompt, options) for prompt in prompts]
        except host.Interrupted:
            raise Cancelled from None

    def encode_image(self, image_HWC: torch.Tensor) -> torch.Tensor:
        """See Encoder. The whole image squashed to a square, and the rows before the last layer, as Wan's nodes take them."""
        try:
            rows: torch.Tensor = self._look(image_HWC)["penultimate_hidden_states"]
        except host.Interrupted:
            raise Cancelled from None
        return rows[0].cpu()

    def _look(self, image_HWC: torch.Tensor) -> Any:
        assert self._clip_vision is not None, "a clip has changed while it was looked up: press Run again"
        return self._clip_vision.encode_image(image_HWC[None], crop=False)

    def _with_image(self, image_HWC: torch.Tensor) -> dict[str, Any]:
        """What the tokenizer is told of an image: what core's TextEncodeHunyuanVideo_ImageToVideo tells it."""
        from comfy_extras.nodes_hunyuan import PROMPT_TEMPLATE_ENCODE_VIDEO_I2V

        rows = self._look(image_HWC)["mm_projected"]
        interleave = self._names.image_interleave
        return {"llama_template": PROMPT_TEMPLATE_ENCODE_VIDEO_I2V, "image_embeds": rows, "image_interleave": interleave}

    def _encode_one(self, prompt: str, options: Mapping[str, Any]) -> TextRecord:
        tokens = self._clip.tokenize(escaped(prompt), **options)
        ((embeds_BLD, more),) = self._clip.encode_from_tokens_scheduled(tokens, show_pbar=False)
        pooled_BD = more.get("pooled_output")
        kept_LD = unpadded(embeds_BLD[0], more.get("attention_mask"))
        return TextRecord(kept_LD.cpu(), None if pooled_BD is None else pooled_BD[0].cpu())


def escaped(prompt: str) -> str:
    r"""The prompt as ComfyUI's tokenizers read it literally: parentheses are weights there, `\(` and `\)` are not.

    A backslash stays as it is: before any other sign it is no escape.
    """
    return prompt.replace("(", r"\(").replace(")", r"\)")


def unpadded(embeds_LD: torch.Tensor, mask_BL: torch.Tensor | None) -> torch.Tensor:
    """The rows up to the last that counts: by the mask, or else the last that is not all zeros (at least one row)."""
    counts_L = embeds_LD.ne(0).any(dim=1) if mask_BL is None else mask_BL[0].bool()
    last = counts_L.nonzero()
    return embeds_LD[: int(last[-1]) + 1 if len(last) else 1].clone()
