"""Training a small random Wan in this process: it learns, it stops and goes on, it writes what it promises."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from tiny import TinyShape, tiny_job, write_encoded

from trainers.errors import JobError, RunError, VideoTrainerError
from trainers.run import Run
from trainers.trainer import train
from trainers.training import lora_path

SHAPE = TinyShape(layers=1)


def losses(run: Run) -> list[float]:
    return [line["loss"] for line in run.read_metrics()]


def events(run: Run) -> list[str]:
    return [event["event"] for event in run.read_events()]


def new_run(tmp_path, **fields) -> Run:
    return Run.create(tiny_job(tmp_path, SHAPE, **fields))


def test_it_learns(tmp_path):
    run = new_run(tmp_path, steps=40, batch_size=2, caption_dropout=0.0, held_out={"every_steps": 39}, optimizer={"learning_rate": 1e-2})
    assert train(run) == "done"
    held_out = [line["held_out_loss"] for line in run.read_metrics() if "held_out_loss" in line]
    assert sum(losses(run)[-10:]) < 0.9 * sum(losses(run)[:10])
    assert len(held_out) == 2


def test_a_step_tells_what_was_promised(tmp_path):
    run = new_run(tmp_path, steps=2, held_out={"every_steps": 2, "sigmas": [0.25, 0.75]})
    train(run)
    first, last = run.read_metrics()
    assert {"step", "epoch", "loss", "grad_norm", "lr", "sigma", "seconds"} <= set(first)
    assert last["held_out_loss"] == pytest.approx((last["held_out_loss_0.25"] + last["held_out_loss_0.75"]) / 2)
    assert run.status().total_steps == 2


def test_stop_and_resume_is_the_straight_run(tmp_path):
    (tmp_path / "straight").mkdir()
    (tmp_path / "stopped").mkdir()
    settings = {"steps": 6, "lora": {"rank": 4, "dropout": 0.2}, "checkpoints": {"every_steps": 4}, "gradient_checkpointing": True}
    straight = new_run(tmp_path / "straight", **settings)
    train(straight)
    stopped = new_run(tmp_path / "stopped", **settings)
    stopped.metrics = stop_after(stopped, 3)
    assert train(stopped) == "stopped"
    assert stopped.checkpoints() == [3]
    again = Run.open(stopped.folder)
    again.clear("stop")
    assert train(again) == "done"
    assert events(again)[-1] == "checkpoint"
    assert lora_path(straight, 6).read_bytes() == lora_path(again, 6).read_bytes()
    assert losses(straight) == losses(again)


def stop_after(run: Run, step: int):
    """Asks the run to stop once `step` has been reported."""
    write = Run.metrics.__get__(run)

    def metrics(**fields):
        write(**fields)
        if fields["step"] == step:
            run.request("stop")

    return metrics


def test_a_pause_before_the_first_step_writes_no_checkpoint(tmp_path):
    run = new_run(tmp_path)
    run.request("pause")
    assert train(run) == "paused"
    assert run.checkpoints() == []


def test_only_the_last_checkpoints_stay_and_every_lora(tmp_path):
    run = new_run(tmp_path, steps=6, checkpoints={"every_steps": 1, "keep_last": 2})
    train(run)
    assert run.checkpoints() == [5, 6]
    assert all(lora_path(run, step).exists() for step in range(1, 7))


def test_extends_goes_on_exactly(tmp_path):
    job = tiny_job(tmp_path, SHAPE, name="long", steps=8)
    long = Run.create(job)
    train(long)
    short = Run.create(job.model_copy(update={"name": "short", "steps": 5}))
    train(short)
    rest = Run.create(tiny_job_extending(job, "short@5"))
    train(rest)
    assert [line["step"] for line in rest.read_metrics()] == [6, 7, 8]
    expected, found = load_file(lora_path(long, 8)), load_file(lora_path(rest, 8))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)


def tiny_job_extending(job, run_at_step):
    values = job.model_dump(mode="json") | {"name": "rest", "start": {"extends": run_at_step}}
    return type(job).model_validate(values)


def test_initial_lora_is_where_it_starts(tmp_path):
    job = tiny_job(tmp_path, SHAPE, name="first", steps=5, optimizer={"learning_rate": 1e-2})
    first = Run.create(job)
    train(first)
    values = job.model_dump(mode="json") | {"name": "second", "steps": 1, "start": {"initial_lora": str(lora_path(first, 5))}}
    values["optimizer"] = values["optimizer"] | {"learning_rate": 1e-12, "weight_decay": 0.0}
    second = Run.create(type(job).model_validate(values))
    train(second)
    before, after = load_file(lora_path(first, 5)), load_file(lora_path(second, 1))
    assert all(torch.allclose(before[key], after[key], atol=1e-9) for key in before)


def test_epochs_are_counted_in_steps(tmp_path):
    run = new_run(tmp_path, steps=None, epochs=2, batch_size=2)
    train(run)
    assert len(run.read_metrics()) == 4
    assert [line["epoch"] for line in run.read_metrics()] == [0, 0, 1, 1]
    assert run.status().total_steps == 4


def test_all_problems_are_told_before_anything_is_loaded(tmp_path):
    run = new_run(
        tmp_path,
        encoded=str(tmp_path / "nowhere"),
        start={"initial_lora": str(tmp_path / "none.safetensors")},
        previews={"every_steps": 1, "prompts": ["a cat"], "num_frames": 80, "width": 100},
    )
    with pytest.raises(JobError) as caught:
        train(run)
    message = str(caught.value)
    for part in ("num_frames is 80", "Use 77 or 81", "width is 100", "base.vae is missing", "nowhere", "none.safetensors"):
        assert part in message


def test_a_run_does_not_go_on_over_other_data(tmp_path):
    run = new_run(tmp_path, steps=2)
    train(run)
    values = run.job.model_dump(mode="json") | {"name": "more", "steps": 4, "start": {"extends": "tiny@2"}}
    write_encoded(tmp_path / "encoded", SHAPE, clips=5)
    with pytest.raises(VideoTrainerError, match="the same clips"):
        train(Run.create(type(run.job).model_validate(values)))


def test_a_missing_checkpoint_to_extend_is_told(tmp_path):
    run = new_run(tmp_path, steps=2)
    train(run)
    values = run.job.model_dump(mode="json") | {"name": "more", "start": {"extends": "tiny@1"}}
    with pytest.raises((RunError, JobError), match="checkpoints of steps 2"):
        train(Run.create(type(run.job).model_validate(values)))


@pytest.mark.parametrize("kind", ["adamw8bit", "prodigy"])
def test_the_other_optimizers_train_and_resume(tmp_path, kind):
    settings = {"steps": 4, "lora": {"rank": 32}, "optimizer": {"kind": kind, "learning_rate": 1.0 if kind == "prodigy" else 1e-3}}
    (tmp_path / "straight").mkdir()
    (tmp_path / "stopped").mkdir()
    straight, stopped = new_run(tmp_path / "straight", **settings), new_run(tmp_path / "stopped", **settings)
    train(straight)
    stopped.metrics = stop_after(stopped, 2)
    train(stopped)
    again = Run.open(stopped.folder)
    again.clear("stop")
    train(again)
    assert lora_path(straight, 4).read_bytes() == lora_path(again, 4).read_bytes()
