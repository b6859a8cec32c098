"""The only module that starts a process: a worker for a run, which lives on when its starter ends."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .environment import environment_of_worker
from .errors import RunError
from .run import Run

WORKER = Path(__file__).resolve().with_name("worker.py")
_PATIENCE_SECONDS = 120.0
_POLL_SECONDS = 0.05
_SHOWN_LINES = 5

# A worker that nobody waits for would stay behind as a zombie: they are kept, and looked after at each launch.
_started: list[subprocess.Popen[bytes]] = []


def launch(run: Run) -> int:
    """Start a worker for `run` in the background and return its process id, once it (or another worker) holds the run.

    The worker's output is appended to worker.log.
    Raises RunError with the log's last lines when the worker ends before it took the run.
    """
    _started[:] = [process for process in _started if process.poll() is None]
    _, before = run.follow_events()
    process = _start(run)
    _started.append(process)
    give_up = time.monotonic() + _PATIENCE_SECONDS
    while not run.live:
        if process.poll() is not None:
            if process.returncode and not run.follow_events(before)[0]:
                raise RunError(f"The worker of {run.name} could not start; {run.log_file} says why:\n{last_log_lines(run)}")
            break
        if time.monotonic() > give_up:
            raise RunError(f"The worker of {run.name} has not started within {_PATIENCE_SECONDS:.0f} s; see {run.log_file}.")
        time.sleep(_POLL_SECONDS)
    return process.pid


def last_log_lines(run: Run, count: int = _SHOWN_LINES) -> str:
    """The last `count` lines of worker.log; empty when there is none."""
    try:
        with run.log_file.open("rb") as file:
            file.seek(max(file.seek(0, 2) - 20_000, 0))
            lines = file.read().decode("utf-8", "replace").splitlines()
    except FileNotFoundError:
        return ""
    return "\n".join(lines[-count:])


def _command(run: Run) -> list[str]:
    # Unbuffered UTF-8 and faulthandler: the log must tell the last moment of a process that died in native code.
    python = [sys.executable, "-u", "-X", "utf8", "-X", "faulthandler"]
    return [*python, str(WORKER), str(run.folder)]


def _start(run: Run) -> subprocess.Popen[bytes]:
    return start_apart(_command(run), run.folder, run.log_file)


def start_apart(command: Sequence[str], folder: Path, log_file: Path) -> subprocess.Popen[bytes]:
    """Starts a process in a folder that lives on when its starter ends. What it prints is appended to a file."""
    with log_file.open("ab") as log:
        for options in _apart_from_its_starter():
            try:
                return subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    cwd=folder,
                    env=environment_of_worker(),
                    close_fds=True,
                    **options,
                )
            except PermissionError as error:
                refused = error
        raise refused


def _apart_from_its_starter() -> list[dict[str, Any]]:
    """Options with which a worker lives on when its starter's processes are ended, the best first."""
    if sys.platform != "win32":
        return [{"start_new_session": True}]
    # Not DETACHED_PROCESS: without any console, each program that the worker starts would open a window.
    flags = subprocess.CREATE_NO_WINDOW | subprocess.CREATE_NEW_PROCESS_GROUP
    # ComfyUI Desktop may keep its processes in a job object, which ends all of them with it; some jobs let none leave, and
    # then access is denied.
    return [{"creationflags": flags | subprocess.CREATE_BREAKAWAY_FROM_JOB}, {"creationflags": flags}]


def helper_command(program: str, argument: str) -> list[str]:
    """What runs a few lines of Python that may import `trainers`, with one argument (`sys.argv[1]`)."""
    root = str(WORKER.parents[1])
    return [sys.executable, "-X", "utf8", "-c", f"import sys\nsys.path.insert(0, {root!r})\n{program}", argument]


def answer_of(command: Sequence[str], patience_seconds: float) -> str:
    """What another program prints; empty when it is not there, fails or takes too long."""
    flags = 0
    if sys.platform == "win32":
        flags = subprocess.CREATE_NO_WINDOW
    try:
        return subprocess.check_output(
            command, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL, text=True, timeout=patience_seconds, creationflags=flags
        )
    except (OSError, subprocess.SubprocessError, UnicodeError):
        return ""
