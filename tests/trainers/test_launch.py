"""Starting a worker: who lives, who dies, and what the starter learns."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from trainers import launch
from trainers.errors import RunError
from trainers.run import Run


def test_a_launched_run_is_live_when_launch_returns(stand_in, make_job, until):
    run = Run.create(make_job("slow"))
    process_id = launch.launch(run)
    assert run.live
    if sys.platform != "win32":
        assert os.getsid(process_id) == process_id  # Ctrl-C in the starter's terminal does not reach it
    run.request("stop")
    until(run, "stopped")


STARTER = """
import sys, time
from pathlib import Path

sys.path.insert(0, {root!r})
from trainers import launch
from trainers.run import Run

launch.WORKER = Path({worker!r})
launch.launch(Run.open(Path(sys.argv[1])))
print("launched", flush=True)
time.sleep(60)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="a process group is a job object there")
def test_a_worker_outlives_its_starter_and_all_processes_of_its_group(stand_in, make_job, until):
    """ComfyUI that is closed or killed with everything it started must not take hours of training with it."""
    run = Run.create(make_job("slow"))
    code = STARTER.format(root=str(Path(__file__).parents[2]), worker=str(launch.WORKER))
    with subprocess.Popen([sys.executable, "-c", code, str(run.folder)], stdout=subprocess.PIPE, start_new_session=True) as starter:
        try:
            assert starter.stdout is not None
            assert starter.stdout.readline() == b"launched\n"
            until(run, "training")
        finally:
            os.killpg(starter.pid, signal.SIGKILL)
    time.sleep(0.2)
    assert run.live
    assert run.status().state == "training"
    run.request("stop")
    until(run, "stopped")


@pytest.mark.parametrize("refused", [0, 1])
def test_on_windows_a_worker_leaves_the_job_object_of_its_starter(make_job, monkeypatch, refused):
    """ComfyUI Desktop ends every process of its job object. Some job objects let none leave: then Windows denies access."""
    breakaway, others = 0x01000000, 0x08000000 | 0x00000200
    for name, flag in (("BREAKAWAY_FROM_JOB", breakaway), ("NO_WINDOW", 0x08000000), ("NEW_PROCESS_GROUP", 0x00000200)):
        monkeypatch.setattr(subprocess, f"CREATE_{name}", flag, raising=False)
    started, real = [], subprocess.Popen

    def popen(command, creationflags, **options):
        started.append(creationflags)
        if len(started) <= refused:
            raise PermissionError(13, "Access is denied", None, 5)
        return real([sys.executable, "-c", ""], **options)

    run = Run.create(make_job())
    monkeypatch.setattr(subprocess, "Popen", popen)
    monkeypatch.setattr(launch, "sys", SimpleNamespace(platform="win32", executable=sys.executable))
    launch.launch(run)
    assert started == [others | breakaway, others][: refused + 1]


def test_a_killed_worker_leaves_an_interrupted_run_that_can_be_launched_again(stand_in, make_job, until):
    run = Run.create(make_job("slow"))
    process_id = launch.launch(run)
    until(run, "training")
    os.kill(process_id, signal.SIGKILL)
    until(run, "interrupted")
    launch.launch(run)
    until(run, "training")
    run.request("stop")
    until(run, "stopped")


def test_two_workers_of_one_run_are_one(stand_in, make_job, until):
    run = Run.create(make_job("slow"))
    launch.launch(run)
    until(run, "training")
    launch.launch(run)  # its worker finds the run taken, and ends
    give_up = time.monotonic() + 20
    while "has a worker already" not in launch.last_log_lines(run, 30):
        assert time.monotonic() < give_up
        time.sleep(0.05)
    assert run.status().state == "training"
    run.request("stop")
    until(run, "stopped")
    assert [event["event"] for event in run.read_events()].count("queued") == 1


def test_a_worker_that_cannot_start_says_why(make_job, monkeypatch, tmp_path):
    broken = tmp_path / "worker.py"
    broken.write_text("import no_such_module")
    monkeypatch.setattr(launch, "WORKER", broken)
    with pytest.raises(RunError, match="No module named 'no_such_module'"):
        launch.launch(Run.create(make_job()))


def test_the_command_holds_two_paths_and_nothing_of_the_user(make_job):
    run = Run.create(make_job("--danger"))
    assert launch._command(run)[-2:] == [str(launch.WORKER), str(run.folder)]
