"""Locks against real processes: held, inherited by nobody, released by death."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from trainers import lock as lock_module
from trainers.errors import RunLocked
from trainers.lock import FileLock, device_lock, probe

ROOT = Path(__file__).parents[2]
HOLDER = """
import os, sys, time
from pathlib import Path
from trainers.lock import FileLock
lock = FileLock(Path(sys.argv[1]))
assert lock.acquire()
if len(sys.argv) == 2 or os.fork() == 0:
    print(os.getpid(), flush=True)  # of the child, if there is one: only then has it let go of the lock
time.sleep(60)
"""


def _start_holder(path: Path, *options: str) -> tuple[subprocess.Popen[str], int]:
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(path), *options], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout
    return process, int(process.stdout.readline())


def _kill(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def test_one_holder_at_a_time(tmp_path):
    path = tmp_path / "folder" / "a.lock"
    assert not probe(path)
    with FileLock(path) as lock:
        assert lock.held
        assert probe(path)
        assert not FileLock(path).acquire()
        with pytest.raises(RunLocked, match="held by another process"), FileLock(path):
            pass
    assert not lock.held
    assert not probe(path)


def test_a_killed_holder_holds_nothing(tmp_path):
    path = tmp_path / "a.lock"
    process, _ = _start_holder(path)
    assert probe(path)
    assert not FileLock(path, patience_seconds=0).acquire()
    _kill(process)
    assert not probe(path)
    assert FileLock(path).acquire()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no fork")
def test_a_forked_child_does_not_keep_the_lock_of_its_killed_parent(tmp_path):
    path = tmp_path / "a.lock"
    process, child = _start_holder(path, "fork")
    try:
        _kill_only(process)
        assert not probe(path)
        os.kill(child, 0)  # the child is alive, or this test shows nothing
    finally:
        os.kill(child, signal.SIGKILL)
        process.communicate()


def _kill_only(process: subprocess.Popen[str]) -> None:
    """Kill without waiting for the pipe, which the child keeps open."""
    process.kill()
    process.wait()


def test_a_started_program_does_not_inherit_the_lock(tmp_path):
    path = tmp_path / "a.lock"
    lock = FileLock(path)
    assert lock.acquire()
    child = subprocess.Popen([sys.executable, "-c", "import time; print(1, flush=True); time.sleep(60)"], stdout=subprocess.PIPE, text=True)
    assert child.stdout
    child.stdout.readline()
    lock.release()
    assert not probe(path)
    _kill(child)


def test_probing_never_makes_a_taker_fail(tmp_path):
    path = tmp_path / "a.lock"
    prober = subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"from pathlib import Path\nfrom trainers.lock import probe\nprint(1, flush=True)\nwhile True: probe(Path({str(path)!r}))",
        ],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert prober.stdout
    prober.stdout.readline()
    lock = FileLock(path)
    end = time.monotonic() + 0.5
    while time.monotonic() < end:
        assert lock.acquire()
        lock.release()
    _kill(prober)


def test_on_windows_a_moment_of_another_probe_does_not_count_as_held(tmp_path, monkeypatch):
    path = tmp_path / "a.lock"
    path.touch()
    monkeypatch.setattr(lock_module, "_PROBE_TRIES", 5)
    tries = iter([False, False, True])
    monkeypatch.setattr(lock_module, "_try_lock", lambda descriptor, shared: next(tries, False))
    assert not probe(path)
    assert probe(path)


def test_the_cpu_has_one_lock_for_all_runs_of_a_user(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    first, second = device_lock("cpu"), device_lock("cpu")
    assert first.path == second.path
    assert first.path.name == "cpu.lock"
    assert first.path.parent.parent == tmp_path
    with first:
        assert not second.acquire()
