"""A stand-in for families that start from an image: Wan's tiny model, whose variants ask for every kind of extra, and which
keeps the conditions that it was given.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny import WAN

from trainers import family as contract
from trainers.checkpoint import Checkpoint
from trainers.family import (
    FIRST_FRAME,
    FIRST_FRAME_CLIP,
    IMAGE_EMBEDS,
    IMAGE_TEXT,
    LATENTS,
    ComfyNames,
    Conditions,
    Detection,
    FirstFrameRule,
    LatentSpec,
    ModelInput,
    Sampling,
    TextRecord,
    VaeDetection,
    Variant,
)

ALWAYS = Variant("stand-in-always", "Stand-in I2V")
SOMETIMES = Variant("stand-in-sometimes", "Stand-in TI2V")
NEVER = Variant("wan2.1-t2v", "Wan 2.1 T2V (other size)")
EVERYTHING = frozenset({LATENTS, FIRST_FRAME, FIRST_FRAME_CLIP, IMAGE_EMBEDS, IMAGE_TEXT})


class FirstFrameWan(type(WAN)):  # type: ignore[misc]
    """ALWAYS starts from an image and requires everything; SOMETIMES may keep latent 0; NEVER is Wan itself."""

    variants = (NEVER, ALWAYS, SOMETIMES)
    vaes = tuple(replace(vae, variants=()) for vae in WAN.vaes[:1])

    def __init__(self) -> None:
        self.seen: list[Conditions] = []

    def detect(self, checkpoint: Checkpoint) -> Detection | None:
        found = super().detect(checkpoint)
        return found and replace(found, family=self, variants=self.variants)

    def latent(self, variant: Variant) -> LatentSpec:
        return super().latent(NEVER)

    def detect_vae(self, checkpoint: Checkpoint) -> VaeDetection | None:
        found = super().detect_vae(checkpoint)
        return found and replace(found, vae=self.vaes[0])

    def required(self, variant: Variant) -> frozenset[str]:
        return EVERYTHING if variant is ALWAYS else frozenset({LATENTS})

    def first_frame(self, variant: Variant) -> FirstFrameRule | None:
        rules: Mapping[str, FirstFrameRule] = {ALWAYS.id: FirstFrameRule(1.0, always=True), SOMETIMES.id: FirstFrameRule(0.5)}
        return rules.get(variant.id)

    def sampling(self, variant: Variant) -> Sampling:
        return replace(super().sampling(NEVER), guidance=None if variant is NEVER else 6.0)

    def comfyui(self, variant: Variant) -> ComfyNames:
        return replace(super().comfyui(NEVER), text_encoders=2 if variant is ALWAYS else 1)

    def encode_text(self, variant: Variant, folder: Any, prompts: Sequence[str], image_HWC: torch.Tensor | None = None) -> list[TextRecord]:
        """With an image: its mean colour is the pooled vector, after what the second encoder makes of the prompt."""
        records: list[TextRecord] = super().encode_text(variant, folder, prompts)
        if image_HWC is None:
            return records
        pooled = []
        for prompt in prompts:
            tokens = folder.tokenizer(2)(prompt, return_tensors="pt")
            second = folder.text_encoder(2)(tokens.input_ids).pooler_output[0]
            pooled.append(torch.cat([second, image_HWC.mean((0, 1)) * folder.image_processor().rescale_factor * 255]))
        return [TextRecord(record.embeds_LD, pooled_D) for record, pooled_D in zip(records, pooled, strict=True)]

    def encode_image(self, folder: Any, image_HWC: torch.Tensor) -> torch.Tensor:
        image = (image_HWC * 255).round().to(torch.uint8).numpy()
        pixels = folder.image_processor()(image, return_tensors="pt").pixel_values
        with torch.no_grad():
            rows: torch.Tensor = folder.image_encoder()(pixels, output_hidden_states=True).hidden_states[-2][0]
        return rows

    def prepare(self, variant: Variant, noisy_BCFHW: torch.Tensor, sigma_B: torch.Tensor, conditions: Conditions) -> ModelInput:
        self.seen.append(conditions)
        inputs: ModelInput = super().prepare(NEVER, noisy_BCFHW, sigma_B, conditions)
        if conditions.first_frame_B is None:
            return inputs
        keep = conditions.first_frame_B.view(-1, 1, 1, 1, 1)
        mask = torch.ones_like(noisy_BCFHW[:, :1])
        mask[:, :, :1] = torch.where(keep, 0.0, 1.0)
        latents = noisy_BCFHW.clone()
        latents[:, :, :1] = torch.where(keep, conditions.tensors[FIRST_FRAME], noisy_BCFHW[:, :, :1])
        return replace(inputs, latents_BCFHW=latents, loss_mask=mask)


@contextmanager
def known() -> Iterator[FirstFrameWan]:
    """The stand-in in the place of Wan, for everything that asks for a family."""
    family = FirstFrameWan()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contract, "families", lambda: {"wan": family})
        yield family
