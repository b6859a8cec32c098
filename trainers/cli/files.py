"""Verbs about files: demo, inspect, dataset, encode, convert."""

from __future__ import annotations

import argparse
import re
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import JobError, Problem, VideoTrainerError
from .verbs import add_verb

if TYPE_CHECKING:
    from ..data.buckets import Geometry
    from ..data.scan import Dataset
    from ..encoders import FirstFrames
    from ..family import Family, Variant
    from ..folder_encoder import EncoderFiles
    from .verbs import Verbs

FORMS = ("native", "diffusers", "kohya")
ENCODER_PARTS = ("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "image_encoder", "image_processor")

_DEFAULT_VARIANT = "wan2.1-t2v-1.3b"


def add_verbs(verbs: Verbs) -> None:
    """Add this module's verbs to the parser."""
    parser = add_verb(verbs, "demo", demo, "train a LoRA on a tiny model that comes with the package, and show what it learnt")
    parser.add_argument("--out", type=Path, default=Path("build/demo"), metavar="DIR", help="where everything is written (build/demo)")
    parser = add_verb(verbs, "inspect", inspect, "say what a model or LoRA file is, from its header")
    parser.add_argument("file", type=Path, metavar="FILE", help="a file, a shard index or a folder")
    parser = add_verb(verbs, "dataset", dataset, "say what a folder of clips would train on, and what is left out and why")
    _add_data_options(parser)
    parser = add_verb(verbs, "encode", encode, "encode clips and captions for training; what is encoded already stays")
    _add_data_options(parser)
    _add_encoder_options(parser)
    _add_preview_options(parser)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (auto)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder that a job names as `encoded`")
    parser = add_verb(verbs, "convert", convert, "write a LoRA file in another form")
    parser.add_argument("source", type=Path, metavar="IN")
    parser.add_argument("target", type=Path, metavar="OUT")
    parser.add_argument("--format", choices=FORMS, required=True, help="native: ComfyUI and diffusers; kohya: lora_unet_ names")
    parser.add_argument("--base", type=Path, help="the transformer it was trained on; only a DoRA from or to diffusers needs it")


def demo(options: argparse.Namespace) -> None:
    """Run the demo into a folder."""
    from ..demo import demo as show

    show.run(options.out)


def inspect(options: argparse.Namespace) -> int:
    """Print what a file is. The exit code is 1 when it cannot be used."""
    from ..inspection import inspect_file

    report = inspect_file(options.file)
    print(report)
    return int(bool(report.problems))


def dataset(options: argparse.Namespace) -> None:
    """Print what a folder would train on."""
    from ..data.buckets import plan_windows
    from ..data.report import report

    family, variant = _model(options, default=True)
    clips = _scan(options)
    print(f"for {variant.title}, at most {options.size[0]}x{options.size[1]} and {options.frames} frames\n")
    print(report(clips, plan_windows(clips, _geometry(options), family.latent(variant))), end="")


def encode(options: argparse.Namespace) -> None:
    """Encode a folder of clips."""
    from ..checkpoint import Checkpoint
    from ..encoders import encode_dataset
    from ..family import detect_vae
    from ..folder_encoder import EncoderFiles, FolderEncoder, needed_parts

    family, variant = _model(options, default=False)
    _check_encode(options, family, variant)
    needed = needed_parts(family, variant)
    files = EncoderFiles.find(options.base, needed, **{name: getattr(options, name) for name in ENCODER_PARTS})
    detect_vae(Checkpoint.open(files.vae, "vae"), family, variant, to_encode=True)
    _check_text_encoder(options, files)
    encoder = FolderEncoder(family, variant, files, options.device)
    prompts = [*options.prompt, *([options.negative] if options.negative else [])]
    first_frames = _first_frames(options, encoder.negative)
    clips = _scan(options)
    done = encode_dataset(clips, _geometry(options), encoder, options.out, prompts=prompts, first_frames=first_frames, progress=Progress())
    for item in done.rejected:
        print(f"not used: {item.name}: {item.reason}")
    if clips.rejected:
        print(f"{len(clips.rejected)} files in {options.folder} are not used; `dataset` says why")
    print(f"{done}\n{options.out}")


def _check_text_encoder(options: argparse.Namespace, files: EncoderFiles) -> None:
    """Raises CheckpointError for a text encoder of another model, when the transformer is known."""
    from ..checkpoint import Checkpoint
    from ..errors import CheckpointError
    from ..family import detect
    from ..text_encoders import encoder_problem

    if not options.transformer:
        return
    found = detect(Checkpoint.open(options.transformer), options.variant)
    paths = [path for path in (files.text_encoder, files.text_encoder_2) if path]
    if problem := encoder_problem(paths, found.family, found.variant, found.config):
        raise CheckpointError(problem)


def _first_frames(options: argparse.Namespace, negative: str) -> FirstFrames | None:
    """The images of the previews; a single one is for every prompt."""
    from ..encoders import FirstFrames

    if not options.image:
        return None
    width, height = options.preview_size or options.size
    images = tuple(options.image) if len(options.image) > 1 else tuple(options.image) * len(options.prompt)
    chosen = negative if options.negative is None else options.negative
    return FirstFrames(tuple(options.prompt), images, chosen, options.preview_frames or options.frames, height, width)


def _check_encode(options: argparse.Namespace, family: Family, variant: Variant) -> None:
    """Raises JobError with what is wrong with the output folder, the device and the images, before any clip is read."""
    from ..condition_problems import image_problems
    from ..device import find_device

    problems: list[Problem] = []
    if options.image:
        images = [str(path) for path in options.image]
        problems += image_problems("--image", images, len(options.prompt), variant, family.first_frame(variant))
        width, height = options.preview_size or options.size
        problems += family.latent(variant).problems(options.preview_frames or options.frames, height, width)
    if options.out.exists() and not options.out.is_dir():
        problems.append(Problem(f"--out is {options.out}, a file", "encoded data are a folder", "Give a new or an earlier folder."))
    if options.out.resolve() == options.folder.resolve():
        problems.append(Problem("--out is the folder of the clips", "what is made must not lie between them", "Give another folder."))
    try:
        find_device(options.device)
    except JobError as error:
        problems += error.problems
    if problems:
        raise JobError(problems, subject="Nothing was encoded")


def convert(options: argparse.Namespace) -> None:
    """Write a LoRA in another form."""
    from ..lora_format import convert as convert_file

    convert_file(options.source, options.target, options.format, options.base)
    print(options.target)


class Progress:
    """Called as progress(done, total, what): one line that is redrawn on a terminal, a line per tenth elsewhere."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._shown: tuple[str, int] = ("", -1)
        self._started = time.monotonic()

    def __call__(self, done: int, total: int, what: str) -> None:
        if self._shown[0] != what:
            self._shown, self._started = (what, -1), time.monotonic()
        tenth = 10 * done // max(total, 1)
        if not self._terminal and tenth == self._shown[1]:
            return
        self._shown = (what, tenth)
        rate = done / max(time.monotonic() - self._started, 1e-3)
        end = "\n" if done == total or not self._terminal else ""
        print(f"{chr(13) if self._terminal else ''}{what}: {done}/{total}  {rate:.1f}/s", end=end, file=sys.stderr, flush=True)


def _add_encoder_options(parser: argparse.ArgumentParser) -> None:
    parts = parser.add_argument_group("encoders (if not those in --base)")
    parts.add_argument("--vae", type=Path, metavar="FILE", help="the VAE's file or folder")
    for name in ENCODER_PARTS[1:]:
        parts.add_argument(f"--{name.replace('_', '-')}", type=Path, metavar="DIR", help=f"the folder of the {name.replace('_', ' ')}")


def _add_preview_options(parser: argparse.ArgumentParser) -> None:
    previews = parser.add_argument_group("previews")
    previews.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="a preview's prompt to encode too (repeatable)")
    previews.add_argument("--negative", metavar="TEXT", help="a negative prompt to encode besides the model's own")
    previews.add_argument(
        "--image",
        action="append",
        default=[],
        type=Path,
        metavar="FILE",
        help="what a preview starts from: one for each prompt, or for all",
    )
    previews.add_argument("--preview-size", type=_size, metavar="WxH", help="the previews' size in pixels, for --image (--size)")
    previews.add_argument("--preview-frames", type=int, metavar="N", help="the previews' frames, for --image (--frames)")


def _add_data_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="DIR", help="clips and images, each with a .txt caption of the same name")
    model = parser.add_argument_group("model (one of these)")
    model.add_argument("--base", type=Path, metavar="DIR", help="a diffusers folder")
    model.add_argument("--transformer", type=Path, metavar="FILE", help="the transformer's file: its header says what it is")
    model.add_argument("--variant", metavar="ID", help="the model's id, such as wan2.1-t2v-1.3b")
    size = parser.add_argument_group("clips")
    size.add_argument(
        "--size", type=_size, default=(832, 480), metavar="WxH", help="pixels; each clip keeps its shape at this area (832x480)"
    )
    size.add_argument("--frames", type=int, default=81, metavar="N", help="frames of a clip, at most (81)")
    size.add_argument("--fps", type=float, metavar="N", help="frames per second (the model's own)")
    size.add_argument("--no-bucketing", action="store_true", help="crop all clips to --size instead of keeping their shape")
    size.add_argument("--max-tokens", type=int, metavar="N", help="clips with more tokens become smaller")
    size.add_argument("--clip-mode", choices=("first", "spread", "all"), default="first", help="which parts of a long video (first)")
    size.add_argument("--clips-per-video", type=int, metavar="N", help="at most so many parts, for spread and all")
    data = parser.add_argument_group("data set")
    data.add_argument("--repeats", type=int, default=1, metavar="N", help="how often an epoch shows each clip (1)")
    data.add_argument("--held-out", type=float, default=0.0, metavar="SHARE", help="share of the clips to measure on, not train on (0)")
    data.add_argument("--seed", type=int, default=0, metavar="N", help="chooses the clips that are held out (0)")


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; a size is WIDTHxHEIGHT in pixels, such as 832x480")
    return int(match[1]), int(match[2])


def _geometry(options: argparse.Namespace) -> Geometry:
    from ..data.buckets import Geometry

    width, height = options.size
    return Geometry(
        width=width,
        height=height,
        num_frames=options.frames,
        fps=options.fps,
        bucketing=not options.no_bucketing,
        max_tokens=options.max_tokens,
        clip_mode=options.clip_mode,
        clips_per_video=options.clips_per_video,
    )


def _scan(options: argparse.Namespace) -> Dataset:
    from ..data.scan import scan_folder

    return scan_folder(options.folder, options.repeats, options.held_out, options.seed, Progress())


def _model(options: argparse.Namespace, default: bool) -> tuple[Family, Variant]:
    """The family and variant that the options name, or, with `default`, the one that most people have."""
    from ..checkpoint import Checkpoint
    from ..family import detect, family_of

    if options.variant and not options.transformer:
        return family_of(options.variant)
    if source := options.transformer or options.base:
        found = detect(Checkpoint.open(source), options.variant)
        return found.family, found.variant
    if not default:
        raise VideoTrainerError(
            str(Problem("no model is given", "clips are encoded for one model", "Give --base, --transformer or --variant."))
        )
    return family_of(_DEFAULT_VARIANT)
