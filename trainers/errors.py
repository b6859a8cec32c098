"""What can go wrong, for the user to read.

    VideoTrainerError
    ├── ProblemsError          several problems of one thing at once, each a value, a rule and a remedy
    │   ├── JobError           a job that cannot run
    │   ├── DatasetError       a folder with nothing to train on
    │   └── CheckpointError    a model file that cannot be used
    │       └── KeyTableError  keys of a file that no row of the family's table matches
    ├── LoraError              a LoRA file that cannot be read, written or applied
    ├── RunError               a run that is in the wrong state for what was asked
    │   └── RunLocked          another process holds the run
    └── MissingPackage         an optional package that this job needs

A broken invariant of this program is an `AssertionError`; everything a user can mend is one of these.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One thing to mend: what was found, the rule it breaks, and what to do instead."""

    value: str
    rule: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.value}; {self.rule}. {self.remedy}"


class VideoTrainerError(Exception):
    """Any error whose message is meant for the user."""


class ProblemsError(VideoTrainerError):
    """All the problems of one thing, found before anything was loaded."""

    def __init__(self, problems: Problem | Sequence[Problem], subject: str = "") -> None:
        self.problems = (problems,) if isinstance(problems, Problem) else tuple(problems)
        lines = [str(problem) for problem in self.problems]
        if len(lines) > 1:
            lines = [f"{len(lines)} problems:", *(f"- {line}" for line in lines)]
        text = "\n".join(lines)
        super().__init__(f"{subject}: {text}" if subject else text)


class JobError(ProblemsError):
    """A job that cannot run as it is written."""


class DatasetError(ProblemsError):
    """A data set with nothing in it to train on."""


class CheckpointError(ProblemsError):
    """A model file that is damaged, unknown or of the wrong kind."""


class KeyTableError(CheckpointError):
    """Keys that no row of the family's table matches, or that the table expects and the file lacks."""


class LoraError(VideoTrainerError):
    """A LoRA file that cannot be read, written or applied."""


class RunError(VideoTrainerError):
    """A run that is in the wrong state for what was asked."""


class RunLocked(RunError):
    """Another live process holds the run's or the device's lock."""


class MissingPackage(VideoTrainerError):
    """An optional package that this job needs; the message gives the line that installs it."""
