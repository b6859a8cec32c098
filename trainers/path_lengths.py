"""Whether Windows can hold every file of a run: it allows 260 characters for a path, unless it was set up for longer ones."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator
from pathlib import Path, PureWindowsPath

from .errors import Problem
from .job import Job

_FILE_LIMIT, _FOLDER_LIMIT = 259, 247
"""Characters; MAX_PATH counts the null character, too, and a folder must leave 12 for a file in it."""
_LARGEST_STEP = 10**6
_RANDOM = "0" * 8


def path_problem(job: Job) -> Problem | None:
    """That a file of the run would have too long a path; None where all fit, and on other systems."""
    if _long_paths_work() or not (found := _too_long(job)):
        return None
    path, limit = max(found, key=lambda one: len(one[0]) - one[1])
    lengths = range(len(job.name) - 1, 0, -1)
    fitting = next((length for length in lengths if not _too_long(job.model_copy(update={"name": "x" * length}))), None)
    shorter = f"Use a name of at most {fitting} characters" if fitting else "Use folders with shorter paths"
    return Problem(
        f"the run would write {path}, a path of {len(path)} characters",
        f"Windows allows {limit}",
        f"{shorter}, or switch on long paths in Windows (LongPathsEnabled) and restart.",
    )


def _too_long(job: Job) -> list[tuple[str, int]]:
    return [(str(path), limit) for path, limit in _longest_paths(job) if len(str(path)) > limit]


def _longest_paths(job: Job) -> Iterator[tuple[PureWindowsPath, int]]:
    """The longest paths that a run writes, each with its limit; see `step_folders` and `whole_files` for their names."""
    run, step = _folder(job.runs_folder) / job.name, f"{job.steps or _LARGEST_STEP:06d}"
    yield run.with_name(f".{job.name}.{_RANDOM}.tmp") / "checkpoints", _FOLDER_LIMIT
    checkpoint = run / "checkpoints" / f".step-{step}.{_RANDOM}.trash"
    yield checkpoint, _FOLDER_LIMIT
    for file in ("optimizer-high.pt", "adapter-high.safetensors", f".{_RANDOM}.partial"):
        yield checkpoint / file, _FILE_LIMIT
    yield run / "samples" / f"step-{step}-{len(job.previews.prompts)}.mp4", _FILE_LIMIT
    if job.tensorboard:
        yield run / "tensorboard" / f"events.out.tfevents.{'0' * 10}.{platform.node()}.{'0' * 6}.0", _FILE_LIMIT
    outputs = _folder(str(job.output_folder)) / job.name
    expert = "-high" if job.base.transformer_low_noise or job.experts.train != "both" else ""
    yield outputs, _FOLDER_LIMIT
    yield outputs / f"{job.name}{expert}-{step}.safetensors", _FILE_LIMIT
    yield outputs / f".{_RANDOM}.partial", _FILE_LIMIT


def _folder(path: str) -> PureWindowsPath:
    given = PureWindowsPath(path)
    return given if given.is_absolute() else PureWindowsPath(Path(path).absolute())


def _long_paths_work() -> bool:
    """Whether longer paths may be used: on Windows a setting says so, and Python's own executables declare that they can."""
    if sys.platform != "win32":
        return True
    import winreg

    try:
        with winreg.OpenKey(winreg.HKEY_LOCAL_MACHINE, r"SYSTEM\CurrentControlSet\Control\FileSystem") as key:
            return bool(winreg.QueryValueEx(key, "LongPathsEnabled")[0])
    except OSError:  # before version 1607 of Windows 10
        return False
