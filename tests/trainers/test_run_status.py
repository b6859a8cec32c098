"""What a run says it is doing, from each thing that can have happened to it."""

from __future__ import annotations

import os

import pytest

from trainers.job import parse_job
from trainers.run import Run


@pytest.fixture
def run(tmp_path) -> Run:
    values = {"name": "cat", "base": {"transformer": "x"}, "encoded": "e", "steps": 100, "runs_folder": str(tmp_path)}
    return Run.create(parse_job(values))


def test_a_new_run(run):
    status = run.status()
    assert (status.state, status.live, status.ended, status.step, status.total_steps) == ("new", False, False, 0, 100)
    assert status.loss is status.seconds_per_step is status.eta_seconds is None


@pytest.mark.parametrize(
    ("events", "live", "dead"),
    [
        (["queued"], "queued", "interrupted"),
        (["queued", "training"], "training", "interrupted"),
        (["queued", "training", "checkpoint", "sample"], "training", "interrupted"),
        (["training", "paused"], "paused", "paused"),
        (["training", "paused", "resumed"], "training", "interrupted"),
        (["training", "stopped"], "stopped", "stopped"),
        (["training", "failed"], "failed", "failed"),
        (["training", "failed", "queued", "resumed", "done"], "done", "done"),
    ],
)
def test_a_run_without_a_worker_was_interrupted_unless_it_said_it_ended(run, events, live, dead):
    for event in events:
        run.event(event)
    assert run.status().state == dead
    assert run.status().ended
    with run.lock():
        assert run.status().state == live
        assert not run.status().ended


def test_progress_comes_from_the_last_lines(run):
    run.event("training", total_steps=80)
    for step in range(1, 41):
        run.metrics(step=step, loss=1.0 if step <= 20 else 0.5, seconds=2.0)
    status = run.status()
    assert (status.step, status.total_steps, status.loss, status.seconds_per_step) == (40, 80, 0.5, 2.0)
    assert status.eta_seconds == 80.0


def test_a_resumed_run_is_where_it_writes_not_where_it_was(run):
    for step in (1, 2, 3, 4, 2):
        run.metrics(step=step, loss=0.5, seconds=1.0)
    assert run.status().step == 2


def test_a_run_that_starts_again_has_no_pace_before_its_first_step(run):
    for step in (1, 2):
        run.metrics(step=step, loss=0.5, seconds=2.0)
    metrics = run.folder / "metrics.jsonl"
    os.utime(metrics, (metrics.stat().st_atime, metrics.stat().st_mtime - 60))
    run.event("resumed", step=2)
    assert run.status().seconds_per_step == 2.0, "the pace of a run that does not live is what it was"
    with run.lock():
        status = run.status()
        assert (status.step, status.loss, status.seconds_per_step, status.eta_seconds) == (2, 0.5, None, None)
        run.metrics(step=3, loss=0.5, seconds=2.0)
        assert run.status().eta_seconds == 2.0 * 97


def test_a_loss_that_is_no_number_is_left_out(run):
    run.metrics(step=1, loss=float("nan"), seconds=1.0)
    run.metrics(step=2, loss=0.5, seconds=1.0)
    assert run.status().loss == 0.5


def test_the_error_of_a_failed_run_is_its_message(run):
    run.event("training")
    run.event("failed", message="num_frames is 80; Wan needs 4n+1. Use 77 or 81.")
    assert run.status().message.startswith("num_frames is 80")


def test_steps_that_compile_do_not_count_in_the_pace(run):
    run.event("training", total_steps=10)
    for step, seconds in ((1, 120.0), (2, 45.0), (3, 2.0), (4, 3.0), (5, 2.0), (6, 5.0)):
        run.metrics(step=step, loss=0.5, seconds=seconds)
    assert run.status().seconds_per_step == 3.0


def test_it_says_what_was_last_said_of_memory_whatever_else_is_written(run):
    assert run.status().memory == ""
    run.event("queued", message="waiting for cuda:0, which another run uses")
    run.event("memory", message="9.1 of 11.0 GiB: 12 of 40 blocks are streamed")
    run.event("training", total_steps=10)
    assert run.status().memory == "9.1 of 11.0 GiB: 12 of 40 blocks are streamed"
    run.event("memory", message="memory ran out: 16 of 40 blocks are streamed from here on")
    run.event("of a later version", memory=3, total_steps=None)
    with run.lock():
        status = run.status()
    assert (status.state, status.memory) == ("training", "memory ran out: 16 of 40 blocks are streamed from here on")
    run.event("memory")
    assert run.status().memory == ""
