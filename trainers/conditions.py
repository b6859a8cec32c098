"""What samples are conditioned on besides text and noise level, in training, in evaluation and in previews.

Shape suffixes: B batch, C channels, F latent frames, H and W latent height and width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .data.encoded import Encoded, EncodedImage, EncodedItem
from .family import FIRST_FRAME, IMAGE_TEXT, LATENTS, Conditions, Family, FirstFrameRule, TextRecord, Variant
from .flow import generator
from .job import Job, PreviewSpec


def first_frame_probability(job: Job, rule: FirstFrameRule | None) -> float:
    """How often a clip keeps its first frame: what the job says, or else the variant's own rule; 0 where it cannot."""
    if rule is None or rule.always:
        return 0.0 if rule is None else 1.0
    if job.conditions is None:
        return rule.probability
    return sum(condition.probability for condition in job.conditions)


def draws_first_frame(probability: float, seed: int, step: int, index: int) -> bool:
    """Whether sample `index` of the global batch of `step` keeps its first frame: a draw of its own, which moves no other."""
    return torch.rand((), generator=generator(seed, "first frame", step, index)).item() < probability


def spread_first_frames(probability: float, count: int) -> list[bool]:
    """Which of `count` clips keep their first frame where nothing is drawn: that share of them, spread evenly."""
    return [int((number + 1) * probability + 0.5) > int(number * probability + 0.5) for number in range(count)]


def clip_conditions(
    job: Job,
    family: Family,
    variant: Variant,
    encoded: Encoded,
    items: Sequence[EncodedItem],
    clean_BCFHW: torch.Tensor,
    keep: Sequence[bool],
) -> Conditions:
    """The conditions of a batch of clips, on the device of its clean latents. `keep`: which of them keep their first frame.

    A still keeps none unless the variant knows nothing else: there would be nothing to predict.
    """
    device = clean_BCFHW.device
    fps_B = torch.tensor([item.fps for item in items], dtype=torch.float32, device=device)
    rule = family.first_frame(variant)
    if rule is None:
        return Conditions(fps_B=fps_B, guidance=job.guidance)
    tensors = {
        kind: torch.stack([encoded.extra(kind, item.extras[kind]) for item in items]).to(device)
        for kind in sorted(family.required(variant) - {LATENTS, IMAGE_TEXT})
    }
    tensors.setdefault(FIRST_FRAME, clean_BCFHW[:, :, :1])
    kept = any(keep) and (rule.always or clean_BCFHW.shape[2] > 1)
    return Conditions(tensors, torch.tensor(list(keep), device=device) if kept else None, fps_B, job.guidance)


def clip_text(encoded: Encoded, item: EncodedItem, without_caption: bool) -> TextRecord:
    """The caption of a clip, or the empty one in its place."""
    if not without_caption:
        return encoded.text(item.text)
    return encoded.text(item.text_without_caption or encoded.prompts[""])


def preview_image(spec: PreviewSpec, encoded: Encoded, index: int) -> EncodedImage | None:
    """What preview `index` starts from; None: from noise alone."""
    path = spec.image_of(index)
    return encoded.image(path, spec.num_frames, spec.height, spec.width) if path else None


def preview_conditions(family: Family, variant: Variant, encoded: Encoded, image: EncodedImage | None, device: torch.device) -> Conditions:
    """The conditions of one preview (B = 1)."""
    guidance = family.sampling(variant).guidance
    if image is None:
        return Conditions(guidance=guidance)
    tensors = {kind: encoded.extra(kind, key)[None].to(device) for kind, key in image.extras.items()}
    return Conditions(tensors, torch.tensor([True], device=device), guidance=guidance)


def preview_text(encoded: Encoded, image: EncodedImage | None, prompt: str) -> TextRecord:
    """A prompt of a preview, encoded with its image where texts are."""
    return encoded.text(image.texts[prompt] if image and image.texts else encoded.prompts[prompt])


def negative_prompt(spec: PreviewSpec, family: Family, variant: Variant) -> str:
    """What the previews' guidance steers away from."""
    return family.sampling(variant).negative if spec.negative is None else spec.negative
