"""The lists in the nodes' help pages: `python tests/host/make_node_help.py URL` writes them from a running ComfyUI with the pack.

A page begins with what a person wrote. From `## Inputs` on it repeats the tooltips, which the page shows nowhere else once a
node has a help page. A test holds the files against this.
"""

from __future__ import annotations

import json
import sys
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[2] / "web" / "docs"
PREFIX = "VideoTrainer_"
_LISTS = "\n## Inputs\n"


def help_pages(object_info: Mapping[str, Any]) -> dict[Path, str]:
    """{file: its text} for every node of the pack, the written part as it is now."""
    pages = {}
    for name, info in object_info.items():
        if name.startswith(PREFIX):
            path = DOCS / f"{name}.md"
            written = path.read_text("utf-8").split(_LISTS)[0] if path.is_file() else f"# {info['display_name']}\n"
            pages[path] = written.rstrip() + "\n" + _LISTS + _inputs(info) + "\n## Outputs\n" + _outputs(info)
    return pages


def _inputs(info: Mapping[str, Any]) -> str:
    required, optional = info["input"].get("required", {}), info["input"].get("optional", {})
    lines = []
    for name, (_, *options) in {**required, **optional}.items():
        told = options[0] if options else {}
        default = told.get("default")
        notes = [f"{default}" if default not in (None, "") else "", "optional" if name in optional and default is None else ""]
        lines.append((name, ", ".join(filter(None, notes)), told["tooltip"]))
    return _list(lines)


def _outputs(info: Mapping[str, Any]) -> str:
    return _list([(name, "", told) for name, told in zip(info["output_name"], info["output_tooltips"], strict=True)])


def _list(lines: list[tuple[str, str, str]]) -> str:
    """Not a table: the page shows help in a column of about 300 pixels."""
    return "\n" + "".join(f"- **{name}**{f' ({note})' if note else ''}: {_escaped(told)}\n" for name, note, told in lines)


def _escaped(text: str) -> str:
    """`<name>` is no tag; between backticks Markdown knows that already."""
    parts = text.split("`")
    return "`".join(part if i % 2 else part.replace("<", "\\<") for i, part in enumerate(parts))


if __name__ == "__main__":
    with urllib.request.urlopen(f"{sys.argv[1]}/object_info", timeout=60) as answer:
        for path, text in help_pages(json.load(answer)).items():
            path.write_text(text, "utf-8", newline="\n")
