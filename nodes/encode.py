"""Encoding: from clips, captions and prompts to what a training reads, with the VAE and CLIP of the graph."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from comfy_api.latest import io, ui

from ..trainers.adherence import find_clip_problems
from ..trainers.data.buckets import Geometry, plan_windows
from ..trainers.data.cache import Cache
from ..trainers.data.scan import Dataset
from ..trainers.encoders import EncodeReport, all_latents_cached, all_texts_cached, encode_dataset, encode_prompts, needed_texts
from ..trainers.errors import DatasetError, Problem
from ..trainers.family import family_of
from . import host, loaders
from .graph_encoder import GraphEncoder, Known
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
        known, cache = _known(cls.hidden), _cache()
        encoder = GraphEncoder(base, known=known)
        plan = plan_windows(dataset, _geometry(values), encoder.latent)
        needed = []
        if known.vae is None or not all_latents_cached(plan, encoder.identity_vae, cache):
            needed.append("vae")
        if known.text is None or not all_texts_cached(needed_texts(encoder.negative, (), plan), encoder.identity_text, cache):
            needed.append("clip")
        return needed

    @classmethod
    def execute(
        cls, dataset: Dataset, base: Base, vae: Any = None, clip: Any = None, clip_vision: Any = None, **values: Any
    ) -> io.NodeOutput:
        encoder = _encoder(cls.hidden, base, vae, clip)
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
                io.Int.Input(
                    "sampling_steps", default=20, min=1, max=200, extra_dict=ADVANCED, tooltip="Steps of the sampler; more take longer."
                ),
                io.Float.Input(
                    "cfg",
                    default=5.0,
                    min=1.0,
                    max=30.0,
                    step=0.5,
                    extra_dict=ADVANCED,
                    tooltip="How strongly the prompt is followed. 1: no guidance.",
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
                io.Vae.Input("vae", lazy=True, optional=True, tooltip="The VAE, for models that start from an image."),
                _clip_vision_input(),
                io.Image.Input("images", optional=True, tooltip="First frames, for models that start from an image; one per prompt."),
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
        known = _known(cls.hidden)
        encoder = GraphEncoder(base, known=known)
        texts = needed_texts(encoder.negative, (negative, *spec["prompts"]))
        return [] if known.text and all_texts_cached(texts, encoder.identity_text, _cache()) else ["clip"]

    @classmethod
    def execute(cls, base: Base, prompts: str, negative: str, clip: Any = None, **values: Any) -> io.NodeOutput:
        spec = _preview_spec(base, prompts, negative, values)
        encoder = _encoder(cls.hidden, base, None, clip)
        texts = encode_prompts((negative, *spec["prompts"]), encoder, _cache(), host.progress(), host.cancelled)
        if texts is None:
            raise host.Interrupted
        return io.NodeOutput(PreviewSettings(base.family, base.variant, texts, spec))


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


def _clip_vision_input() -> Any:
    return io.ClipVision.Input(
        "clip_vision", lazy=True, optional=True, tooltip="The image encoder, for models that look at a first frame with one."
    )


def _fingerprint() -> str:
    """Changes when what was encoded is gone, so that a user who deletes it finds it made again."""
    folder = host.encoded_folder()
    there = [(folder / name).is_dir() for name in ("versions", "cache/latents", "cache/text")]
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
    """The fields of `trainers.job.PreviewSpec`. Raises DatasetError with everything that is wrong with them."""
    lines = tuple(line.strip() for line in prompts.splitlines() if line.strip())
    size = {name: values[name] for name in ("num_frames", "height", "width")}
    family, variant = family_of(base.variant)
    problems = family.latent(variant).problems(**size)
    if not lines:
        problems.append(Problem("prompts is empty", "every line is one video", "Write at least one prompt, or leave Previews out."))
    clip_folder = values.get("clip_folder", "").strip().strip('"') or None  # Windows copies paths with quotes
    if clip_folder:
        problems += find_clip_problems("clip_folder", Path(clip_folder).expanduser())
    if problems:
        raise DatasetError(problems, subject="The previews")
    fields = {name: values[name] for name in ("every_steps", "sampling_steps", "cfg", "seed")}
    return {**fields, **size, "prompts": lines, "negative": negative, "shift": values["shift"] or None, "clip_folder": clip_folder}


def _known(hidden: Any) -> Known:
    """What the loaders before the node gave when they last ran."""
    vae, text = (loaders.known_identity(_loader(hidden, name)) for name in ("vae", "clip"))
    return Known(vae, text)


def _loader(hidden: Any, input_id: str) -> str | None:
    return loaders.fingerprint(hidden.prompt, str(hidden.unique_id), input_id)


def _encoder(hidden: Any, base: Base, vae: Any, clip: Any) -> GraphEncoder:
    """The encoder of what is wired to the node; what its loaders gave is noted, so that they can be spared next time."""
    encoder = GraphEncoder(base, vae, clip, _known(hidden))
    for input_id, identity in (("vae", encoder.own.vae), ("clip", encoder.own.text)):
        if identity:
            loaders.note_identity(_loader(hidden, input_id), identity)
    return encoder


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
