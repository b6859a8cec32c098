"""The worker from its start to its last event, as a real process started by path."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from trainers import launch
from trainers.lock import device_lock
from trainers.run import Run, attach_or_create

ROOT = Path(__file__).parents[2]


def _work(run: Run, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *options, str(launch.WORKER), str(run.folder)], capture_output=True, text=True, check=False, cwd=run.folder
    )


def _events(run: Run) -> list[str]:
    return [event["event"] for event in run.read_events()]


def test_a_run_is_done(stand_in, make_job):
    run = Run.create(make_job("quick"))
    (run.checkpoint_folder(1).parent / ".step-000001.abcd.tmp").mkdir()
    done = _work(run)
    assert done.returncode == 0, done.stdout + done.stderr
    assert _events(run) == ["queued", "training", "done"]
    assert run.status().state == "done"
    assert [path.name for path in run.checkpoint_folder(1).parent.iterdir() if path.name.startswith(".")] == []


def test_isolated_python_works_on_the_real_device(stand_in, make_job):
    run = Run.create(make_job("quick", name="real-device"))
    done = _work(run, "-I")
    assert done.returncode == 0, done.stdout + done.stderr
    assert _events(run) == ["queued", "training", "done"]


def test_a_failure_for_the_user_is_told_in_full(stand_in, make_job):
    run = Run.create(make_job("fails for the user"))
    assert _work(run).returncode == 1
    assert _events(run) == ["queued", "training", "failed"]
    assert run.status().message == "num_frames is 80; Wan needs 4n+1. Use 77 or 81."


@pytest.mark.skipif(sys.platform != "linux", reason="a device that is always full")
def test_a_failure_is_an_event_where_nothing_can_be_printed(stand_in, make_job):
    """On a full disk the traceback could not be written to worker.log, and then nothing said why the run ended."""
    run = Run.create(make_job("fails"))
    with open("/dev/full", "w") as full:
        subprocess.run([sys.executable, str(launch.WORKER), str(run.folder)], stdout=full, stderr=full, check=False, cwd=run.folder)
    assert _events(run) == ["queued", "training", "failed"]


def test_another_failure_points_at_the_log(stand_in, make_job):
    run = Run.create(make_job("fails"))
    done = _work(run)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert run.status().message == "ZeroDivisionError: nobody divides by zero (see worker.log)"


def test_a_folder_that_is_no_run_fails_plainly(stand_in, tmp_path):
    done = subprocess.run([sys.executable, str(launch.WORKER), str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "a run is a folder that training made" in done.stderr


def test_a_run_with_a_checkpoint_is_resumed(stand_in, make_job):
    run = Run.create(make_job("is killed"))
    assert _work(run).returncode != 0
    assert run.status().state == "interrupted"
    assert run.latest_checkpoint() == 2
    _work(run)
    assert [(event["event"], event.get("step")) for event in run.read_events()][2:4] == [("queued", None), ("resumed", 2)]


def test_the_next_run_waits_for_the_device(stand_in, make_job, until):
    run = Run.create(make_job("quick"))
    with device_lock("cpu"):
        launch.launch(run)
        while len(run.read_events()) < 2:
            time.sleep(0.05)
        assert run.status().state == "queued"
        assert run.status().message == "waiting for cpu, which another run uses"
    until(run, "done")


@pytest.mark.parametrize(("request_", "state"), [("stop", "stopped"), ("pause", "paused")])
def test_a_waiting_run_does_what_it_is_asked(stand_in, make_job, until, request_, state):
    run = Run.create(make_job("quick"))
    with device_lock("cpu"):
        launch.launch(run)
        until(run, "queued")
        run.request(request_)
        until(run, state)
    assert "training" not in _events(run)
    assert run.requested() is None


def test_a_paused_run_has_no_worker_and_is_resumed_by_a_new_one(stand_in, make_job, until):
    run = Run.create(make_job("slow", steps=1))
    launch.launch(run)
    run.request("pause")
    until(run, "paused")
    with device_lock("cpu"):
        pass  # or RunLocked is raised
    assert attach_or_create(run.job)[1] == "resumed"


def test_a_pause_that_is_taken_back_while_pausing_is_none(stand_in, make_job, until):
    run = Run.create(make_job("slow", name="slow-to-pause", steps=1))
    launch.launch(run)
    until(run, "training")
    run.request("pause")
    time.sleep(0.3)  # the worker has seen it
    run.clear("pause")
    while _events(run).count("training") < 2:
        time.sleep(0.02)
    run.request("stop")
    until(run, "stopped")
    assert _events(run) == ["queued", "training", "training", "stopped"]


def test_the_socket_guard_of_these_tests_works(stand_in, make_job):
    run = Run.create(make_job("calls home"))
    done = _work(run)
    assert done.returncode == 99
    assert "NETWORK: socket" in done.stdout


@pytest.mark.parametrize("entry", ["worker.py", "__main__.py"])
def test_an_entry_does_not_search_its_own_folder(entry, tmp_path):
    """`trainers/data` or `trainers/lock.py` must not hide modules of these names."""
    code = (
        f"import sys, runpy; sys.path[0] = {str(ROOT / 'trainers')!r}; sys.argv[1:] = ['--help']\n"
        f"try: runpy.run_path({str(ROOT / 'trainers' / entry)!r}, run_name='__main__')\n"
        "except BaseException: pass\n"
        f"assert {str(ROOT / 'trainers')!r} not in sys.path, sys.path\n"
        "assert 'trainers.run' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, capture_output=True)
