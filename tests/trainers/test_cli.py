"""The verbs about runs, with real workers behind them, and what every verb does with wrong input."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import types
from contextlib import ExitStack
from pathlib import Path

import pytest

from trainers import launch
from trainers.cli import main
from trainers.cli.follow import clock, follow, speed
from trainers.run import Run, find_run

ROOT = Path(__file__).parents[2]
VERBS = ("demo", "inspect", "dataset", "encode", "plan", "train", "status", "pause", "resume", "stop", "convert")


@pytest.fixture
def job_file(stand_in, make_job, tmp_path, monkeypatch):
    """Writes a job whose base and data are not looked at, and returns its file."""
    unchecked = types.ModuleType("trainers.plan")
    unchecked.hand_over = lambda job: job  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "trainers.plan", unchecked)
    monkeypatch.chdir(tmp_path)

    def write(behaviour: str = "quick", **fields) -> str:
        path = tmp_path / "job.json"
        path.write_text(make_job(behaviour, **{"loras_folder": str(tmp_path / "loras"), **fields}).canonical_json())
        return str(path)

    return write


def _runs(tmp_path: Path) -> list[str]:
    return ["--runs", str(tmp_path / "runs")]


@pytest.mark.parametrize("start", [["-m", "trainers"], ["-I", str(ROOT / "trainers" / "__main__.py")]], ids=["module", "path"])
def test_both_ways_to_start_know_every_verb(start, tmp_path):
    cwd = ROOT if "-m" in start else tmp_path
    done = subprocess.run([sys.executable, *start, "--help"], capture_output=True, text=True, check=True, cwd=cwd)
    assert [verb for verb in VERBS if f"\n    {verb} " not in done.stdout] == []


@pytest.mark.parametrize("arguments", [[], ["train"], ["inspect"], ["encode", "clips"], ["convert", "a", "b", "--format", "zip"], ["fly"]])
def test_wrong_usage_is_exit_code_2(arguments, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert "usage: python -m trainers" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["status", "pause", "resume", "stop"])
def test_an_unknown_run_is_one_message(verb, tmp_path, capsys):
    assert main([verb, "cat", *_runs(tmp_path)]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: No run 'cat'")
    assert "Traceback" not in printed.err


def test_all_problems_of_a_job_at_once(job_file, tmp_path, capsys):
    (tmp_path / "job.toml").write_text('name = "a/b"\nstep = 3\n')
    assert main(["train", str(tmp_path / "job.toml")]) == 1
    printed = capsys.readouterr().err
    assert all(text in printed for text in ("name is 'a/b'", "step is no field of a job", "base is missing", "encoded is missing"))


def test_train_follows_to_the_end(job_file, tmp_path, capsys):
    path = job_file("quick", steps=5)
    assert main(["train", path]) == 0
    printed = capsys.readouterr().out
    assert "cat: created, worker" in printed
    assert "cat  done  5/5  100 %" in printed
    assert str(tmp_path / "loras" / "cat") in printed
    assert main(["train", path]) == 0
    assert "cat is done already" in capsys.readouterr().out
    assert main(["train", job_file("quick", steps=6), "--detach"]) == 0
    assert "cat-2: created" in capsys.readouterr().out


def test_a_failed_run_says_why_and_is_exit_code_1(job_file, tmp_path, capsys):
    assert main(["train", job_file("fails")]) == 1
    assert "cat failed: ZeroDivisionError: nobody divides by zero (see worker.log)" in capsys.readouterr().out
    assert main(["status", "cat", *_runs(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "message: ZeroDivisionError" in printed
    assert "Traceback (most recent call last)" in printed


def test_a_killed_run_is_interrupted_and_the_same_command_goes_on(job_file, tmp_path, capsys):
    path = job_file("is killed")
    assert main(["train", path]) == 1
    assert "was interrupted at step 3. The checkpoint of step 2 is kept. The same command resumes it." in capsys.readouterr().out
    assert main(["train", path, "--resume"]) == 1
    assert "cat: resumed, worker" in capsys.readouterr().out


def test_a_run_goes_on_with_other_memory_settings_once_it_is_paused(job_file, tmp_path, capsys, until):
    assert main(["train", job_file("slow"), "--detach"]) == 0
    run = find_run(tmp_path / "runs", "cat")
    until(run, "training")
    path = job_file("slow", memory={"vram_gib": 10})
    assert main(["train", path, "--detach"]) == 0
    assert "cat is at work with other memory settings: pause it" in capsys.readouterr().out
    assert main(["pause", "cat", *_runs(tmp_path)]) == 0
    until(run, "paused")
    assert main(["train", path, "--detach"]) == 0
    printed = capsys.readouterr().out
    assert "cat: resumed" in printed
    assert "at work" not in printed
    run.request("stop")
    until(run, "stopped")
    assert find_run(tmp_path / "runs", "cat").job.memory.vram_gib == 10


def test_what_makes_a_new_run_is_named(job_file, capsys):
    assert main(["train", job_file()]) == 0
    assert main(["train", job_file(seed=5, memory={"vram_gib": 10})]) == 0
    assert "(different: seed)" in capsys.readouterr().out
    assert main(["train", job_file(memory={"vram_gib": 10, "quantise": "fp8"})]) == 0
    assert "(different: memory.quantise)" in capsys.readouterr().out


def test_resume_needs_a_run_that_exists(job_file, capsys):
    assert main(["train", job_file(), "--resume"]) == 1
    assert "Leave --resume out to start it" in capsys.readouterr().err


def test_pause_resume_stop(job_file, tmp_path, capsys, until):
    path = job_file("slow")
    assert main(["train", path, "--detach"]) == 0
    run = find_run(tmp_path / "runs", "cat")
    until(run, "training")
    assert main(["pause", "cat", *_runs(tmp_path)]) == 0
    until(run, "paused")
    assert main(["pause", "cat", *_runs(tmp_path)]) == 1
    assert "cat is paused; only a run with a worker can be paused" in capsys.readouterr().err
    assert main(["resume", "cat", *_runs(tmp_path)]) == 0
    until(run, "training")
    assert main(["resume", "cat", *_runs(tmp_path)]) == 0
    assert main(["stop", str(run.folder)]) == 0
    until(run, "stopped")
    assert main(["status", *_runs(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("cat  stopped  1/5  20 %")


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_ctrl_c_detaches_and_the_run_goes_on(job_file, tmp_path, until):
    path = job_file("slow")
    main(["train", path, "--detach"])
    run = find_run(tmp_path / "runs", "cat")
    until(run, "training")
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where pytest is in the background\n"
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); from pathlib import Path\n"
        "from trainers.cli.runs import _start_and_follow; from trainers.run import Run\n"
        f"print('following', flush=True); sys.exit(_start_and_follow(Run(Path({str(run.folder)!r})), 'attached', False))"
    )
    follower = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert follower.stdout
        lines = [follower.stdout.readline(), follower.stdout.readline()]
        os.killpg(follower.pid, signal.SIGINT)
        printed, _ = follower.communicate(timeout=20)
        assert follower.returncode == 130
        assert lines[1].startswith("cat  training  1/5")
        assert "cat goes on in the background" in printed
        assert run.live
    finally:
        follower.kill()
        follower.communicate()
        run.request("stop")
        until(run, "stopped")


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_bar(make_job):
    run = Run.create(make_job(steps=4))
    run.event("training")
    run.metrics(step=1, loss=0.25, seconds=0.5)
    run.event("done")
    out = _Terminal()
    assert follow(run, out) == 0
    assert "[######------------------] cat  done  1/4  25 %  loss 0.2500  2.00 it/s" in out.getvalue()


class _Worker(io.StringIO):
    """What a follower writes to; its first line makes this worker say something and end."""

    def __init__(self, run: Run, *events: tuple[str, str]) -> None:
        super().__init__()
        self._run, self._events, self._life = run, events, ExitStack()
        self._life.enter_context(run.lock())

    def write(self, text: str) -> int:
        for name, message in self._events:
            self._run.event(name, message=message)
        self._events = ()
        self._life.close()
        return super().write(text)


def test_what_is_said_of_memory_is_told_and_an_event_that_is_not_known_is_no_matter(make_job, capsys):
    run, said = Run.create(make_job()), "9.1 of 11.0 GiB: 12 of 40 blocks are streamed"
    run.event("training")
    out = _Worker(run, ("memory", said), ("of a later version", "?"), ("done", ""))
    assert follow(run, out) == 0
    assert said in out.getvalue().splitlines()
    assert "?" not in out.getvalue().splitlines()
    main(["status", str(run.folder)])
    assert f"memory: {said}" in capsys.readouterr().out.splitlines()


def test_times_and_speeds():
    assert (clock(59.6), clock(3661), clock(100 * 3600)) == ("0:01:00", "1:01:01", "100:00:00")
    assert (speed(0.25), speed(12.5)) == ("4.00 it/s", "12.50 s/it")


def test_the_log_of_a_run_without_one_is_empty(make_job):
    assert launch.last_log_lines(Run.create(make_job())) == ""
