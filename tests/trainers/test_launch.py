"""Starting a worker: who lives, who dies, and what the starter learns."""

from __future__ import annotations

import os
import signal
import sys
import time

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
