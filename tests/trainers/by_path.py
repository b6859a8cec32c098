"""A real training of a tiny model by the worker as ComfyUI starts it: by its path, under a Python that knows nothing of this project."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from pathlib import Path

from tiny import tiny_job

from trainers.run import Run

PACK = Path(__file__).parents[2]


def train_by_path(folder: Path, python: str | Path, *options: str, pack: Path = PACK, environment: Mapping[str, str] | None = None) -> Run:
    """Train in `folder` with the `trainers/worker.py` of `pack` until the worker ends.

    Raises AssertionError with its output unless all that a training leaves is there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    run = Run.create(tiny_job(folder))
    worker = pack / "trainers" / "worker.py"
    command = [str(python), *options, str(worker), str(run.folder)]
    done = subprocess.run(
        command, cwd=run.folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", check=False
    )
    assert done.returncode == 0, done.stdout
    assert run.status().state == "done", done.stdout
    assert [line["step"] for line in run.read_metrics()] == [1, 2, 3, 4]
    assert Path(run.job.loras_folder, run.name, f"{run.name}-000004.safetensors").is_file()
    return run
