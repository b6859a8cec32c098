"""Reading the prompt: the graph as ComfyUI was asked to run it, {node id: {"class_type", "inputs"}}."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Prompt = Mapping[str, Any]


def class_of(prompt: Prompt | None, node_id: str) -> str:
    """The class of a node; "" for one that is not there."""
    return str((prompt or {}).get(node_id, {}).get("class_type", ""))


def inputs_of(prompt: Prompt | None, node_id: str) -> dict[str, Any]:
    """The inputs of a node: values of widgets, and links."""
    return dict((prompt or {}).get(node_id, {}).get("inputs", {}))


def is_link(value: Any) -> bool:
    """Whether an input is wired, [node id, output index], and not a widget's value."""
    return isinstance(value, (list, tuple)) and len(value) == 2 and isinstance(value[0], str)


def wired_outputs(prompt: Prompt | None, node_id: str) -> frozenset[int]:
    """The outputs of a node that another node takes."""
    links = [value for other in prompt or {} for value in inputs_of(prompt, other).values() if is_link(value)]
    return frozenset(link[1] for link in links if link[0] == node_id)
