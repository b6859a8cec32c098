"""Files of JSON lines that are only ever appended to, and that survive the death of their writer in mid-line.

A line counts when it ends with a newline and is a JSON object; anything else is what a killed writer left, and is
skipped. The next writer starts on a line of its own.
"""

from __future__ import annotations

import errno
import json
import math
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Record = dict[str, Any]


def append(path: Path, record: Mapping[str, Any]) -> None:
    """Add one line. Numbers that JSON lacks (NaN, infinities) are written as null."""
    line = json.dumps(_plain(record), ensure_ascii=False, allow_nan=False).encode() + b"\n"
    with path.open("a+b", buffering=0) as file:
        if file.tell() and _last_byte(file.fileno()) != b"\n":
            line = b"\n" + line
        if file.write(line) < len(line):  # one system call: readers see the whole line or none
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))  # a part of the line did fit


class Writer:
    """One writer's lines, of any files, in their order. What cannot be written now waits for the next line: a run may last days.

    Only the first line must be written at once: a folder that cannot be written to is an error.
    """

    def __init__(self) -> None:
        self._waiting: list[tuple[Path, Mapping[str, Any]]] = []
        self._why = ""
        self._has_begun = False
        self._lock = threading.Lock()

    def append(self, path: Path, record: Mapping[str, Any]) -> str:
        """Add one line, after those that wait. Returns why they had to wait; "" when none did, or when they still do."""
        with self._lock:
            self._waiting.append((path, record))
            try:
                while self._waiting:
                    append(*self._waiting[0])
                    del self._waiting[0]
            except OSError as error:
                if not self._has_begun:
                    self._waiting.clear()
                    raise
                self._why = str(error)
                return ""
            self._has_begun = True
            why, self._why = self._why, ""
            return why


def read(path: Path, since: int = 0) -> tuple[list[Record], int]:
    """The records from byte `since` on, in the order they were written, and the `since` of the next call.

    A file that is missing has no records.
    """
    try:
        with path.open("rb") as file:
            file.seek(since)
            data = file.read()
    except FileNotFoundError:
        return [], 0
    end = data.rfind(b"\n") + 1
    return _records(data[:end]), since + end


def read_tail(path: Path, max_bytes: int = 1 << 14) -> list[Record]:
    """The last records of a file, as many as lie whole in its last `max_bytes` bytes."""
    try:
        with path.open("rb") as file:
            start = max(file.seek(0, os.SEEK_END) - max_bytes, 0)
            file.seek(start)
            data = file.read()
    except FileNotFoundError:
        return []
    first = data.find(b"\n") + 1 if start else 0
    return _records(data[first : data.rfind(b"\n") + 1])


def _last_byte(descriptor: int) -> bytes:
    os.lseek(descriptor, -1, os.SEEK_END)
    return os.read(descriptor, 1)


def _records(data: bytes) -> list[Record]:
    records = []
    for line in data.split(b"\n"):
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
