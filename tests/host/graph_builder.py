"""Workflow files from a description: nodes by their widgets' names, wires by their ends' names.

A saved workflow holds widget values by place and wires by number; written by hand, a forgotten value would shift all after
it. What a node has is read from ComfyUI's `/object_info`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
BYPASSED = 4
TITLE, SLOT, WIDGET, MARGIN = 30, 20, 24, 16
PAGE, FREE = (1600, 900), (84, 98)
"""Pixels of a usual page, and where what covers its upper left corner ends."""
SMALLEST_SCALE, LARGEST_SCALE = 0.55, 0.7
_BESIDE = {"control_after_generate": "fixed", "image_upload": "image"}
"""Widgets that the page adds after one with such an option, and what they hold."""


@dataclass
class Node:
    """A node that was placed; its `inputs` are the wires it gets, by name."""

    number: int
    type: str
    position: tuple[int, int]
    size: tuple[int, int]
    values: list[Any]
    slots: list[dict[str, Any]]
    outputs: list[dict[str, Any]]
    mode: int = 0
    title: str = ""
    color: str = ""
    models: Sequence[Mapping[str, str]] = ()
    unfolded: bool = False

    def output(self, name: str) -> int:
        return next(i for i, output in enumerate(self.outputs) if output["name"] == name)


Wire = tuple[Node, str]
"""A node and the name of its output."""


@dataclass
class Graph:
    """A workflow that grows; `json()` is the file."""

    object_info: Mapping[str, Any]
    pack: str
    version: str
    nodes: list[Node] = field(default_factory=list)
    links: list[list[Any]] = field(default_factory=list)
    groups: list[dict[str, Any]] = field(default_factory=list)

    def node(
        self,
        kind: str,
        position: tuple[int, int],
        size: tuple[int, int | None] = (320, None),
        /,
        mode: int = 0,
        title: str = "",
        color: str = "",
        models: Sequence[Mapping[str, str]] = (),
        wires: Mapping[str, Wire] | None = None,
        unfolded: bool = False,
        **widgets: Any,
    ) -> Node:
        """Places a node. `widgets` are the values that are not the default; `unfolded` shows the advanced ones."""
        info = self.object_info[kind]
        inputs = {**info["input"].get("required", {}), **info["input"].get("optional", {})}
        values: list[Any] = []
        slots = []
        rows, folded = 0, False
        for name, spec in inputs.items():
            of, options = _kind(spec)
            if of not in WIDGETS or options.get("forceInput"):
                slots.append({"name": name, "type": of, "link": None})
                continue
            values.append(widgets.pop(name, _default(spec)))
            rows += 0 if options.get("advanced") and not unfolded else 1
            folded = folded or bool(options.get("advanced"))
            values += [value for option, value in _BESIDE.items() if options.get(option)]
        assert not widgets, f"{kind} has no widgets {sorted(widgets)}"
        outputs = [{"name": name, "type": of, "links": []} for name, of in zip(info["output_name"], info["output"], strict=True)]
        width, height = size
        least = TITLE + SLOT * max(len(slots), len(outputs)) + WIDGET * (rows + folded) + MARGIN
        place = position, (width, height or least)
        node = Node(len(self.nodes) + 1, kind, *place, values, slots, outputs, mode, title, color, models, unfolded)
        self.nodes.append(node)
        for name, (source, output) in (wires or {}).items():
            self._wire(source, output, node, name)
        return node

    def note(self, position: tuple[int, int], size: tuple[int, int], text: str, title: str = "") -> None:
        """Places a note in Markdown."""
        node = Node(len(self.nodes) + 1, "MarkdownNote", position, size, [text.strip() + "\n"], [], [], title=title, color="#432")
        self.nodes.append(node)

    def group(self, title: str, left: int, top: int, right: int, bottom: int) -> None:
        """Draws a frame with a title around a part."""
        bounding = [left, top, right - left, bottom - top]
        number = len(self.groups) + 1
        self.groups.append({"id": number, "title": title, "bounding": bounding, "color": "#3f789e", "font_size": 24, "flags": {}})

    def json(self) -> dict[str, Any]:
        """The workflow, as a page saves it."""
        return {
            "id": "00000000-0000-0000-0000-000000000000",
            "revision": 0,
            "last_node_id": len(self.nodes),
            "last_link_id": len(self.links),
            "nodes": [self._node_json(node, order) for order, node in enumerate(self.nodes)],
            "links": self.links,
            "groups": self.groups,
            "config": {},
            "extra": {"ds": self._view()},
            "version": 0.4,
        }

    def _view(self) -> dict[str, Any]:
        """How a page of 1600 x 900 shows all of it, beside its sidebar and below its tabs, if it can still be read then."""
        boxes = [group["bounding"] for group in self.groups]
        boxes += [[node.position[0], node.position[1] - TITLE, node.size[0], node.size[1] + TITLE] for node in self.nodes]
        left, top = (min(box[i] for box in boxes) for i in (0, 1))
        room = [(length - begin - 30) / (max(box[i] + box[i + 2] for box in boxes) - first)
                for i, length, begin, first in ((0, PAGE[0], FREE[0], left), (1, PAGE[1], FREE[1], top))]  # fmt: skip
        scale = round(max(min(*room, LARGEST_SCALE), SMALLEST_SCALE), 2)
        return {"scale": scale, "offset": [round(FREE[0] / scale - left), round(FREE[1] / scale - top)]}

    def _wire(self, source: Node, output: str, target: Node, name: str) -> None:
        place = source.output(output)
        slot = next(i for i, item in enumerate(target.slots) if item["name"] == name)
        number = len(self.links) + 1
        self.links.append([number, source.number, place, target.number, slot, source.outputs[place]["type"]])
        source.outputs[place]["links"].append(number)
        target.slots[slot]["link"] = number

    def _node_json(self, node: Node, order: int) -> dict[str, Any]:
        ours = node.type.startswith("VideoTrainer_")
        properties: dict[str, Any] = {}
        if node.type != "MarkdownNote":
            properties = {
                "Node name for S&R": node.type,
                "cnr_id": self.pack if ours else "comfy-core",
                "ver": self.version if ours else "0.8.0",
            }
        if node.models:
            properties["models"] = list(node.models)
        return {
            "id": node.number,
            "type": node.type,
            "pos": list(node.position),
            "size": list(node.size),
            "flags": {},
            "order": order,
            "mode": node.mode,
            **({"title": node.title} if node.title else {}),
            "inputs": node.slots,
            "outputs": node.outputs,
            "properties": properties,
            "widgets_values": node.values,
            **({"showAdvanced": True} if node.unfolded else {}),
            **({"color": node.color, "bgcolor": "#653"} if node.type == "MarkdownNote" else {}),
        }


def _kind(spec: Sequence[Any]) -> tuple[str, Mapping[str, Any]]:
    """The type of an input, and its options; a list of choices is a COMBO."""
    options = spec[1] if len(spec) > 1 else {}
    return ("COMBO" if isinstance(spec[0], list) else spec[0]), options


def _default(spec: Sequence[Any]) -> Any:
    kind, options = _kind(spec)
    if "default" in options:
        return options["default"]
    if kind == "COMBO":
        choices = spec[0] if isinstance(spec[0], list) else options["options"]
        return choices[0] if choices else ""
    return {"INT": 0, "FLOAT": 0.0, "STRING": "", "BOOLEAN": False}[kind]
