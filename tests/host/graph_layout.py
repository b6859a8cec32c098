"""Where the nodes of a workflow stand: in columns, inside titled frames, none over another."""

from __future__ import annotations

from typing import Any

from graph_builder import Graph, Node

NOTE_TOP = 40
_BORDER, _HEAD, _BETWEEN = 20, 60, 44
"""Around the nodes of a frame, above the first one, and from a node to the next one (its title bar included)."""


class Step:
    """A frame with a title in which nodes stand one below the other, in one column or several."""

    def __init__(self, graph: Graph, title: str, left: int, top: int, width: int = 400) -> None:
        self._graph, self._title = graph, title
        self.left, self.top, self.right, self.bottom = left, top, left + width, top + _HEAD
        self._node_left, self._node_top, self._node_width = left + _BORDER, top + _HEAD, width - 2 * _BORDER

    def node(self, kind: str, height: int | None = None, /, **more: Any) -> Node:
        """Places a node below the last one; see `Graph.node`."""
        node = self._graph.node(kind, (self._node_left, self._node_top), (self._node_width, height), **more)
        self._below(node.position[1] + node.size[1])
        return node

    def note(self, height: int, text: str, title: str) -> None:
        """Places a note below the last node."""
        self._graph.note((self._node_left, self._node_top), (self._node_width, height), text, title)
        self._below(self._node_top + height)

    def column(self, width: int = 360) -> None:
        """The next node stands at the top again, beside the others."""
        self._node_left, self._node_top, self._node_width = self.right, self.top + _HEAD, width
        self.right += width + _BORDER

    def _below(self, bottom: int) -> None:
        self.bottom = max(self.bottom, bottom + _BORDER)
        self._node_top = bottom + _BETWEEN

    def frame(self, bottom: int | None = None) -> int:
        """Draws the frame, down to `bottom` when that is lower; returns where it ends."""
        end = max(self.bottom, bottom or 0)
        self._graph.group(self._title, self.left, self.top, self.right, end)
        return end


def frame_row(*steps: Step) -> int:
    """Draws the frames of steps that stand side by side, all down to the same line; returns that line."""
    bottom = max(step.bottom for step in steps)
    for step in steps:
        step.frame(bottom)
    return bottom
