"""What is wrong with first frames, guidance and images of previews: asked of a variant that cannot, or missing in the data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from .conditions import negative_prompt, preview_image
from .data.encoded import Encoded
from .errors import Problem
from .family import IMAGE_TEXT, LATENTS, Family, FirstFrameRule, Variant
from .job import Job, PreviewSpec


def condition_problems(job: Job, family: Family, variant: Variant) -> Iterator[Problem]:
    """What is wrong with what a job asks of a variant."""
    rule, asked = family.first_frame(variant), None if job.conditions is None else sum(item.probability for item in job.conditions)
    if asked and rule is None:
        rule_told = f"{variant.title} starts from text alone"
        yield Problem(f"the first frame is to be kept with probability {asked:g}", rule_told, "Leave conditions out.")
    if rule and rule.always and asked not in (None, 1.0):
        rule_told = f"{variant.title} always starts from one"
        yield Problem(f"the first frame is to be kept with probability {asked:g}", rule_told, "Use 1, or leave conditions out.")
    if job.guidance is not None and family.sampling(variant).guidance is None:
        yield Problem(f"guidance is {job.guidance:g}", f"{variant.title} is told none", "Leave it out.")


def clip_problems(job: Job, family: Family, variant: Variant, encoded: Encoded) -> Iterator[Problem]:
    """What a variant needs of the clips and they have not."""
    required, rule = family.required(variant), family.first_frame(variant)
    missing = {kind for item in encoded.items for kind in required - {LATENTS, IMAGE_TEXT} - set(item.extras)}
    with_images = {item.text_without_caption is not None for item in encoded.items}
    mismatch = with_images - {IMAGE_TEXT in required} or (IMAGE_TEXT in required and encoded.variant != variant.id)
    if missing and not mismatch and encoded.variant == variant.id:
        without = sum(bool(missing - set(item.extras)) for item in encoded.items)
        told = f"{without} of {len(encoded.items)} clips lack their {', '.join(sorted(missing))}"
        yield Problem(told, f"{variant.title} learns from it", "Encode the data set again.")
    elif missing or mismatch:
        what = f"the data set was encoded for {encoded.variant}, the base is {variant.id}"
        yield Problem(what, "each needs other things of a first frame", "Encode it again for this base.")
    stills = sum(item.num_frames == 1 for item in encoded.items)
    if rule and rule.always and stills:
        told = f"{stills} of {len(encoded.items)} clips are stills"
        yield Problem(told, f"{variant.title} learns what follows a first frame", "Leave them out, or train a text-to-video model.")


def image_problems(field: str, images: Sequence[str], prompts: int, variant: Variant, rule: FirstFrameRule | None) -> Iterator[Problem]:
    """What is wrong with the images of previews: one for each prompt or one for all; "" stands for none."""
    if any(images) and rule is None:
        yield Problem(f"{field} has {len(images)}", f"{variant.title} starts from text alone", "Leave the images out.")
        return
    images = [*images] * (prompts if len(images) == 1 else 1)
    given = [path for path in images if path]
    if images and len(images) != prompts:
        yield Problem(f"{field} has {len(images)} for {prompts} prompts", "each prompt has one", "Give as many, or a single one for all.")
    elif rule and rule.always and len(given) < prompts:
        value = f"{field} has {len(given)} for {prompts} prompts"
        yield Problem(value, f"{variant.title} always starts from one", "Give one for each prompt.")
    names = [Path(path).name for path in dict.fromkeys(given)]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        yield Problem(f"{field} names two files {twice[0]}", "images are known by their names", "Rename one of them.")


def preview_problems(job: Job, family: Family, variant: Variant, encoded: Encoded | None) -> Iterator[Problem]:
    """What is wrong with the images and texts of the job's previews."""
    spec = job.previews
    problems = list(image_problems("previews.images", spec.images, len(spec.prompts), variant, family.first_frame(variant)))
    if encoded is not None and not problems:
        problems = list(dict.fromkeys(_what_is_not_encoded(spec, family, variant, encoded)))
    yield from problems


def _what_is_not_encoded(spec: PreviewSpec, family: Family, variant: Variant, encoded: Encoded) -> Iterator[Problem]:
    negative = negative_prompt(spec, family, variant)
    for index, prompt in enumerate(spec.prompts):
        image, path = preview_image(spec, encoded, index), spec.image_of(index)
        if path and image is None:
            size = f"--preview-size {spec.width}x{spec.height} --preview-frames {spec.num_frames}"
            value, remedy = f"{Path(path).name} is not encoded at the previews' size", f'Encode again with --image "{path}" {size}.'
            yield Problem(value, "images are encoded with the data set", remedy)
        elif IMAGE_TEXT not in family.required(variant):
            yield from _not_encoded({"--prompt": prompt, "--negative": negative}, encoded.prompts)
        elif image is not None:
            yield from _not_encoded({"--prompt": prompt, "--negative": negative}, image.texts, f' --image "{path}"')


def _not_encoded(texts: Mapping[str, str], known: Mapping[str, str], more: str = "") -> Iterator[Problem]:
    for flag, text in texts.items():
        if text not in known:
            remedy = f'Encode again with {flag} "{text}"{more}.'
            yield Problem(f"the preview prompt {text!r} is not encoded", "prompts are encoded with the data set", remedy)
