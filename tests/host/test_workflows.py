"""The shipped workflows: as described, valid, and good to look at when they are opened."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from comfy_server import Server
from control_graphs import CONTROL_VIDEO
from make_workflows import ROOT, text, workflows
from sampling_parts import FIRST_FRAME

from trainers.flow import shifted

WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))
MODELS = {file["name"]: file["directory"] for path in WORKFLOWS for node in json.loads(path.read_text("utf-8"))["nodes"]
          for file in node["properties"].get("models", [])}  # fmt: skip
SIDEBAR_WIDTH = 48
READABLE_SCALE = 0.5
LARGEST_PICTURE_BYTES = 60_000
AS_SEEN = """async (workflow) => {
  await app.loadGraphData(workflow);
  const sizes = () => JSON.stringify(app.graph._nodes.map((node) => [...node.pos, ...node.size]));
  for (let last = "", same = 0; same < 4; last = sizes()) {
    await new Promise((done) => setTimeout(done, 100));
    same = sizes() === last ? same + 1 : 0;
  }
  const box = (title, [x, y], [width, height]) => [title, x, y, x + width, y + height];
  const note = app.graph._nodes.find((node) => node.title === "Start here");
  const { scale, offset } = app.canvas.ds;
  return {
    api: (await app.graphToPrompt()).output,
    nodes: app.graph._nodes.map((node) => box(node.title, [node.pos[0], node.pos[1] - 30], [node.size[0], node.size[1] + 30])),
    groups: app.graph._groups.map((group) => box(group.title, group._pos, group._size)),
    note: box("", [note.pos[0], note.pos[1] - 30], [note.size[0], note.size[1] + 30]).slice(1).map((x, i) => (x + offset[i % 2]) * scale),
    scale,
    missing: app.graph._nodes.filter((node) => node.has_errors).map((node) => node.type),
  };
}"""
"""Opens a workflow and waits until its nodes have their sizes. A box is a title, left, top, right, bottom; a node's title bar is in it."""

Box = tuple[str, float, float, float, float]


@pytest.fixture(scope="module")
def listing(make_server) -> Server:
    """A ComfyUI whose lists have every file that the workflows name."""
    return _with_models(make_server())


@pytest.fixture(scope="module")
def newest_listing(newest_server) -> Server:
    return _with_models(newest_server)


def _with_models(server: Server) -> Server:
    for name, directory in MODELS.items():
        path = server.base_directory / "models" / directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (server.base_directory / "input" / "my_clips").mkdir(exist_ok=True)
    (server.base_directory / "input" / CONTROL_VIDEO).touch()
    (server.base_directory / "input" / FIRST_FRAME).touch()
    return server


def test_the_files_are_what_is_described(listing: Server):
    described = workflows(_info(listing))
    assert {path.name for path in WORKFLOWS} == set(described)
    for path in WORKFLOWS:
        assert path.read_text("utf-8") == text(described[path.name])


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_comfy_cli_converts_and_validates_it(path: Path, listing: Server):
    pytest.importorskip("comfy_cli", reason="validation needs comfy-cli (requirements-test.txt)")
    from comfy_cli.cql.engine import Graph
    from comfy_cli.workflow_to_api import convert_ui_to_api

    info = _info(listing)
    api = convert_ui_to_api(json.loads(path.read_text("utf-8")), info)
    found = Graph.from_object_info(info).validate_workflow(api)
    assert found["errors"] == []
    assert found["valid"]


@pytest.fixture(scope="module")
def opened(pages, request: pytest.FixtureRequest) -> Iterator[Callable[[str], tuple[Server, Any]]]:
    """The server of that name and a page of it, one for all workflows."""
    with ExitStack() as stack:
        there: dict[str, tuple[Server, Any]] = {}

        def open_once(name: str) -> tuple[Server, Any]:
            if name not in there:
                server = request.getfixturevalue(name)
                there[name] = server, stack.enter_context(pages.open(server))
            return there[name]

        yield open_once


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
@pytest.mark.parametrize("front_end", [pytest.param("listing", marks=pytest.mark.slow), "newest_listing"])
def test_a_page_opens_it_as_it_was_meant(path: Path, front_end: str, opened: Callable[[str], tuple[Server, Any]]):
    from comfy_cli.workflow_to_api import convert_ui_to_api

    server, page = opened(front_end)
    workflow = json.loads(path.read_text("utf-8"))
    page.errors.clear()
    seen = page.evaluate(AS_SEEN, workflow)
    assert page.errors == []
    assert seen["missing"] == []
    assert _inputs(seen["api"]) == _inputs(convert_ui_to_api(workflow, _info(server)))
    assert _overlaps(seen["nodes"]) == []
    assert _overlaps(seen["groups"]) == []
    assert _outside(seen["nodes"], seen["groups"]) == ["Start here"]
    left, top, right, bottom = seen["note"]
    assert left >= SIDEBAR_WIDTH
    assert top >= 0
    assert right <= 1600
    assert bottom <= 900
    assert seen["scale"] >= READABLE_SCALE


@cache
def _info(server: Server) -> dict[str, Any]:
    return server.object_info()


def _inputs(api: dict[str, Any]) -> dict[str, Any]:
    return {number: (node["class_type"], node["inputs"]) for number, node in api.items()}


def _overlaps(boxes: list[Box]) -> list[tuple[str, str]]:
    """Pairs of which one covers a part of the other."""
    return [
        (one[0], other[0])
        for one, other in combinations(boxes, 2)
        if one[1] < other[3] and other[1] < one[3] and one[2] < other[4] and other[2] < one[4]
    ]


def _outside(boxes: list[Box], frames: list[Box]) -> list[str]:
    """Those that no frame holds as a whole."""

    def holds(frame: Box, box: Box) -> bool:
        return frame[1] <= box[1] and frame[2] <= box[2] and box[3] <= frame[3] and box[4] <= frame[4]

    return [box[0] for box in boxes if not any(holds(frame, box) for frame in frames)]


def test_the_template_browser_lists_them_with_pictures(listing: Server):
    (names,) = listing.get("/api/workflow_templates").values()
    assert sorted(names) == [path.stem for path in WORKFLOWS]
    for path in WORKFLOWS:
        width, height = _jpeg_size(path.with_suffix(".jpg"))
        assert width >= 400
        assert height >= 300
        assert path.with_suffix(".jpg").stat().st_size < LARGEST_PICTURE_BYTES


def _jpeg_size(path: Path) -> tuple[int, int]:
    """(width, height) by the frame header."""
    data = path.read_bytes()
    assert data[:2] == b"\xff\xd8", f"{path.name} is no JPEG"
    place = 2
    while data[place + 1] not in (0xC0, 0xC1, 0xC2):
        place += 2 + struct.unpack(">H", data[place + 2 : place + 4])[0]
    height, width = struct.unpack(">HH", data[place + 5 : place + 9])
    return width, height


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_every_chosen_file_has_its_link_and_stands_in_the_note(path: Path):
    nodes = json.loads(path.read_text("utf-8"))["nodes"]
    (note,) = (node["widgets_values"][0] for node in nodes if node.get("title") == "Start here")
    for node in nodes:
        links = {file["name"]: file for file in node["properties"].get("models", [])}
        assert {value for value in node["widgets_values"] if str(value).endswith(".safetensors")} == set(links)
        for name, file in links.items():
            assert file["url"].startswith("https://huggingface.co/")
            assert file["url"].split("?")[0].endswith("/" + name)
            assert f"[{name}]({file['url']}) in `models/{file['directory']}`" in note


def test_the_readme_lists_them():
    readme = (ROOT / "README.md").read_text("utf-8")
    assert [path.stem for path in WORKFLOWS if f"`{path.stem}`" not in readme] == []


@pytest.mark.parametrize(("name", "boundary"), [("wan22_a14b_t2v", 0.875), ("wan22_a14b_i2v", 0.9)])
def test_two_experts_switch_at_the_boundary_that_they_are_trained_with(name: str, boundary: float):
    nodes = json.loads((ROOT / "workflows" / f"{name}.json").read_text("utf-8"))["nodes"]
    high, low = (node["widgets_values"] for node in nodes if node["type"] == "KSamplerAdvanced")
    (shift,) = {node["widgets_values"][0] for node in nodes if node["type"] == "ModelSamplingSD3"}
    steps, switch = high[3], high[8]
    levels = [shifted((1000 - 1000 * i // steps) / 1000, shift) for i in range(steps)]  # scheduler "simple"
    assert low[7] == switch
    assert levels[switch - 1] >= boundary > levels[switch]
