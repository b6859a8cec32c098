"""What `check` found: as a table, as plain values, and as a block that can be pasted into a bug report."""

from __future__ import annotations

import getpass
import re
import socket
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .lines import Line

_NAME_WIDTH = 26
_PATH = re.compile(r"""(?<!\w)(?:[A-Za-z]:)?[\\/](?:[^\n'"`,;:()]*[\\/])?[^\s'"`,;:()]+""")
"""Names of folders may hold spaces: a path goes on to its last separator."""
_FILE = re.compile(r"""[^\s'"`,;:()/\\]+\.(safetensors|json|toml|pth?|bin|py|log|gguf)\b""")


@dataclass(frozen=True)
class Section:
    title: str
    lines: tuple[Line, ...]


@dataclass(frozen=True)
class Report:
    """All lines by group. `names` are paths and files that a block must not show."""

    sections: tuple[Section, ...]
    names: tuple[str, ...] = ()

    @property
    def lines(self) -> tuple[Line, ...]:
        return tuple(line for section in self.sections for line in section.lines)

    @property
    def failed(self) -> bool:
        return any(line.state == "failed" for line in self.lines)

    def summary(self) -> str:
        """How many lines there are of each state."""
        counts = Counter(line.state for line in self.lines)
        return ", ".join(f"{counts[state]} {state}" for state in ("ok", "slow", "failed", "skipped") if counts[state])

    def table(self) -> str:
        return "\n".join(text for section in self.sections for text in (section.title, *map(as_text, section.lines)))

    def block(self) -> str:
        """The table without any path or name of a user, a machine or a file."""
        text = f"{self.table()}\n{self.summary()}"
        return f"```\n{without_names(text, self.names)}\n```"

    def values(self) -> dict[str, Any]:
        """For other programs, as the block: without names."""
        sections = [{"title": section.title, "lines": [self._values_of(line) for line in section.lines]} for section in self.sections]
        return {"sections": sections}

    def _values_of(self, line: Line) -> dict[str, str]:
        return {name: without_names(value, self.names) for name, value in asdict(line).items()}


def as_text(line: Line) -> str:
    """One line of the table, its remedy below it."""
    text = f"  {line.state:<8}{line.name:<{_NAME_WIDTH}} {line.text}"
    return f"{text}\n{'':<10}-> {line.remedy}" if line.remedy and line.state != "ok" else text


def without_names(text: str, names: Iterable[str] = ()) -> str:
    """The text with every path, file name and name of this user and machine replaced."""
    for name in sorted({*names, *_own_names()}, key=len, reverse=True):
        text = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", "...", text)
    return _FILE.sub(r"...\1", _PATH.sub("...", text))


def _own_names() -> set[str]:
    found = {str(Path.home()), Path.home().name, str(Path.cwd())}
    with suppress(OSError, KeyError, ImportError):  # a container's user may have no name
        found.add(getpass.getuser())
    found |= {socket.gethostname(), socket.gethostname().split(".")[0]}
    return {name for name in found if len(name) > 1}
