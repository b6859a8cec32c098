"""The tables in docs/check.md."""

from __future__ import annotations

from pathlib import Path

from trainers.selftest.lines import State

_PAGE = Path(__file__).parents[2] / "docs" / "check.md"
_STATES: tuple[State, ...] = ("ok", "slow", "failed", "skipped")


def lines_of_page(heading: str) -> list[tuple[str, str, str]]:
    """(title, name, state) of each line of the table below a heading."""
    block = _PAGE.read_text("utf-8").split(f"\n### {heading}\n")[1].split("```")[1]
    found, title = [], ""
    for text in block.strip("\n").splitlines():
        state = text[2:10].strip()
        if not text.startswith(" "):
            title = text
        elif state in _STATES:
            found.append((title, text[10:36].strip(), state))
    return found
