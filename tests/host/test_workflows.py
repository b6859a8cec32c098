"""The shipped workflows: as described, valid, and good to look at when they are opened."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from comfy_server import Server
from control_graphs import CONTROL_VIDEO
from make_workflows import ROOT, text, workflows

WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))
MODELS = {file["name"]: file["directory"] for path in WORKFLOWS for node in json.loads(path.read_text("utf-8"))["nodes"]
          for file in node["properties"].get("models", [])}  # fmt: skip
TITLE_HEIGHT = 30
SIDEBAR_WIDTH = 48
READABLE_SCALE = 0.5
NOTE_ON_SCREEN = """() => {
  const note = app.graph._nodes.find((node) => node.title === "Start here");
  const { scale, offset } = app.canvas.ds;
  const place = (x, y) => [(x + offset[0]) * scale, (y + offset[1]) * scale];
  const [x, y] = note.pos;
  return [...place(x, y - 30), ...place(x + note.size[0], y + note.size[1]), scale];
}"""
"""Left, top, right and bottom of the note that says what to do first, in pixels of the page, and the page's scale."""


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
    return server


def test_the_files_are_what_is_described(listing: Server):
    described = workflows(listing.object_info())
    assert {path.name for path in WORKFLOWS} == set(described)
    for path in WORKFLOWS:
        assert path.read_text("utf-8") == text(described[path.name])


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_comfy_cli_converts_and_validates_it(path: Path, listing: Server):
    from comfy_cli.cql.engine import Graph
    from comfy_cli.workflow_to_api import convert_ui_to_api

    info = listing.object_info()
    api = convert_ui_to_api(json.loads(path.read_text("utf-8")), info)
    found = Graph.from_object_info(info).validate_workflow(api)
    assert found["errors"] == []
    assert found["valid"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
@pytest.mark.parametrize("front_end", ["listing", "newest_listing"])
def test_a_page_opens_it_as_it_was_meant(path: Path, front_end: str, pages, request: pytest.FixtureRequest):
    from comfy_cli.workflow_to_api import convert_ui_to_api

    server: Server = request.getfixturevalue(front_end)
    workflow = json.loads(path.read_text("utf-8"))
    with pages.open(server) as page:
        page.evaluate("async workflow => { await app.loadGraphData(workflow) }", workflow)
        page.wait_for_timeout(1000)
        api = page.evaluate("async () => (await app.graphToPrompt()).output")
        places = page.evaluate(
            "() => app.graph._nodes.map(node => ({title: node.title, x: node.pos[0], y: node.pos[1], w: node.size[0], h: node.size[1]}))"
        )
        left, top, right, bottom, scale = page.evaluate(NOTE_ON_SCREEN)
        missing = page.evaluate("() => app.graph._nodes.filter(node => node.has_errors).map(node => node.type)")
        assert page.errors == []
    assert missing == []
    assert _inputs(api) == _inputs(convert_ui_to_api(workflow, server.object_info()))
    assert _overlaps(places) == []
    assert left >= SIDEBAR_WIDTH
    assert top >= 0
    assert right <= 1600
    assert bottom <= 900
    assert scale >= READABLE_SCALE


def _inputs(api: dict[str, Any]) -> dict[str, Any]:
    return {number: (node["class_type"], node["inputs"]) for number, node in api.items()}


def _overlaps(places: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Pairs of nodes of which one covers a part of the other, title bars included."""
    boxes = [(item["title"], item["x"], item["y"] - TITLE_HEIGHT, item["x"] + item["w"], item["y"] + item["h"]) for item in places]
    return [
        (one[0], other[0])
        for i, one in enumerate(boxes)
        for other in boxes[i + 1 :]
        if one[1] < other[3] and other[1] < one[3] and one[2] < other[4] and other[2] < one[4]
    ]


def test_the_template_browser_lists_them_with_pictures(listing: Server):
    (names,) = listing.get("/api/workflow_templates").values()
    assert sorted(names) == [path.stem for path in WORKFLOWS]
    for path in WORKFLOWS:
        width, height = _jpeg_size(path.with_suffix(".jpg"))
        assert width >= 400
        assert height >= 300


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
def test_files_to_download_are_the_ones_that_are_chosen(path: Path):
    for node in json.loads(path.read_text("utf-8"))["nodes"]:
        for file in node["properties"].get("models", []):
            assert file["name"] in node["widgets_values"]
            assert file["url"].split("?")[0].endswith("/" + file["name"])
