"""Runs with a stand-in for the trainer, in real processes, under a device lock of their own."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from trainers import launch
from trainers.job import Job, parse_job
from trainers.run import Run


@pytest.fixture(scope="session", autouse=True)
def own_device_locks() -> Iterator[None]:
    """Workers of these tests wait for no run outside them: there is one lock per device and temporary folder."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o777)  # as the system's own: some tests are another user for a while
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(folder))
        patch.setattr("tempfile.tempdir", None)
        yield
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def make_job(tmp_path: Path) -> Callable[..., Job]:
    """A job whose stand-in training behaves as said (see `stand_in_worker.py`)."""

    def make(behaviour: str = "quick", name: str = "cat", steps: int = 5, **fields: Any) -> Job:
        values = {"name": name, "base": {"transformer": "wan.safetensors"}, "encoded": "encoded", "steps": steps}
        values |= {"runs_folder": str(tmp_path / "runs"), "trigger_words": [behaviour]}
        return parse_job(values | fields)

    return make


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`launch` starts the stand-in worker, and this test shares no device lock with anything else."""
    monkeypatch.setattr(launch, "WORKER", Path(__file__).with_name("stand_in_worker.py"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)


@pytest.fixture
def until() -> Callable[[Run, str], None]:
    """Wait until a run is in a state, and for an ended run also until its worker is gone (30 s at most)."""

    def wait(run: Run, state: str) -> None:
        give_up = time.monotonic() + 30
        while run.status().state != state or (run.live and state not in ("queued", "training")):
            assert time.monotonic() < give_up, f"{run.status()}\n{launch.last_log_lines(run, 30)}"
            time.sleep(0.02)

    return wait
