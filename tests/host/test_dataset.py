"""Data sets in a running ComfyUI: from folders, from what its own loaders give, merged, and looked at."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from comfy_server import GraphError, Server
from installation import PACK, ComfyUI

from trainers.data.video import probe, read_window
from trainers.demo import world

Graph = dict[str, dict[str, Any]]
SHAPES, TINY = "moving shapes (built in)", "tiny Wan (built in)"


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def from_folder(folder: str = SHAPES, path: str = "", repeats: int = 1, held_out: float = 0.0) -> dict[str, Any]:
    return node("VideoTrainer_DatasetFromFolder", folder=folder, path=path, repeats=repeats, held_out=held_out)


def from_clips(captions: Any = "a clip", fps: Any = 16.0, repeats: int = 1, held_out: float = 0.0, **clips: Any) -> dict[str, Any]:
    return node("VideoTrainer_DatasetFromClips", captions=captions, fps=fps, repeats=repeats, held_out=held_out, **clips)


def inspected(dataset: dict[str, Any], first_clip: int = 1, max_clips: int = 8, **more: dict[str, Any]) -> Graph:
    inputs: dict[str, Any] = {"dataset": ["dataset", 0], "first_clip": first_clip, "max_clips": max_clips}
    inputs |= {"base": ["base", 0]} if "base" in more else {}
    return {
        "dataset": dataset,
        "inspect": node("VideoTrainer_InspectDataset", **inputs),
        "told": node("PreviewAny", source=["inspect", 2]),  # the whole report; the node itself shows less
        **more,
    }


def run(server: Server, graph: Graph) -> str:
    """The report of the node `inspect`."""
    return server.prompt(graph)["outputs"]["told"]["text"][0]


def refusal(server: Server, graph: Graph) -> str:
    """What ComfyUI says about a graph that cannot run."""
    with pytest.raises(GraphError) as caught:
        server.prompt(graph)
    return str(caught.value)


def write_stills(folder: Path, colours: dict[str, tuple[int, int, int]]) -> None:
    """For each name a PNG of that colour, each wider than the one before, with a caption."""
    folder.mkdir()
    for index, (name, colour) in enumerate(colours.items()):
        pixels = np.full((32, 32 + 16 * index, 3), colour, np.uint8)
        with av.open(str(folder / f"{name}.png"), "w", format="image2") as container:
            stream = container.add_stream("png", rate=1)
            stream.height, stream.width, stream.pix_fmt = *pixels.shape[:2], "rgb24"
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        (folder / f"{name}.txt").write_text(f"all {name}")


def cached_nodes(entry: dict[str, Any]) -> set[str]:
    return {name for message, content in entry["status"]["messages"] if message == "execution_cached" for name in content["nodes"]}


@pytest.fixture
def clips(server: Server) -> Iterator[Path]:
    """Three clips with captions in ComfyUI's input folder, gone after the test."""
    folder = server.base_directory / "input" / "my clips" / "2_twice"
    world.write_clips(folder, world.random_scenes(3, seed=1))
    yield folder
    shutil.rmtree(folder.parent)


@pytest.fixture
def kept(server: Server) -> Path:
    """Where clips of the graph are written; empty at first."""
    folder = server.base_directory / "user" / "__video_trainer" / "clips"
    shutil.rmtree(folder, ignore_errors=True)
    return folder


# From a folder


def test_the_built_in_clips_are_there_at_once_and_written_once(server: Server):
    report = run(server, inspected(from_folder(held_out=0.1)))
    assert report.startswith("64 videos (36.0 seconds), 0 images\n")
    folder = server.base_directory / "user" / "__video_trainer" / "demo_clips"
    written = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    run(server, inspected(from_folder(repeats=2)))
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == written


def test_a_changed_folder_is_seen_and_an_unchanged_one_read_once(server: Server, clips: Path):
    assert {"my clips", "my clips/2_twice", SHAPES} <= set(server.choices("VideoTrainer_DatasetFromFolder", "folder"))
    graph = inspected(from_folder("my clips", repeats=3))
    first = server.prompt(graph)
    assert "18 clips per epoch, 0 held out" in first["outputs"]["told"]["text"][0]
    assert first["outputs"]["dataset"]["text"][0].startswith("3 videos")
    assert cached_nodes(server.prompt(graph)) == {"dataset", "inspect", "told"}
    (clips / "001.txt").write_text("something else")
    changed = server.prompt(graph)
    assert cached_nodes(changed) == set()
    assert "2. something else" in changed["outputs"]["told"]["text"][0]
    (clips / "002.mp4").write_bytes((clips / "002.mp4").read_bytes()[:600])
    assert "1 file is not used:\n  2_twice/002.mp4: " in run(server, graph)


def test_a_path_is_taken_as_people_write_it(server: Server, clips: Path):
    for path in (f'  "{clips}" ', f"'{clips}'", str(clips.relative_to(server.base_directory / "input"))):
        assert "3 videos" in run(server, inspected(from_folder(path=path))), path


@pytest.mark.parametrize("asked", [{"path": '"no such/folder"'}, {"folder": "dogs"}])
def test_a_folder_that_is_not_there_is_told_before_anything_runs(server: Server, asked: dict[str, str]):
    told = refusal(server, inspected(from_folder(**asked)))
    assert "is no folder; a data set is a folder of clips." in told
    assert "prompt_outputs_failed_validation" in told


def test_which_folders_can_be_chosen_and_which_videos_are_whole_files(comfyui: ComfyUI, tmp_path: Path):
    for name in ("input/cats/10_red/deep", "input/.hidden", "input/dogs", "extra/dogs", "extra/birds"):
        (tmp_path / name).mkdir(parents=True)
    world.write_clips(tmp_path / "input", world.random_scenes(1, seed=1))
    clip = str(tmp_path / "input" / "000.mp4")
    sources = {"input_folder": str(tmp_path / "input"), "datasets": str(tmp_path / "extra"), "clip": clip}
    found = comfyui.call("clip_sources.py", pack=str(PACK), **sources)
    assert found["folders"] == ["cats", "cats/10_red", "dogs", "birds (datasets)", "dogs (datasets)"]
    assert {kind for kind, path in found["files"].items() if path == clip} == {"file", "not trimmed"}
    assert sum(path is None for path in found["files"].values()) == len(found["files"]) - 2


# From clips


def test_a_video_file_is_used_where_it_lies(server: Server, clips: Path, kept: Path):
    shutil.copy(clips / "000.mp4", server.base_directory / "input" / "walk.mp4")
    report = run(server, inspected(from_clips("a walk", videos=["load", 0]), load=node("LoadVideo", file="walk.mp4")))
    assert "walk.mp4  64x64" in report
    assert "1. a walk" in report
    assert not kept.exists()


def test_frames_of_a_video_are_kept_bit_for_bit_and_once(server: Server, clips: Path, kept: Path):
    shutil.copy(clips / "000.mp4", server.base_directory / "input" / "walk.mp4")
    loaded = {"load": node("LoadVideo", file="walk.mp4"), "frames": node("GetVideoComponents", video=["load", 0])}
    graph = inspected(from_clips(fps=["frames", 2], images=["frames", 0]), **loaded)
    assert "1 video (0.6 seconds), 0 images" in run(server, graph)
    (path,) = kept.iterdir()
    assert probe(path).num_frames == world.NUM_FRAMES
    assert np.array_equal(read_window(path, 0, 9, 16), world.read_clip(clips / "000.mp4"))
    written = path.stat().st_mtime_ns
    made = {"made": node("CreateVideo", images=["frames", 0], fps=["frames", 2])}
    run(server, inspected(from_clips("the same as a video", repeats=2, videos=["made", 0]), **loaded, **made))
    assert [(file, file.stat().st_mtime_ns) for file in kept.iterdir()] == [(path, written)]


def test_a_container_that_the_training_does_not_read_is_kept_as_frames(server: Server, clips: Path, kept: Path):
    frames_FHWC = world.read_clip(clips / "001.mp4")
    with av.open(str(server.base_directory / "input" / "old.avi"), "w") as container:
        stream = container.add_stream("mjpeg", rate=16)
        stream.height, stream.width, stream.pix_fmt = 64, 64, "yuvj444p"
        for pixels in frames_FHWC:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    assert "1 video " in run(server, inspected(from_clips(videos=["load", 0]), load=node("LoadVideo", file="old.avi")))
    (path,) = kept.iterdir()
    assert np.abs(read_window(path, 0, 9, 16).astype(int) - frames_FHWC).mean() < 4


def test_lists_of_the_core_loaders_keep_their_order(server: Server, kept: Path):
    colours = {"red": (200, 0, 0), "green": (0, 200, 0), "blue": (0, 0, 200)}
    write_stills(server.base_directory / "input" / "stills", colours)
    loaded = {"load": node("LoadImageTextDataSetFromFolder", folder="stills")}
    report = run(server, inspected(from_clips(["load", 1], images=["load", 0]), **loaded))
    assert "0 videos (0.0 seconds), 3 images" in report
    table, captions = report.split("\ncaptions\n")
    files = {line.split()[0]: line.split()[1] for line in table.splitlines()[-3:]}
    for number, caption in (line.split(". all ") for line in captions.splitlines()):
        stored = read_window(kept / files[number], 0, 1, 16)[0]
        assert stored[0, 0].tolist() == list(colours[caption]), "a caption is with its own picture"


def test_batches_are_clips_and_the_same_one_twice_is_repeated(server: Server, kept: Path):
    frames = {"one": node("EmptyImage", width=16, height=16, batch_size=10, color=255)}
    parts = {**frames, "parts": node("RebatchImages", images=["one", 0], batch_size=4)}
    report = run(server, inspected(from_clips("blue", repeats=2, images=["parts", 0]), **parts))
    assert "2 videos (0.4 seconds), 0 images" in report, "batches of 4, 4 and 2 frames, the first two the same"
    assert "6 clips per epoch" in report
    assert len(list(kept.iterdir())) == 2


def test_lists_that_do_not_match_are_told_in_one_sentence(server: Server):
    frames = {"frames": node("EmptyImage", width=16, height=16, batch_size=3, color=255)}
    empty = inspected(from_clips("", images=["frames", 0]), **frames)
    assert "the caption is empty; a caption says what is to be seen. Write what the clip shows." in refusal(server, empty)
    assert "no clip is given; a data set needs clips. Connect videos or images." in refusal(server, inspected(from_clips("a clip")))
    write_stills(server.base_directory / "input" / "two", {"red": (200, 0, 0), "blue": (0, 0, 200)})
    stills = {**frames, "parts": node("RebatchImages", images=["frames", 0], batch_size=1)}
    stills["load"] = node("LoadImageTextDataSetFromFolder", folder="two")
    told = refusal(server, inspected(from_clips(["load", 1], images=["parts", 0]), **stills))
    assert "2 captions for 3 clips; every clip has one, or one is for all. Give 3 captions in the order of the clips" in told


# Merged, and looked at


def test_merged_sets_are_inspected_with_the_rules_of_a_model(server: Server, clips: Path):
    graph = inspected(
        node("VideoTrainer_MergeDatasets", dataset_1=["a", 0], dataset_2=["b", 0], repeats_1=5, repeats_2=1, repeats_3=1, repeats_4=1),
        first_clip=3,
        max_clips=2,
        a=from_folder("my clips"),
        b=from_folder(),
        base=node("VideoTrainer_BaseModel", transformer=TINY, variant="read from the file", vae=TINY, text_encoder=TINY),
    )
    outputs = server.prompt(graph)["outputs"]
    report = outputs["told"]["text"][0]
    assert outputs["inspect"]["text"][0].startswith("The model sees 16 frames")
    assert "3  002.mp4" in outputs["inspect"]["text"][0]
    assert "94 clips per epoch, 0 held out" in report  # 3 clips x 2 by their folder x 5, and 64
    assert "The model sees 16 frames a second, 4n+1 frames at once, sides in multiples of 16." in report
    rows = [line.split() for line in report.splitlines()]
    assert ["3", "2_twice/002.mp4", "64x64", "0.56", "9", "16", "10", "9", "9", "64x64"] in rows
    assert ["5", "concept/001.mp4"] not in [row[:2] for row in rows]
    (picture,) = outputs["inspect"]["images"]
    sheet = server.base_directory / "temp" / picture["subfolder"] / picture["filename"]
    assert probe(sheet).width > 1000
    assert read_window(sheet, 0, 1, 1).std() > 10
    graph["inspect"]["inputs"]["first_clip"] = 68
    assert "first_clip is 68; the data set has 67 clips. Use 1 to 67." in refusal(server, graph)
