"""Workers in forks of a Python that has imported torch and diffusers once: imports take most of the time of a short run."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
from multiprocessing import util
from multiprocessing.process import BaseProcess
from pathlib import Path

WORKER = Path(__file__).parents[2] / "trainers" / "worker.py"
util.get_temp_dir()  # now, in the system's: the folder that the tests get for their locks is gone before this process ends
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["torch", "diffusers.models.transformers.transformer_wan"])


def start(run_folder: Path, log_file: Path, *before: str) -> BaseProcess:
    """A worker at a run, as `python BEFORE... trainers/worker.py RUN_FOLDER` starts it; for POSIX."""
    worker = _FORKS.Process(target=_work, args=([*before, str(WORKER), str(run_folder)], log_file))
    worker.start()
    return worker


def _work(arguments: list[str], log_file: Path) -> None:
    log = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.argv = arguments
    runpy.run_path(arguments[0], run_name="__main__")
