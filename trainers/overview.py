"""What every run in a folder is doing, for a page that shows them all: records that JSON can hold, looked at cheaply.

Two looks a second at hundreds of ended runs must cost next to nothing: only runs that live or changed lately are looked
at each time, the others every few seconds, and files are read only when their size or time differs.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from .errors import VideoTrainerError
from .journal import Record
from .launch import last_log_lines
from .run import JOB_FILE, Run
from .run_status import last_measures

LOG_LINES = 15
"""Lines of worker.log that are told about a run that failed or was interrupted."""

_REST_SECONDS = 2.0
_LATELY_SECONDS = 30.0
_AVERAGED = ("loss", "grad_norm", "seconds")

Signature = tuple[object, ...]


@dataclass
class _Known:
    """A run as it was at the last look. `run` is None for a folder that is none, or of a later version."""

    run: Run | None
    folder: str
    job: Signature
    files: Signature = ()
    record: Record | None = None

    @property
    def restless(self) -> bool:
        """Whether it may be different a moment later."""
        record = self.record
        return record is None or record["live"] or time.time() - record["active"] < _LATELY_SECONDS


class Overview:
    """The runs in a folder. Records are replaced when something changed, never altered; any thread may look."""

    def __init__(self, runs_folder: Path) -> None:
        self._folder = runs_folder
        self._known: dict[str, _Known] = {}
        self._names_of: Signature = ()
        self._rested = 0.0
        self._lock = threading.Lock()

    def look(self, thorough: bool = False) -> dict[str, Record]:
        """Run name -> `describe`d status. `thorough`: ended runs too are looked at now, not only every few seconds."""
        with self._lock:
            now = time.monotonic()
            thorough = thorough or now - self._rested >= _REST_SECONDS
            names_of = (_stamp(self._folder),)
            if thorough or names_of != self._names_of:
                self._names_of = names_of
                self._find_runs()
            if thorough:
                self._rested = now
            for known in self._known.values():
                if thorough or known.restless:
                    _look_at(known)
            return {name: known.record for name, known in self._known.items() if known.record}

    def find(self, name: str) -> Run | None:
        """The run of a name, which is one of the folder's or none: a path never is."""
        with self._lock:
            self._find_runs()
            known = self._known.get(name)
        return known.run if known else None

    def _find_runs(self) -> None:
        folder, names = str(self._folder), _folder_names(self._folder)
        for name in self._known.keys() - names:
            del self._known[name]
        for name in sorted(names):
            job = (_stamp(folder, name, JOB_FILE),)
            if name not in self._known or self._known[name].job != job:
                self._known[name] = _Known(_open(self._folder / name), os.path.join(folder, name), job)


def describe(run: Run) -> Record:
    """A run's status, times in seconds since 1970, its newest LoRA (`<run>/<file>`), what its newest previews
    measure, and the log's end when it broke off.
    """
    status, events = run.status(), run.read_events()
    times = [event["time"] for event in events if "time" in event] or [(run.folder / JOB_FILE).stat().st_mtime]
    loras = [event["lora"] for event in events if event.get("lora")]
    metrics = _stamp(run.folder, "metrics.jsonl")
    broke_off = status.state in ("failed", "interrupted")
    return {
        **asdict(status),
        "eta_seconds": status.eta_seconds if status.live else None,
        "created": times[0],
        "active": max(times[-1], metrics[0] / 1e9 if metrics else 0.0),
        "lora": f"{run.name}/{loras[-1]}" if loras else None,
        "measures": last_measures(events),
        "log": last_log_lines(run, LOG_LINES) if broke_off else "",
    }


def changes(before: Mapping[str, Record], after: Mapping[str, Record]) -> Record | None:
    """What leads from one look to the next: records that are new or differ, names that are gone; None when nothing changed."""
    changed = [record for name, record in after.items() if before.get(name) is not record and before.get(name) != record]
    removed = sorted(before.keys() - after.keys())
    return {"runs": changed, "removed": removed} if changed or removed else None


def details(run: Run, points: int = 300) -> Record:
    """Everything a page shows of one run: `describe`, its job, events and thinned metrics."""
    job = run.job.model_dump(mode="json")
    return {**describe(run), "job": job, "events": run.read_events(), "metrics": thinned(run.read_metrics(), points)}


def thinned(metrics: list[Record], points: int) -> list[Record]:
    """At most `points` records: of neighbours the last, with means of what jumps from step to step and what any one measured."""
    assert points >= 1
    size = -(-len(metrics) // points) or 1
    return [_merged(metrics[start : start + size]) for start in range(0, len(metrics), size)]


def _merged(neighbours: list[Record]) -> Record:
    merged: Record = {}
    for record in neighbours:
        merged |= {field: value for field, value in record.items() if value is not None}
    for field in _AVERAGED:
        values = [record[field] for record in neighbours if record.get(field) is not None]
        if values:
            merged[field] = sum(values) / len(values)
    return merged


def _look_at(known: _Known) -> None:
    if known.run is None:
        return
    try:
        was_live = bool(known.record and known.record["live"])
        files = _files(known.run, known.folder, was_live)
        if known.record is None or files != known.files:
            known.record, known.files = describe(known.run), files
    except OSError:  # the folder is being removed, or on a drive that went away: the next look tells
        known.record = None


def _files(run: Run, folder: str, was_live: bool) -> Signature:
    """What differs when the status may differ. An ended run changes only by an event; a live one can also die without a word."""
    events = _stamp(folder, "events.jsonl")
    return (events, _stamp(folder, "metrics.jsonl"), run.requested(), run.live) if was_live else (events,)


def _stamp(*path: str | Path) -> tuple[int, int] | None:
    """(time of the last change in nanoseconds, size in bytes); None when there is nothing."""
    try:
        found = os.stat(os.path.join(*path))
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size


def _folder_names(folder: Path) -> set[str]:
    try:
        return {name for name in os.listdir(folder) if not name.startswith(".")}
    except OSError:
        return set()


def _open(folder: Path) -> Run | None:
    try:
        return Run.open(folder)
    except VideoTrainerError:
        return None
