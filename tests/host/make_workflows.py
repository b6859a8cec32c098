"""The shipped workflows, described: `python tests/host/make_workflows.py URL` writes them from a running ComfyUI with the pack.

A test holds the files in `workflows/` against this description. `picture_workflows.py` makes their pictures.
"""

from __future__ import annotations

import json
import sys
import tomllib
import urllib.request
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from control_graphs import CONTROL
from graph_builder import Graph
from sampling_graphs import SAMPLING
from tiny_graph import draw_tiny_wan
from training_graphs import TRAINING

ROOT = Path(__file__).parents[2]


def workflows(object_info: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """{file name: workflow} of all that are shipped."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"]
    made = {}
    for name, draw in _drawn().items():
        graph = Graph(object_info, "video-trainer", version)
        draw(graph)
        made[f"{name}.json"] = graph.json()
    return made


def _drawn() -> dict[str, Callable[[Graph], None]]:
    training = {name: kind.draw for name, kind in TRAINING.items()}
    sampling = {name: partial(kind.draw, name=name) for name, kind in SAMPLING.items()}
    return {**training, **sampling, **CONTROL, "tiny_wan_train_and_sample": draw_tiny_wan}


def text(workflow: Mapping[str, Any]) -> str:
    return json.dumps(workflow, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    with urllib.request.urlopen(f"{sys.argv[1]}/object_info") as answer:
        info = json.load(answer)
    for file_name, content in workflows(info).items():
        (ROOT / "workflows" / file_name).write_text(text(content), encoding="utf-8", newline="\n")
        print(file_name)
