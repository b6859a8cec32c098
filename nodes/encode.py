"""Encoding: from clips, captions and prompts to what a training reads, with the VAE and CLIP of the graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from comfy_api.latest import io, ui

from ..trainers.adherence import find_clip_problems
from ..trainers.condition_problems import image_problems
from ..trainers.data.buckets import Geometry, plan_windows
from ..trainers.data.cache import Cache
from ..trainers.data.clip_store import store_clip
from ..trainers.data.scan import Dataset
from ..trainers.encoders import (
    EncodeReport,
    FirstFrames,
    dataset_shots,
    encode_dataset,
    encode_prompts,
    needed_texts,
    preview_shots,
)
from ..trainers.errors import DatasetError, Problem
from ..trainers.family import family_of
from . import host
from .lazy import encoder_of, known_encoder, needed_inputs
from .records import BASE, DATASET, ENCODED, PREVIEWS, Base, EncodedData, PreviewSettings
from .schema import ADVANCED, schema

_SHOWN_REJECTED = 50


class EncodeDataset(io.ComfyNode):
    """Encodes what was not encoded before; a warm run loads no model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "EncodeDataset",
            "Encode Dataset",
            "Encodes the clips with the VAE and the captions with the text encoder, once: what was encoded before is not "
            "encoded again, and then neither model is loaded. Cancelling keeps what is done.",
            inputs=[
                DATASET.Input("dataset", tooltip="The clips and captions."),
                BASE.Input("base", tooltip="The model they are encoded for."),
                io.Vae.Input("vae", lazy=True, tooltip="The VAE that encodes the clips; loaded only when there is something to encode."),
                io.Clip.Input("clip", lazy=True, tooltip="The text encoder of the captions; loaded only when needed."),
                *_size_inputs(width=832, height=480, num_frames=81),
                io.Float.Input(
                    "fps",
                    default=0.0,
                    min=0.0,
                    max=240.0,
                    step=1.0,
                    tooltip="Frames per second that clips are resampled to. 0: the model's own, which is right unless you know better.",
                ),
                io.Boolean.Input(
                    "bucketing",
                    default=True,
                    tooltip="On: each clip keeps its shape, at the area of width x height. Off: all are cropped to width x height.",
                ),
                io.Combo.Input(
                    "clip_mode",
                    ["first", "spread", "all"],
                    default="first",
                    tooltip="What is taken of a long video: its beginning, parts spread over it, or all of it, one part after the other.",
                ),
                io.Int.Input(
                    "clips_per_video",
                    default=0,
                    min=0,
                    max=1000,
                    tooltip="Most parts taken of one video with 'spread' and 'all'. 0: as many as fit.",
                ),
                _clip_vision_input(),
            ],
            outputs=[
                ENCODED.Output("encoded", tooltip="The encoded data set, for Train LoRA."),
                io.String.Output("report", tooltip="What was encoded, and which clips were not used and why."),
            ],
            hidden=[io.Hidden.prompt, io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, **values: Any) -> str:
        return _fingerprint()

    @classmethod
    def check_lazy_status(cls, dataset: Dataset, base: Base, vae: Any = None, clip: Any = None, **values: Any) -> list[str]:
        encoder = known_encoder(cls.hidden, base)
        plan = plan_windows(dataset, _geometry(values), encoder.latent)
        return needed_inputs(cls.hidden, base, encoder, needed_texts(encoder, (), plan), dataset_shots(encoder, plan), _cache())

    @classmethod
    def execute(
        cls, dataset: Dataset, base: Base, vae: Any = None, clip: Any = None, clip_vision: Any = None, **values: Any
    ) -> io.NodeOutput:
        encoder = encoder_of(cls.hidden, base, vae, clip, clip_vision)
        report = encode_dataset(
            dataset, _geometry(values), encoder, host.encoded_folder(), progress=host.progress(), cancelled=host.cancelled
        )
        if report.encoded is None:
            raise host.Interrupted
        encoded, text = report.encoded, _told(report)
        record = EncodedData(str(encoded.folder), encoded.identity)
        return io.NodeOutput(record, text, ui=ui.PreviewText(text))


class Previews(io.ComfyNode):
    """Encodes the prompts of the videos that a training samples on its way."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "Previews",
            "Previews",
            "Videos that are sampled while the LoRA trains, always from the same noise, to see it learn. The prompts are encoded "
            "once; the training itself needs no text encoder.",
            inputs=[
                BASE.Input("base", tooltip="The model that is trained."),
                io.Clip.Input("clip", lazy=True, tooltip="The text encoder of the prompts; loaded only when there is something to encode."),
                io.String.Input(
                    "prompts",
                    multiline=True,
                    default="",
                    tooltip="One prompt per line, one video each. Read as captions are: parentheses are no weights.",
                ),
                io.String.Input("negative", multiline=True, default="", tooltip="What the videos are steered away from."),
                *_size_inputs(width=832, height=480, num_frames=33),
                io.Int.Input(
                    "every_steps",
                    default=250,
                    min=1,
                    max=1_000_000,
                    tooltip="Steps between two previews; also before the first step and after the last.",
                ),
                *_sampling_inputs(),
                io.Vae.Input("vae", lazy=True, optional=True, tooltip="The VAE, for models that start from an image."),
                _clip_vision_input(),
                io.Image.Input(
                    "images", optional=True, tooltip="First frames, for models that start from an image: one per prompt, or one for all."
                ),
                io.String.Input(
                    "clip_folder",
                    default="",
                    optional=True,
                    extra_dict=ADVANCED,
                    tooltip="Folder of a CLIP or SigLIP model with config.json, weights, tokenizer and preprocessor_config.json, as "
                    "transformers keeps it: measures how well each video fits its prompt. Empty: not measured.",
                ),
            ],
            outputs=[PREVIEWS.Output("previews", tooltip="The previews, for Train LoRA.")],
            hidden=[io.Hidden.prompt, io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, **values: Any) -> str:
        return _fingerprint()

    @classmethod
    def check_lazy_status(cls, base: Base, prompts: str, negative: str, clip: Any = None, **values: Any) -> list[str]:
        spec = _preview_spec(base, prompts, negative, values)
        encoder = known_encoder(cls.hidden, base)
        shots = preview_shots(encoder, _first_frames(spec))
        return needed_inputs(cls.hidden, base, encoder, needed_texts(encoder, (negative, *spec["prompts"])), shots, _cache())

    @classmethod
    def execute(
        cls, base: Base, prompts: str, negative: str, clip: Any = None, vae: Any = None, clip_vision: Any = None, **values: Any
    ) -> io.NodeOutput:
        spec = _preview_spec(base, prompts, negative, values)
        encoder = encoder_of(cls.hidden, base, vae, clip, clip_vision)
        asked, first_frames = (negative, *spec["prompts"]), _first_frames(spec)
        encoded = encode_prompts(asked, encoder, _cache(), host.progress(), host.cancelled, first_frames)
        if encoded is None:
            raise host.Interrupted
        return io.NodeOutput(PreviewSettings(base.family, base.variant, encoded[0], spec, encoded[1]))


def _size_inputs(width: int, height: int, num_frames: int) -> list[Any]:
    return [
        io.Int.Input("width", default=width, min=16, max=4096, step=16, tooltip="Pixels; the model says which multiples it takes."),
        io.Int.Input("height", default=height, min=16, max=4096, step=16, tooltip="Pixels; the model says which multiples it takes."),
        io.Int.Input(
            "num_frames",
            default=num_frames,
            min=1,
            max=1000,
            tooltip="Frames of a video. The model says which counts it takes: 4n+1 for Wan (17, 33, 49, 81).",
        ),
    ]


def _sampling_inputs() -> list[Any]:
    return [
        io.Int.Input(
            "sampling_steps",
            default=0,
            min=0,
            max=200,
            extra_dict=ADVANCED,
            tooltip="Steps of the sampler; more take longer. 0: the model's own.",
        ),
        io.Float.Input(
            "cfg",
            default=0.0,
            min=0.0,
            max=30.0,
            step=0.5,
            extra_dict=ADVANCED,
            tooltip="How strongly the prompt is followed. 1: no guidance. 0: the model's own.",
        ),
        io.Float.Input(
            "shift",
            default=0.0,
            min=0.0,
            max=30.0,
            step=0.5,
            extra_dict=ADVANCED,
            tooltip="Shift of the noise levels, as in ComfyUI's ModelSamplingSD3. 0: the model's own.",
        ),
        io.Int.Input(
            "seed",
            default=0,
            min=0,
            max=2**31 - 1,
            control_after_generate=False,  # another seed each time would be another run each time
            extra_dict=ADVANCED,
            tooltip="Noise of the first video; each further one takes the next seed.",
        ),
    ]


def _clip_vision_input() -> Any:
    return io.ClipVision.Input(
        "clip_vision", lazy=True, optional=True, tooltip="The image encoder, for models that look at a first frame with one."
    )


def _fingerprint() -> str:
    """Changes when what was encoded is gone, so that a user who deletes it finds it made again."""
    folder = host.encoded_folder()
    there = [(folder / name).is_dir() for name in ("versions", "cache/latents", "cache/text", "cache/image")]
    return f"{there} {host.missing_since()}"


def _cache() -> Cache:
    return Cache(host.encoded_folder() / "cache")


def _geometry(values: dict[str, Any]) -> Geometry:
    return Geometry(
        width=values["width"],
        height=values["height"],
        num_frames=values["num_frames"],
        fps=values["fps"] or None,
        bucketing=values["bucketing"],
        clip_mode=values["clip_mode"],
        clips_per_video=values["clips_per_video"] or None,
    )


def _preview_spec(base: Base, prompts: str, negative: str, values: dict[str, Any]) -> dict[str, Any]:
    """The fields of `trainers.job.PreviewSpec`; images are kept as files. Raises DatasetError with everything that is wrong."""
    lines = tuple(line.strip() for line in prompts.splitlines() if line.strip())
    size = {name: values[name] for name in ("num_frames", "height", "width")}
    family, variant = family_of(base.variant)
    problems = family.latent(variant).problems(**size)
    if not lines:
        problems.append(Problem("prompts is empty", "every line is one video", "Write at least one prompt, or leave Previews out."))
    clip_folder = values.get("clip_folder", "").strip().strip('"') or None  # Windows copies paths with quotes
    if clip_folder:
        problems += find_clip_problems("clip_folder", Path(clip_folder).expanduser())
    images = [str(store_clip(_image_folder(), image_HWC[None], fps=1.0)) for image_HWC in _images(values)]
    problems += image_problems("images", images, len(lines), variant, family.first_frame(variant))
    if problems:
        raise DatasetError(problems, subject="The previews")
    own = {name: values[name] or None for name in ("sampling_steps", "cfg", "shift")}
    measured_and_given = {"clip_folder": clip_folder, "images": tuple(images)}
    fields = {name: values[name] for name in ("every_steps", "seed")}
    return {**fields, **own, **size, "prompts": lines, "negative": negative, **measured_and_given}


def _images(values: Mapping[str, Any]) -> Sequence[Any]:
    """The images that are wired to the node, each H x W x 3."""
    images = values.get("images")
    return () if images is None else images


def _image_folder() -> Path:
    return host.state_folder() / "clips"


def _first_frames(spec: Mapping[str, Any]) -> FirstFrames | None:
    """The images of the previews, one for each prompt."""
    prompts, images = spec["prompts"], [Path(path) for path in spec["images"]]
    images = images * len(prompts) if len(images) == 1 else images
    size = {name: spec[name] for name in ("num_frames", "height", "width")}
    return FirstFrames(prompts, tuple(images), spec["negative"], **size) if images else None


def _told(report: EncodeReport) -> str:
    assert report.encoded is not None
    lines = [f"{len(report.encoded.items)} clips for {report.encoded.variant}", str(report)]
    lines += _rejected_lines([(item.name, item.reason) for item in report.rejected])
    return "\n".join(lines)


def _rejected_lines(rejected: Sequence[tuple[str, str]]) -> list[str]:
    if not rejected:
        return []
    more = len(rejected) - _SHOWN_REJECTED
    lines = [f"{Path(name).as_posix()}: {reason}" for name, reason in rejected[:_SHOWN_REJECTED]]
    return [f"Not used ({len(rejected)}):", *lines, *([f"and {more} more"] if more > 0 else [])]


NODES = [EncodeDataset, Previews]
