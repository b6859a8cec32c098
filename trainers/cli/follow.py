"""Watching a run from outside, by its files: a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Mapping
from typing import TextIO

from ..journal import Record
from ..run import Run
from ..run_status import RunStatus, last_measures

_POLL_SECONDS = 0.25
_PLAIN_SECONDS = 10.0
_PLAIN_SHARE = 0.05
_BAR_WIDTH = 24
_SHORTEST_BAR = 6
_MEASURES = {
    "flicker": "flicker {:.1%}",
    "consistency": "consistency {:.2f}",
    "sharpness": "sharpness {:.0f}",
    "adherence": "fits the prompt {:.2f}",
}
_EXIT_CODES = {"done": 0, "stopped": 3}


def follow(run: Run, out: TextIO | None = None) -> int:
    """Show a run's progress (on standard output) until it has no worker any more, and return the exit code of its outcome."""
    display = _Display(out or sys.stdout)
    _, since = run.follow_events()
    while True:
        status = run.status()
        events, since = run.follow_events(since)
        display.show(status, [text for event in events if (text := _news(event))])
        if status.ended:
            display.close(_outcome(status, run))
            return _EXIT_CODES.get(status.state, 1)
        time.sleep(_POLL_SECONDS)


def one_line(status: RunStatus) -> str:
    """`name  state  step/total  share  loss  it/s  ETA`, what is not known left out."""
    total = status.total_steps
    parts = [status.name, status.state]
    if total:
        parts += [f"{status.step}/{total}", f"{100 * status.step / total:.0f} %"]
    if status.loss is not None:
        parts.append(f"loss {status.loss:.4f}")
    if status.seconds_per_step:
        parts.append(speed(status.seconds_per_step))
    if status.live and status.eta_seconds is not None:
        parts.append(f"ETA {clock(status.eta_seconds)}")
    return "  ".join(parts)


def measured(measures: Mapping[str, float]) -> str:
    """`flicker 0.3 %, consistency 0.97, ...` of what previews measure, as far as it was measured."""
    parts = [words.format(measures[name]) for name, words in _MEASURES.items() if name in measures]
    return ", ".join(parts)


def speed(seconds_per_step: float) -> str:
    """Steps per second, or seconds per step when that is more than one."""
    return f"{1 / seconds_per_step:.2f} it/s" if seconds_per_step < 1 else f"{seconds_per_step:.2f} s/it"


def clock(seconds: float) -> str:
    """`h:mm:ss`."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


class _Display:
    """One line that is redrawn on a terminal; elsewhere a line at 5 % more, and each 10 seconds."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._terminal = out.isatty()
        self._next_share = 0.0
        self._next_time = 0.0
        self._last = ""

    def show(self, status: RunStatus, news: list[str]) -> None:
        for text in news:
            self._print(text)
        if self._terminal:
            line = one_line(status)
            self._redraw(_bar(status, shutil.get_terminal_size().columns - 4 - len(line)) + line)
        elif self._due(status):
            self._print(one_line(status))

    def close(self, text: str) -> None:
        self._print(text)

    def _due(self, status: RunStatus) -> bool:
        share = status.step / status.total_steps if status.total_steps else 0.0
        line = one_line(status)
        if line == self._last or (share < self._next_share and time.monotonic() < self._next_time):
            return False
        self._last = line
        self._next_share = share + _PLAIN_SHARE
        self._next_time = time.monotonic() + _PLAIN_SECONDS
        return True

    def _redraw(self, line: str) -> None:
        columns = shutil.get_terminal_size().columns
        self._out.write("\r\x1b[2K" + line[: columns - 1])
        self._out.flush()

    def _print(self, line: str) -> None:
        self._out.write(("\r\x1b[2K" if self._terminal else "") + line + "\n")
        self._out.flush()


def _bar(status: RunStatus, room: int) -> str:
    """A bar of at most `room` characters; none where the words need all of the line."""
    width = min(_BAR_WIDTH, room)
    if width < _SHORTEST_BAR:
        return ""
    share = min(status.step / status.total_steps, 1.0) if status.total_steps else 0.0
    full = round(share * width)
    return f"[{'#' * full}{'-' * (width - full)}] "


def _news(event: Record) -> str:
    """A line for an event that is worth one; the last event is told by the outcome."""
    name = event.get("event")
    if name in ("queued", "memory", "precision", "warning"):
        return str(event.get("message", ""))
    if name == "checkpoint":
        return f"checkpoint at step {event.get('step')}"
    if name == "sample":
        told = measured(last_measures([event]) or {})
        tiled = f", decoded in tiles of {event['tile_pixels']} pixels" if event.get("tile_pixels") else ""
        return str(event.get("message") or f"preview at step {event.get('step')}{tiled}{told and f': {told}'}")
    if name == "resumed" and event.get("step") is not None:
        return f"going on from step {event['step']}"
    return "paused; `resume` goes on" if name == "paused" else ""


def _outcome(status: RunStatus, run: Run) -> str:
    if status.state == "failed":
        return f"{status.name} failed: {status.message}"
    if status.state == "interrupted":
        return f"{status.name} was interrupted at step {status.step}. {run.what_is_kept()} The same command resumes it."
    if status.state == "stopped":
        return f"{status.name} was stopped at step {status.step}; the same command goes on"
    return one_line(status)
