"""From clips and captions to the encoded data set that a job trains on.

Only what the cache lacks is encoded, and a model that has nothing to encode is never loaded (see `encoding`).

Shape suffixes: B batch, C channels, F frames, H and W pixels (or latent height and width), L text tokens, D text width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from .data.buckets import Geometry, Plan, Window, plan_windows
from .data.cache import Cache
from .data.encoded import Encoded, EncodedImage, EncodedItem
from .data.scan import Clip, Dataset, Progress, Rejected
from .data.video import probe
from .encoding import Cancelled as Cancelled
from .encoding import Keys, Shot, Work, entries
from .encoding import pixels_from_frames as pixels_from_frames
from .errors import DatasetError, Problem
from .family import FIRST_FRAME, IMAGE_TEXT, LATENTS, LatentSpec, TextRecord


class Encoder(Protocol):
    """What turns pixels and prompts into what the transformer sees: a diffusers folder here, ComfyUI's objects there.

    The identities change when, and only when, the same input would give another output. Asking for them loads nothing.
    """

    family_id: str
    variant_id: str
    latent: LatentSpec
    negative: str
    """The negative prompt that sampling uses by default."""
    required: frozenset[str]
    """What is encoded of each window (see `Family.required`)."""

    @property
    def identity_vae(self) -> str: ...

    @property
    def identity_text(self) -> str: ...

    @property
    def identity_image(self) -> str:
        """Of what looks at first frames; only asked for variants that require IMAGE_EMBEDS or IMAGE_TEXT."""

    def encode_video(self, pixels_BCFHW: torch.Tensor) -> torch.Tensor:
        """Normalised float32 latents_BCFHW on the CPU, of pixels in [-1, 1]."""

    def encode_text(self, prompts: Sequence[str], image_HWC: torch.Tensor | None = None) -> list[TextRecord]:
        """One unpadded record for each prompt, on the CPU; for IMAGE_TEXT together with a first frame in 0..1."""

    def encode_image(self, image_HWC: torch.Tensor) -> torch.Tensor:
        """IMAGE_EMBEDS (rows, width) of a first frame in 0..1, on the CPU."""


@dataclass(frozen=True)
class FirstFrames:
    """The images that previews start from: for each prompt the path of one, or None. `negative` as in a job's previews."""

    prompts: tuple[str, ...]
    images: tuple[Path | None, ...]
    negative: str
    num_frames: int
    height: int
    width: int


@dataclass(frozen=True)
class EncodeReport:
    """What an `encode` did. `encoded` is None when it was cancelled: the cache keeps what was done, nothing else changed."""

    encoded: Encoded | None
    latents_new: int
    latents_cached: int
    texts_new: int
    texts_cached: int
    rejected: tuple[Rejected, ...]
    first_frames_new: int = 0
    first_frames_cached: int = 0

    @classmethod
    def of(cls, work: Work, encoded: Encoded | None, rejected: tuple[Rejected, ...]) -> EncodeReport:
        there, new = work.there, work.new
        frames_new, frames_cached = (counts.total() - counts[LATENTS] - counts[IMAGE_TEXT] for counts in (new, there))
        return cls(
            encoded,
            new[LATENTS],
            there[LATENTS],
            new[IMAGE_TEXT],
            there[IMAGE_TEXT],
            (*rejected, *work.rejected),
            frames_new,
            frames_cached,
        )

    def __str__(self) -> str:
        done = f"clips: {self.latents_new} encoded, {self.latents_cached} already there; "
        done += f"texts: {self.texts_new} encoded, {self.texts_cached} already there"
        if self.first_frames_new or self.first_frames_cached:
            done += f"; first frames: {self.first_frames_new} encoded, {self.first_frames_cached} already there"
        return done if self.encoded else f"cancelled; {done}"


def encode_dataset(
    dataset: Dataset,
    geometry: Geometry,
    encoder: Encoder,
    folder: Path | str,
    *,
    prompts: Sequence[str] = (),
    first_frames: FirstFrames | None = None,
    cache: Cache | None = None,
    progress: Progress | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> EncodeReport:
    """Encode what the cache lacks and write `<folder>/encoded.json`.

    `prompts` are texts that no clip has, such as those of previews; "" and the encoder's negative prompt are always among
    them. Where captions are encoded together with first frames, prompts are encoded with the `first_frames` of previews
    only. `cache`: `<folder>/cache` by default. A clip that cannot be decoded is rejected with its reason and the rest goes
    on. `cancelled` is asked before each window and text.

    Raises DatasetError when the geometry breaks the model's rules, no clip can be used or an image cannot be read.
    """
    plan = plan_windows(dataset, geometry, encoder.latent)
    images = preview_shots(encoder, first_frames)
    folder = Path(folder).expanduser().absolute()
    work = Work(encoder, cache or Cache(folder / "cache"), progress, cancelled)
    clips = dataset_shots(encoder, plan)
    asked = needed_texts(encoder, prompts)
    try:
        texts = work.texts(needed_texts(encoder, prompts, plan))
        keys = work.shots([*clips, *images])
    except Cancelled:
        return EncodeReport.of(work, None, plan.rejected)
    items = tuple(_item(shot.window, found, texts) for shot, found in zip(clips, keys, strict=False) if found is not None)
    first = _encoded_images(images, keys[len(clips) :], work)
    if not items:
        raise DatasetError([item.problem for item in work.rejected[:20]], subject="No clip could be encoded")
    chosen = {prompt: texts[prompt] for prompt in asked}
    encoded = Encoded(folder, encoder.family_id, encoder.variant_id, items, chosen, work.cache, first)
    encoded.save()
    return EncodeReport.of(work, encoded, plan.rejected)


def encode_prompts(
    prompts: Sequence[str],
    encoder: Encoder,
    cache: Cache,
    progress: Progress | None = None,
    cancelled: Callable[[], bool] | None = None,
    first_frames: FirstFrames | None = None,
) -> tuple[dict[str, str], tuple[EncodedImage, ...]] | None:
    """({prompt: its key}, first frames), all of them cached, with "" and the encoder's negative prompt; None when cancelled.

    Raises DatasetError for an image that cannot be read.
    """
    work, images = Work(encoder, cache, progress, cancelled), preview_shots(encoder, first_frames)
    try:
        return work.texts(needed_texts(encoder, prompts)), _encoded_images(images, work.shots(images), work)
    except Cancelled:
        return None


def needed_texts(encoder: Encoder, prompts: Sequence[str], plan: Plan | None = None) -> tuple[str, ...]:
    """What is encoded as text alone, each once: "", the negative prompt, `prompts`, and the captions of the planned windows.

    Nothing for variants that read every text together with a first frame.
    """
    if IMAGE_TEXT in encoder.required:
        return ()
    captions = [window.clip.caption for window in plan.windows] if plan else []
    return tuple(dict.fromkeys(("", encoder.negative, *prompts, *captions)))


def dataset_shots(encoder: Encoder, plan: Plan) -> list[Shot]:
    """What is encoded of the windows of a data set; with IMAGE_TEXT also the caption that is dropped, once for each."""
    return [Shot(window, encoder.required, (window.clip.caption, "")) for window in plan.windows]


def preview_shots(encoder: Encoder, first_frames: FirstFrames | None) -> list[Shot]:
    """What is encoded of the images of previews: what the variant requires, and always the first frame alone.

    Raises DatasetError with every image that cannot be read.
    """
    if first_frames is None:
        return []
    kinds = encoder.required - {LATENTS} | {FIRST_FRAME}
    shots, problems = [], []
    for prompt, path in zip(first_frames.prompts, first_frames.images, strict=True):
        try:
            if path is not None:
                window = _image_window(path, prompt, first_frames, encoder.latent.fps)
                shots.append(Shot(window, kinds, (prompt, first_frames.negative)))
        except (DatasetError, OSError) as error:
            told = error.problems[0].value if isinstance(error, DatasetError) else f"it cannot be read ({error.strerror})"
            problems.append(Problem(f"{path}: {told}", "a preview starts from an image", "Give a picture file, such as a PNG."))
    if problems:
        raise DatasetError(problems, subject="The images of the previews")
    return shots


def _image_window(path: Path, prompt: str, first_frames: FirstFrames, fps: float) -> Window:
    path = path.expanduser().absolute()
    clip = Clip(str(path), path.name, prompt, probe(path))
    return Window(clip, 0.0, first_frames.num_frames, first_frames.height, first_frames.width, fps)


def all_texts_cached(prompts: Sequence[str], identity_text: str, cache: Cache) -> bool:
    """Whether no text encoder is needed for these texts."""
    return all(cache.has_text(Cache.text_key(prompt, identity_text)) for prompt in prompts)


def all_shots_cached(shots: Sequence[Shot], kinds: frozenset[str], encoder: Encoder, cache: Cache) -> bool:
    """Whether nothing of `kinds` is to be made (see `encoding`: TEXT_KINDS, IMAGE_KINDS, VAE_KINDS).

    Reads clips that were never read, to know their content; asks the encoder for the identities of these kinds only.
    """

    def is_cached(shot: Shot) -> bool:
        try:
            return all(cache.has(entry.kind, entry.key) for entry in entries(shot, kinds, encoder, cache))
        except OSError:
            return True  # a clip that cannot be read will be rejected: nothing of it is encoded

    return all(is_cached(shot) for shot in shots)


def _item(window: Window, keys: Keys, texts: dict[str, str]) -> EncodedItem:
    clip = window.clip
    text = keys.get((IMAGE_TEXT, clip.caption))
    return EncodedItem(
        latents=keys[LATENTS, ""],
        text=text or texts[clip.caption],
        caption=clip.caption,
        source=clip.name,
        start_seconds=window.start_seconds,
        num_frames=window.num_frames,
        height=window.height,
        width=window.width,
        fps=window.fps,
        repeats=clip.repeats,
        held_out=clip.held_out,
        extras=_extras(keys),
        text_without_caption=keys.get((IMAGE_TEXT, "")),
    )


def _extras(keys: Keys) -> dict[str, str]:
    return {kind: key for (kind, _), key in keys.items() if kind not in (LATENTS, IMAGE_TEXT)}


def _encoded_images(shots: Sequence[Shot], keys: Sequence[Keys | None], work: Work) -> tuple[EncodedImage, ...]:
    """The images of previews, each once with all its texts. Raises DatasetError for one that was rejected."""
    if any(found is None for found in keys):
        names = {shot.window.clip.name for shot in shots}
        raise DatasetError([item.problem for item in work.rejected if item.name in names], subject="The images of the previews")
    images: dict[str, EncodedImage] = {}
    for shot, found in zip(shots, keys, strict=True):
        window, name = shot.window, shot.window.clip.name
        assert found is not None
        texts = dict(images[name].texts) if name in images else {}
        texts |= {text: key for (kind, text), key in found.items() if kind == IMAGE_TEXT}
        images[name] = EncodedImage(name, window.num_frames, window.height, window.width, _extras(found), texts)
    return tuple(images.values())
