"""Clips with captions, from a folder or from the graph, merged and looked at. What travels on is names and numbers only."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from comfy_api.latest import io, ui

from ..trainers.data.clip_store import store_clip
from ..trainers.data.contact_sheet import contact_sheet
from ..trainers.data.listed import ListedClip, listed_dataset, merge
from ..trainers.data.report import listing, narrow_listing, summary
from ..trainers.data.scan import Dataset, Progress, fingerprint, scan_folder
from ..trainers.data.video import VIDEO_SUFFIXES
from ..trainers.errors import DatasetError, Problem
from ..trainers.family import LatentSpec, family_of
from . import host
from .records import BASE, DATASET, Base
from .schema import schema

if TYPE_CHECKING:
    import torch

DEMO_CLIPS = "moving shapes (built in)"
"""The choice of the clips that the pack makes itself, to try things out."""

REPEATS_TOOLTIP = "How often an epoch shows each clip. Raise it to give a small set more weight beside a large one."
HELD_OUT_TOOLTIP = (
    "The share of clips that are never trained on. The training measures its loss on them, which shows when it only learns by heart. "
    "0.1 is a tenth; 0 trains on all."
)


class DatasetFromFolder(io.ComfyNode):
    """The videos and images of a folder, each with a text file of its name."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "DatasetFromFolder",
            "Dataset from Folder",
            "Videos and images of a folder and its sub-folders, each with its caption in a text file beside it: walk.mp4, walk.txt. "
            "A sub-folder named 3_anything shows its clips three times per epoch.",
            inputs=[
                io.Combo.Input(
                    "folder",
                    [*host.clip_folders(), DEMO_CLIPS],
                    tooltip="A folder inside ComfyUI's input folder. The built-in clips go with the tiny Wan, to try everything out.",
                ),
                io.String.Input(
                    "path",
                    default="",
                    tooltip="Any other folder on this computer; used instead of the choice above when it is not empty.",
                ),
                io.Int.Input("repeats", default=1, min=1, max=1000, tooltip=REPEATS_TOOLTIP),
                io.Float.Input("held_out", default=0.0, min=0.0, max=0.5, step=0.05, tooltip=HELD_OUT_TOOLTIP),
            ],
            outputs=[
                DATASET.Output("dataset", tooltip="The clips and their captions, for the other Video Trainer nodes."),
                io.String.Output("report", tooltip="What was found, and every file that is not used with the reason."),
            ],
        )

    @classmethod
    def validate_inputs(cls, folder: str | None = None, path: str | None = None) -> bool | str:
        if path is None:  # it comes over a wire and is known only when the node runs
            return True
        if path.strip():
            found = _own_folder(path)
            return found.is_dir() or str(_no_folder(str(found), "Check the path."))
        if folder in (None, DEMO_CLIPS, *host.clip_folders()):
            return True
        remedy = f"Make the folder {folder} in ComfyUI's input folder and put clips with their captions into it, or choose another one."
        return str(_no_folder(f"{folder}, in ComfyUI's input folder,", remedy))

    @classmethod
    def fingerprint_inputs(cls, folder: str | None, path: str | None, repeats: int, held_out: float) -> str | float:
        if folder is None or path is None:
            return float("nan")
        return fingerprint(_folder(folder, path))

    @classmethod
    def execute(cls, folder: str, path: str, repeats: int, held_out: float) -> io.NodeOutput:
        dataset = scan_folder(_folder(folder, path), repeats, held_out, progress=_progress())
        report = summary(dataset)
        return io.NodeOutput(dataset, report, ui=ui.PreviewText(report))


def _folder(choice: str, path: str) -> Path:
    """The folder that is meant; the built-in clips are written when they are not there yet."""
    if path.strip():
        return _own_folder(path)
    if choice == DEMO_CLIPS:
        from ..trainers.demo import demo

        demo.write_clips(host.state_folder() / "demo_clips")
        return host.state_folder() / "demo_clips"
    return host.clip_folders().get(choice) or host.input_folder() / choice


def _own_folder(path: str) -> Path:
    """A folder as people write it: with the quotes of "Copy as path", with ~, or below the input folder."""
    return host.input_folder() / Path(path.strip().strip("\"'").strip()).expanduser()


def _no_folder(name: str, remedy: str) -> Problem:
    return Problem(f"{name} is no folder", "a data set is a folder of clips", remedy)


def _progress() -> Progress:
    """A bar on the node; cancelling the prompt ends it."""
    bar = host.progress()

    def show(done: int, total: int, what: str) -> None:
        host.stop_if_cancelled()
        bar(done, total, what)

    return show


class DatasetFromClips(io.ComfyNode):
    """Clips that the graph itself loads or makes."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "DatasetFromClips",
            "Dataset from Clips",
            "Videos and images of the graph with their captions: of loaders, of lists, or made by other nodes. A video file is used where "
            "it lies; frames are written once, without loss, into ComfyUI's user folder.",
            inputs=[
                io.Video.Input("videos", optional=True, tooltip="A video or a list of videos."),
                io.Image.Input(
                    "images", optional=True, tooltip="An image or a list of them: each batch is one clip, a single image a still."
                ),
                io.String.Input(
                    "captions",
                    default="",
                    tooltip="What the clips show: one text for all, or a list with one for each (the videos first, then the images).",
                ),
                io.Float.Input(
                    "fps", default=16.0, min=1.0, max=240.0, step=0.01, tooltip="Frames a second of `images`. A video knows its own."
                ),
                io.Int.Input("repeats", default=1, min=1, max=1000, tooltip=REPEATS_TOOLTIP),
                io.Float.Input("held_out", default=0.0, min=0.0, max=0.5, step=0.05, tooltip=HELD_OUT_TOOLTIP),
            ],
            outputs=[
                DATASET.Output("dataset", tooltip="The clips and their captions, for the other Video Trainer nodes."),
                io.String.Output("report", tooltip="What the clips are, and every one that is not used with the reason."),
            ],
            is_input_list=True,
        )

    @classmethod
    def execute(
        cls,
        captions: list[str],
        fps: list[float],
        repeats: list[int],
        held_out: list[float],
        videos: list[Any] | None = None,
        images: list[torch.Tensor] | None = None,
    ) -> io.NodeOutput:
        listed = [ListedClip(f"video {number}", partial(_video_file, video)) for number, video in enumerate(videos or [], 1)]
        listed += [ListedClip(f"images {number}", partial(_kept, batch, fps[0])) for number, batch in enumerate(images or [], 1)]
        dataset = listed_dataset(listed, captions, repeats[0], held_out[0], progress=_progress())
        report = summary(dataset)
        return io.NodeOutput(dataset, report, ui=ui.PreviewText(report))


def _video_file(video: Any) -> Path:
    """The file of a VIDEO, or one with its frames when it is not a whole file that the training can read."""
    path = host.whole_file(video)
    if path and path.suffix.lower() in VIDEO_SUFFIXES:
        return path
    components = video.get_components()
    return _kept(components.images, float(components.frame_rate))


def _kept(images_FHWC: torch.Tensor, fps: float) -> Path:
    return store_clip(host.state_folder() / "clips", images_FHWC, fps)


class MergeDatasets(io.ComfyNode):
    """Several data sets as one, each with its own weight."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        names = ("dataset_1", "dataset_2", "dataset_3", "dataset_4")
        datasets = [DATASET.Input(name, optional=i > 1, tooltip=f"Clips of the {_ORDINALS[i]} data set.") for i, name in enumerate(names)]
        repeats = [
            io.Int.Input(
                f"repeats_{i + 1}",
                default=1,
                min=1,
                max=1000,
                tooltip=f"How many times more often an epoch shows the clips of the {ordinal} data set than it says itself.",
            )
            for i, ordinal in enumerate(_ORDINALS)
        ]
        return schema(
            "MergeDatasets",
            "Merge Datasets",
            "Several data sets as one. Raise the repeats of a small one so that it counts as much as a large one.",
            inputs=[*datasets, *repeats],
            outputs=[
                DATASET.Output("dataset", tooltip="All clips, for the other Video Trainer nodes."),
                io.String.Output("report", tooltip="What the merged data set holds."),
            ],
        )

    @classmethod
    def execute(
        cls,
        dataset_1: Dataset,
        dataset_2: Dataset,
        repeats_1: int,
        repeats_2: int,
        repeats_3: int,
        repeats_4: int,
        dataset_3: Dataset | None = None,
        dataset_4: Dataset | None = None,
    ) -> io.NodeOutput:
        pairs = [(dataset_1, repeats_1), (dataset_2, repeats_2), (dataset_3, repeats_3), (dataset_4, repeats_4)]
        merged = merge([(dataset, repeats) for dataset, repeats in pairs if dataset is not None])
        report = summary(merged)
        return io.NodeOutput(merged, report, ui=ui.PreviewText(report))


class InspectDataset(io.ComfyNode):
    """Looks at a data set: a picture of its clips and a table."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "InspectDataset",
            "Inspect Dataset",
            "A contact sheet and a table of the clips with their captions, to see what the training will see. "
            "With a base model also how long and how large the clips can be for it.",
            inputs=[
                DATASET.Input("dataset", tooltip="The clips to look at; handed on unchanged."),
                io.Int.Input("first_clip", default=1, min=1, max=1_000_000, tooltip="The number of the first clip to show, to page on."),
                io.Int.Input("max_clips", default=8, min=1, max=64, tooltip="The most clips to show at once."),
                BASE.Input("base", optional=True, tooltip="The model, to see which lengths and sizes its rules allow for each clip."),
            ],
            outputs=[
                DATASET.Output("dataset", tooltip="The same data set."),
                io.Image.Output("contact_sheet", tooltip="First, middle and last frame of each clip, with its caption."),
                io.String.Output("report", tooltip="What the data set holds, and a table of the clips that are shown."),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, dataset: Dataset, first_clip: int, max_clips: int, base: Base | None = None) -> io.NodeOutput:
        import torch

        total = len(dataset.clips)
        if first_clip > total:
            raise DatasetError(Problem(f"first_clip is {first_clip}", f"the data set has {total} clips", f"Use 1 to {total}."))
        shown = dataset.clips[first_clip - 1 : first_clip - 1 + max_clips]
        sheet_BHWC = torch.from_numpy(contact_sheet(shown, first_clip, total)).float()[None] / 255
        page = (dataset, first_clip, max_clips, _rules(base) if base else None)
        both = ui.PreviewImage(sheet_BHWC, cls=cls).as_dict() | ui.PreviewText(narrow_listing(*page)).as_dict()
        return io.NodeOutput(dataset, sheet_BHWC, listing(*page), ui=both)


def _rules(base: Base) -> LatentSpec:
    family, variant = family_of(base.variant)
    return family.latent(variant)


_ORDINALS = ("first", "second", "third", "fourth")

NODES = [DatasetFromFolder, DatasetFromClips, MergeDatasets, InspectDataset]
