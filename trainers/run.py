"""One training run is one folder. Its names are a promise to users and to other programs:

    job.json             what was asked for; never changed
    events.jsonl         {"time", "event", ...}: queued training checkpoint sample memory warning paused resumed stopped failed
                         done
    metrics.jsonl        {"step", "loss", "lr", "seconds", ...}; the last line of a step counts
    control/             flag files `pause` and `stop`, looked at in every step
    checkpoints/         step-000500/, whole or not there
    samples/             preview videos
    worker.log           what the worker printed
    worker.lock          held by the worker while it lives

Everything is appended line by line or renamed into place, so that any process can be killed at any moment.
"""

from __future__ import annotations

import difflib
import json
import re
import secrets
import shutil
import time
from contextlib import AbstractContextManager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from . import journal
from .errors import JobError, Problem, RunError, VideoTrainerError
from .job import Job, parse_job
from .lock import FileLock, probe
from .run_status import Request, RunStatus, last_state, make_status
from .step_folders import StepFolders
from .whole_files import remove_partial_files, rename, written_beside

JOB_FILE = "job.json"
_LONGEST_NAME = 100

HowFound = Literal["attached", "resumed", "done", "created"]


class Run:
    """A run's folder. Any process may read it and leave requests; the one that holds `lock()` writes the rest."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._events = folder / "events.jsonl"
        self._metrics = folder / "metrics.jsonl"
        self._lines = journal.Writer()
        self._control = folder / "control"
        self._checkpoints = StepFolders(folder / "checkpoints")

    @classmethod
    def create(cls, job: Job) -> Run:
        """The new folder `runs_folder/name`, there in one instant with its job, whose paths become absolute.

        Raises RunError when that name is taken, or when the folder cannot be made.
        """
        job = job.with_absolute_paths(Path.cwd())
        runs_folder = Path(job.runs_folder)
        folder = runs_folder / job.name
        unfinished = runs_folder / f".{job.name}.{secrets.token_hex(4)}.tmp"
        try:
            unfinished.mkdir(parents=True)
            for name in ("control", "checkpoints", "samples"):
                (unfinished / name).mkdir()
            (unfinished / JOB_FILE).write_text(job.canonical_json(), "utf-8")
            if folder.exists():
                raise FileExistsError(folder)
            rename(unfinished, folder)  # fails on a folder that came in between: it would not be empty
        except OSError as error:
            shutil.rmtree(unfinished, ignore_errors=True)
            if folder.exists():
                raise RunError(f"{folder} exists already; every run has a folder of its own. Give the job another name.") from None
            raise RunError(
                f"{folder} cannot be made ({error}); a run needs a folder it can write to. Change runs_folder or its permissions."
            ) from None
        return cls(folder)

    @classmethod
    def open(cls, folder: Path) -> Run:
        """The run in an existing folder. Raises RunError when it is none, JobError when its job cannot be understood."""
        run = cls(folder.absolute())
        if not (folder / JOB_FILE).is_file():
            raise RunError(
                f"{folder} has no {JOB_FILE}; a run is a folder that training made. Give a run's name or folder (`status` lists them)."
            )
        _ = run.job
        return run

    @property
    def name(self) -> str:
        return self.folder.name

    @cached_property
    def job(self) -> Job:
        """What was asked for."""
        path = self.folder / JOB_FILE
        try:
            values = json.loads(path.read_bytes())
        except (OSError, ValueError) as error:
            raise RunError(f"{path} cannot be read ({error}); it must be as training wrote it. Restore it, or start a new run.") from None
        if not isinstance(values, dict):
            raise JobError(Problem(f"{path} is no object", "a job is an object of fields", "Restore it, or start a new run."))
        return parse_job(values)

    def take_memory_of(self, job: Job) -> None:
        """From its next worker on the run keeps things where `job` says."""
        changed = self.job.with_memory_of(job)
        if changed.memory != self.job.memory:
            with written_beside(self.folder / JOB_FILE) as path:
                path.write_text(changed.canonical_json(), "utf-8")
            before, after = self.job.memory.model_dump(), changed.memory.model_dump()
            told = ", ".join(f"{field} {value!r} (before: {before[field]!r})" for field, value in after.items() if value != before[field])
            self.event("memory", message=f"goes on with other memory settings: {told}")
            self.job = changed

    @property
    def samples_folder(self) -> Path:
        return self.folder / "samples"

    @property
    def log_file(self) -> Path:
        return self.folder / "worker.log"

    def lock(self) -> FileLock:
        """The lock that the run's one worker holds as long as it lives."""
        return FileLock(self.folder / "worker.lock")

    @property
    def live(self) -> bool:
        """Whether a worker holds the run now."""
        return probe(self.folder / "worker.lock")

    # What happened

    def event(self, name: str, **fields: Any) -> None:
        """Append a line to events.jsonl. `time` is in seconds since 1970."""
        self._append(self._events, {"time": round(time.time(), 3), "event": name, **fields})

    def metrics(self, **fields: Any) -> None:
        """Append a line to metrics.jsonl. Everything measured in a step belongs in one line."""
        self._append(self._metrics, fields)

    def _append(self, file: Path, record: journal.Record) -> None:
        if why := self._lines.append(file, record):
            message = f"Events and metrics could not be written for a while ({why}). They are written now, and none is missing."
            self.event("warning", message=message)

    def read_events(self) -> list[journal.Record]:
        """All events, oldest first."""
        return journal.read(self._events)[0]

    def read_metrics(self) -> list[journal.Record]:
        """One record per step, ascending: the last that was written for it."""
        by_step = {record["step"]: record for record in journal.read(self._metrics)[0] if "step" in record}
        return [by_step[step] for step in sorted(by_step)]

    def follow_events(self, since: int = 0) -> tuple[list[journal.Record], int]:
        """The events from byte `since` on, and the `since` of the next call."""
        return journal.read(self._events, since)

    def follow_metrics(self, since: int = 0) -> tuple[list[journal.Record], int]:
        """The metrics from byte `since` on as they were written (a step may repeat), and the `since` of the next call."""
        return journal.read(self._metrics, since)

    def status(self) -> RunStatus:
        """What the run is doing now; quick enough to ask for many times a second."""
        status = self._look()
        # A worker may have started, or ended, between looking at its lock and at its events: look again.
        return self._look() if status.state == "interrupted" else status

    def _look(self) -> RunStatus:
        live = self.live
        events, steps = self.read_events(), journal.read_tail(self._metrics)
        measured = self._metrics.stat().st_mtime if steps else None
        return make_status(self.name, events, steps, live, self.requested(), self.job.steps, measured)

    # What is asked of the worker

    def requested(self) -> Request | None:
        """What the worker should do now; stopping goes before pausing."""
        if (self._control / "stop").exists():
            return "stop"
        return "pause" if (self._control / "pause").exists() else None

    def request(self, what: Request) -> None:
        """Ask the worker, which looks once per step."""
        self._control.mkdir(exist_ok=True)
        (self._control / what).touch()

    def clear(self, what: Request) -> None:
        """Take a request back; nothing happens when there is none."""
        (self._control / what).unlink(missing_ok=True)

    # Checkpoints

    def checkpoints(self) -> list[int]:
        """The steps with a checkpoint, ascending."""
        return self._checkpoints.steps()

    def latest_checkpoint(self) -> int | None:
        """The step of the newest checkpoint."""
        return max(self.checkpoints(), default=None)

    def what_is_kept(self) -> str:
        """What a run that fails now can be resumed from, in a sentence."""
        step = self.latest_checkpoint()
        return "No checkpoint has been saved yet." if step is None else f"The checkpoint of step {step} is kept."

    def checkpoint_folder(self, step: int) -> Path:
        """Where the checkpoint of a step is, or would be."""
        return self._checkpoints.path(step)

    def writing_checkpoint(self, step: int) -> AbstractContextManager[Path]:
        """An empty folder to fill, which becomes the checkpoint of `step` on leaving (see `StepFolders.writing`)."""
        return self._checkpoints.writing(step)

    def prune_checkpoints(self, keep_last: int) -> None:
        """Remove all checkpoints but the newest `keep_last`. One that cannot be removed now stays until the next time."""
        assert keep_last >= 1
        for step in self.checkpoints()[:-keep_last]:
            with suppress(OSError):  # on Windows, a folder that is open in the Explorer
                self._checkpoints.remove(step)

    def tidy(self) -> None:
        """Puts right what a killed worker left. For the holder of `lock()`."""
        self._checkpoints.tidy()
        remove_partial_files(self.job.output_folder / self.name)


def attach_or_create(job: Job) -> tuple[Run, HowFound]:
    """The run of a job: the one that has it already, else a new one.

    "attached": a worker is at it. "resumed": it ended or was interrupted before its last step; requests to stop or
    pause are cleared, it takes the job's `memory`, and waits to be launched.
    "done": nothing is left to do. "created": new, waits to be launched.
    A name that another job has used becomes `name-2`, `name-3`, ... Raises RunError when no folder can be made.
    """
    job = job.with_absolute_paths(Path.cwd())
    runs_folder = Path(job.runs_folder)
    try:
        runs_folder.mkdir(parents=True, exist_ok=True)
        with FileLock(runs_folder / ".create.lock", patience_seconds=30.0):
            _remove_unfinished(runs_folder)
            run = run_of(job)
            if run is None:
                return Run.create(_with_free_name(job)), "created"
    except OSError as error:
        raise RunError(f"{runs_folder} cannot be used ({error}); runs are made there. Change runs_folder or its permissions.") from None
    return run, _take_up(run, job)


def run_of(job: Job) -> Run | None:
    """The existing run that trains this job (its paths absolute), apart from the number behind its name."""
    if not Path(job.runs_folder).is_dir():
        return None
    for folder in sorted(Path(job.runs_folder).iterdir(), key=lambda folder: (len(folder.name), folder.name)):
        ending = re.search(r"-(\d+)$", folder.name)
        if folder.name != job.name and not (ending and folder.name == _numbered(job.name, int(ending[1]))):
            continue
        run = _run_or_none(folder)
        if run and run.job.trains_the_same(job):
            return run
    return None


def not_taken(run: Run, job: Job) -> str:
    """What to say of `memory` when a run that a worker is at was asked for again; empty when it is as it was."""
    if run.job.memory == job.memory:
        return ""
    return f"{run.name} is at work with other memory settings: pause it and start it again with these, and it goes on with them."


def list_runs(runs_folder: Path) -> list[Run]:
    """Every run in a folder, by name; folders that are no runs (or of a later version) are left out."""
    if not runs_folder.is_dir():
        return []
    runs = (_run_or_none(folder) for folder in sorted(runs_folder.iterdir()) if not folder.name.startswith("."))
    return [run for run in runs if run]


def find_run(runs_folder: Path, text: str) -> Run:
    """The run of a name in `runs_folder`, or of a path. Raises RunError that names similar runs."""
    for folder in (runs_folder / text, Path(text)):
        if (folder / JOB_FILE).is_file():
            return Run.open(folder)
    names = [run.name for run in list_runs(runs_folder)]
    similar = difflib.get_close_matches(text, names, n=3, cutoff=0.4) or names[:5]
    known = f"Runs there: {', '.join(similar)}." if similar else "There are no runs there; give another folder with --runs."
    raise RunError(f"No run {text!r} in {runs_folder}; a run is given by its name or its folder. {known}")


def _take_up(run: Run, job: Job) -> HowFound:
    if run.live:
        return "attached"
    if last_state(run.read_events())[0] == "done":
        return "done"
    run.take_memory_of(job)
    run.clear("stop")
    run.clear("pause")
    return "resumed"


def _with_free_name(job: Job) -> Job:
    number = 1
    while any((Path(folder) / _numbered(job.name, number)).exists() for folder in (job.runs_folder, job.output_folder)):
        number += 1
    return job.model_copy(update={"name": _numbered(job.name, number)})


def _numbered(name: str, number: int) -> str:
    """`name`, `name-2`, `name-3`, ..., cut to the longest name that a job may have."""
    ending = "" if number == 1 else f"-{number}"
    return name[: _LONGEST_NAME - len(ending)] + ending


def _run_or_none(folder: Path) -> Run | None:
    try:
        return Run.open(folder)
    except VideoTrainerError:
        return None


def _remove_unfinished(runs_folder: Path) -> None:
    """What killed creators left; a living one needs milliseconds, not an hour."""
    for folder in runs_folder.glob(".*.tmp"):
        if time.time() - folder.stat().st_mtime > 3600:
            shutil.rmtree(folder, ignore_errors=True)
