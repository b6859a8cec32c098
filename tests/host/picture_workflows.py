"""The pictures of the shipped workflows: `python tests/host/picture_workflows.py URL [--opened FOLDER] [NAME ...]`.

Opens each workflow in the page of a running ComfyUI with the pack. Where its lists lack the model files, nodes are marked red:
give that ComfyUI empty files of their names. `--opened` also keeps what a user sees after opening them, to look at.
"""

from __future__ import annotations

import argparse
import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from browser import open_browser
from make_workflows import ROOT

WIDTH, HEIGHT = 960, 600
"""A picture is no larger, in pixels."""
LARGEST_BYTES = 60_000
_SHOWS_VIDEOS = "tiny_wan_train_and_sample"
"""Its picture is not of its graph."""
_ELSEWHERE = {"wan21_train": ROOT / "web" / "docs" / "train_graph.jpg"}
"""Pictures that are also shown elsewhere, larger."""
_VIEW = (2400, 1500)
_SETTLE_MS = 1200
_FIT = """() => {
  const boxes = app.graph._groups.map((group) => [...group._bounding]);
  for (const { pos, size } of app.graph._nodes) boxes.push([pos[0], pos[1] - 30, size[0], size[1] + 30]);
  const left = Math.min(...boxes.map((box) => box[0])) - 15, top = Math.min(...boxes.map((box) => box[1])) - 15;
  const right = Math.max(...boxes.map((box) => box[0] + box[2])) + 15, bottom = Math.max(...boxes.map((box) => box[1] + box[3])) + 15;
  const scale = Math.min(innerWidth / (right - left), innerHeight / (bottom - top));
  app.canvas.ds.scale = scale;
  app.canvas.ds.offset = [-left, -top];
  app.canvas.show_info = false;
  app.canvas.setDirty(true, true);
  for (const child of document.querySelectorAll("body *")) child.style.visibility = "hidden";
  for (const shown of document.querySelectorAll("#graph-canvas, .dom-widget, .dom-widget *")) shown.style.visibility = "visible";
  return [(right - left) * scale, (bottom - top) * scale];
}"""
"""Shows the whole graph and nothing else; gives its width and height on the screen."""


class Running:
    """A ComfyUI that someone has started."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")

    def post(self, path: str, body: Any) -> None:
        headers = {"Content-Type": "application/json"}
        urllib.request.urlopen(urllib.request.Request(self.url + path, json.dumps(body).encode(), headers)).close()


def pictures(server: Running, names: list[str], opened: Path | None) -> Iterator[tuple[str, bytes]]:
    """A PNG of each graph, by name; also as a page of 1600 x 900 shows it first, kept in `opened`."""
    with open_browser() as pages, pages.open(server) as page:
        for name in names:
            page.set_viewport_size({"width": 1600, "height": 900})
            page.evaluate("async workflow => { await app.loadGraphData(workflow) }", json.loads(_file(name, "json").read_text("utf-8")))
            page.wait_for_timeout(_SETTLE_MS)
            if opened:
                page.screenshot(path=opened / f"{name}.png")
            page.set_viewport_size(dict(zip(("width", "height"), _VIEW, strict=True)))
            width, height = page.evaluate(_FIT)
            page.wait_for_timeout(_SETTLE_MS)
            yield name, page.screenshot(clip={"x": 0, "y": 0, "width": width, "height": height})
            page.evaluate("() => { for (const child of document.querySelectorAll('body *')) child.style.visibility = '' }")


def _file(name: str, kind: str) -> Path:
    return ROOT / "workflows" / f"{name}.{kind}"


def jpeg(png: bytes, width: int, height: int, largest_bytes: int) -> bytes:
    """The picture no larger than width x height, in the best quality that fits into so many bytes."""
    import cv2
    import numpy

    image = cv2.imdecode(numpy.frombuffer(png, numpy.uint8), cv2.IMREAD_COLOR)
    scale = min(width / image.shape[1], height / image.shape[0])
    small = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    for quality in range(88, 20, -4):
        data: bytes = cv2.imencode(".jpg", small, [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()
        if len(data) < largest_bytes:
            break
    return data


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("url")
    parser.add_argument("names", nargs="*")
    parser.add_argument("--opened", type=Path)
    given = parser.parse_args()
    wanted = given.names or sorted({path.stem for path in (ROOT / "workflows").glob("*.json")} - {_SHOWS_VIDEOS})
    for made, png in pictures(Running(given.url), wanted, given.opened):
        _file(made, "jpg").write_bytes(jpeg(png, WIDTH, HEIGHT, LARGEST_BYTES))
        if made in _ELSEWHERE:
            _ELSEWHERE[made].write_bytes(jpeg(png, 1600, 1000, 4 * LARGEST_BYTES))
        if given.opened:
            (given.opened / f"{made}_graph.png").write_bytes(png)
        print(made)
