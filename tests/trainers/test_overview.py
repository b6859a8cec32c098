"""What a page is told about all runs: true, prompt for what moves, nearly free for what rests."""

from __future__ import annotations

import shutil
import time

import pytest

from trainers import overview as module
from trainers.launch import launch
from trainers.overview import Overview, changes, describe, details, thinned
from trainers.run import Run


def _ended(job, event="done", steps=3, **fields) -> Run:
    """A run that was trained, as its files tell."""
    run = Run.create(job)
    run.event("training", step=0, total_steps=steps)
    for step in range(1, steps + 1):
        run.metrics(step=step, loss=1.0 / step, seconds=0.5)
    run.event("checkpoint", step=steps, lora=f"{run.name}-{steps:06d}.safetensors")
    run.event(event, **fields)
    return run


def test_a_record_tells_what_the_run_is(make_job):
    run = _ended(make_job(), "failed", message="num_frames is 80")
    run.log_file.write_text("\n".join(f"line {i}" for i in range(100)))
    record = describe(run)
    assert {key: record[key] for key in ("name", "state", "live", "step", "message")} == {
        "name": "cat",
        "state": "failed",
        "live": False,
        "step": 3,
        "message": "num_frames is 80",
    }
    assert record["lora"] == "cat/cat-000003.safetensors"
    assert record["log"].splitlines() == [f"line {i}" for i in range(85, 100)]
    assert record["eta_seconds"] is None, "nothing is coming any more"
    assert record["created"] <= run.read_events()[-1]["time"] <= time.time()


def test_the_log_is_told_only_when_something_broke(make_job):
    run = _ended(make_job())
    run.log_file.write_text("all went well")
    assert describe(run)["log"] == ""


def test_a_run_without_events_has_a_record(make_job):
    run = Run.create(make_job())
    assert describe(run)["state"] == "new"
    assert describe(run)["created"] > time.time() - 60


def test_a_look_sees_new_changed_and_removed_runs(make_job, tmp_path):
    overview = Overview(tmp_path / "runs")
    assert overview.look() == {}
    cat, dog = _ended(make_job(name="cat")), _ended(make_job(name="dog"), "stopped")
    (tmp_path / "runs" / "no run").mkdir()
    before = overview.look()
    assert {name: record["state"] for name, record in before.items()} == {"cat": "done", "dog": "stopped"}
    assert changes(before, overview.look(thorough=True)) is None
    dog.event("queued")
    shutil.rmtree(cat.folder)
    after = overview.look(thorough=True)
    news = changes(before, after)
    assert news is not None
    assert [record["name"] for record in news["runs"]] == ["dog"]
    assert news["removed"] == ["cat"]


def test_a_run_that_takes_a_removed_runs_name_is_another_run(make_job, tmp_path):
    overview = Overview(tmp_path / "runs")
    shutil.rmtree(_ended(make_job(steps=3)).folder if overview.look() == {} else "")
    overview.look()
    _ended(make_job(steps=7), steps=7)
    assert overview.look(thorough=True)["cat"]["total_steps"] == 7


def test_a_live_run_is_followed_and_its_death_seen(stand_in, make_job, tmp_path, until):
    """No event tells of a kill, and no file changes: the lock does."""
    overview = Overview(tmp_path / "runs")
    run = Run.create(make_job("is killed"))
    assert overview.look()["cat"]["state"] == "new"
    launch(run)
    until(run, "interrupted")
    assert overview.look()["cat"]["state"] == "interrupted"
    slow = Run.create(make_job("slow", name="slow"))
    launch(slow)
    until(slow, "training")
    assert overview.look()["slow"]["live"]
    slow.request("stop")
    assert overview.look()["slow"]["request"] in ("stop", None)
    until(slow, "stopped")
    assert {key: overview.look()["slow"][key] for key in ("state", "live", "request")} == {
        "state": "stopped",
        "live": False,
        "request": None,
    }


def test_only_names_of_the_list_are_runs(make_job, tmp_path):
    _ended(make_job())
    overview = Overview(tmp_path / "runs")
    assert overview.find("cat") is not None
    for name in ("../runs/cat", "./cat", "cat/", str(tmp_path / "runs" / "cat"), "..", "", "dog", "..\\runs\\cat"):
        assert overview.find(name) is None, name


def test_ended_runs_are_not_read_again(make_job, tmp_path, monkeypatch):
    for i in range(20):
        _ended(make_job(name=f"cat-{i}"))
    overview = Overview(tmp_path / "runs")
    first = overview.look()
    looked: list[str] = []
    monkeypatch.setattr(module, "_LATELY_SECONDS", 0.0)
    monkeypatch.setattr(module, "_look_at", lambda known: looked.append(known.run.name))
    monkeypatch.setattr(module, "describe", lambda run: pytest.fail("nothing changed"))
    assert overview.look() == first
    assert looked == []
    monkeypatch.undo()
    monkeypatch.setattr(module, "describe", lambda run: pytest.fail("nothing changed"))
    assert overview.look(thorough=True) == first


def test_thinned_metrics_keep_the_mean_and_what_is_measured_now_and_then():
    metrics = [{"step": i, "loss": float(i % 2), "lr": i / 1000} for i in range(1, 1001)]
    metrics[499]["held_out_loss"] = 0.25
    points = thinned(metrics, 300)
    assert len(points) <= 300
    assert points[-1]["step"] == 1000
    assert all(point["loss"] == 0.5 for point in points)
    assert [point["held_out_loss"] for point in points if "held_out_loss" in point] == [0.25]
    assert thinned(metrics[:5], 300) == metrics[:5]
    assert thinned([], 300) == []


def test_a_loss_that_is_no_number_is_left_out():
    assert thinned([{"step": 1, "loss": None}, {"step": 2, "loss": 0.5}], 1) == [{"step": 2, "loss": 0.5}]


def test_details_hold_job_events_and_metrics(make_job):
    run = _ended(make_job())
    told = details(run)
    assert told["job"]["steps"] == 5
    assert [event["event"] for event in told["events"]] == ["training", "checkpoint", "done"]
    assert [line["step"] for line in told["metrics"]] == [1, 2, 3]
