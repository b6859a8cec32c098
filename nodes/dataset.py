"""Clips with captions, from a folder or from the graph, merged and looked at. What travels on is names and numbers only."""

from __future__ import annotations

from pathlib import Path

from comfy_api.latest import io, ui

from ..trainers.data.report import summary
from ..trainers.data.scan import Progress, fingerprint, scan_folder
from ..trainers.errors import Problem
from . import host
from .records import DATASET
from .schema import schema

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
        return str(_no_folder(f"{folder}, in ComfyUI's input folder,", "Press R to refresh the lists and choose again."))

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


NODES = [DatasetFromFolder]
