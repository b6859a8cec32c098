"""Training a small random Wan in this process: it learns, it stops and goes on, it writes what it promises."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import TinyShape, as_fp8_scaled, tiny_job, write_encoded

from trainers import previews, residency, trainer
from trainers.demo.demo import VAE
from trainers.errors import JobError, RunError, VideoTrainerError
from trainers.job import Job, MemorySpec, parse_job
from trainers.run import Run, attach_or_create
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


@pytest.mark.parametrize("kind", ["bf16", "fp8_scaled"])
def test_stop_and_resume_in_bf16_and_over_an_fp8_base(tmp_path, kind):
    loras = []
    for name in ("straight", "stopped"):
        (tmp_path / name).mkdir()
        job = tiny_job(tmp_path / name, SHAPE, steps=4, precision="bf16", gradient_checkpointing=True)
        if kind == "fp8_scaled":
            as_fp8_scaled(Path(job.base.transformer))
        run = Run.create(job)
        if name == "stopped":
            run.metrics = stop_after(run, 2)
            assert train(run) == "stopped"
            run = Run.open(run.folder)
            run.clear("stop")
        assert train(run) == "done"
        loras.append(lora_path(run, 4).read_bytes())
    assert loras[0] == loras[1]


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


def test_what_a_run_began_with_may_be_gone_when_it_is_resumed(tmp_path):
    job = tiny_job(tmp_path, SHAPE, name="first", steps=2)
    first = Run.create(job)
    train(first)
    rest = Run.create(tiny_job_extending(job.model_copy(update={"steps": 5}), "first@2"))
    rest.metrics = stop_after(rest, 3)
    assert train(rest) == "stopped"
    shutil.rmtree(first.folder)
    again = Run.open(rest.folder)
    again.clear("stop")
    assert train(again) == "done"


def test_extends_refuses_what_would_not_be_the_same_run(tmp_path):
    job = tiny_job(tmp_path, SHAPE, name="first", steps=2)
    train(Run.create(job))
    changed = job.model_copy(update={"steps": 2, "batch_size": 3, "lora": job.lora.model_copy(update={"rank": 8})})
    with pytest.raises(JobError) as caught:
        train(Run.create(tiny_job_extending(changed, "first@2")))
    assert [str(problem).split(";")[0] for problem in caught.value.problems] == [
        "lora.rank is 8, in first it is 4",
        "batch_size is 3, in first it is 1",
        "steps is 2",
    ]


def test_a_run_that_goes_on_streamed_writes_the_same_lora(tmp_path, monkeypatch):
    """As after a card that was too small: `memory` is changed and the same job is trained again."""
    settings = {"steps": 4, "gradient_checkpointing": True, "lora": {"rank": 4, "dropout": 0.2}}
    (tmp_path / "straight").mkdir()
    (tmp_path / "changed").mkdir()
    straight = Run.create(tiny_job(tmp_path / "straight", TinyShape(layers=3), **settings))
    train(straight)
    streams, stream = [], residency.Stream
    monkeypatch.setattr(residency, "Stream", lambda *args: streams.append(stream(*args)) or streams[-1])
    job = tiny_job(tmp_path / "changed", TinyShape(layers=3), **settings)
    stopped, _ = attach_or_create(job)
    stopped.metrics = stop_after(stopped, 2)
    train(stopped)
    assert not streams
    again, how = attach_or_create(job.model_copy(update={"memory": MemorySpec(stream="always", activations="host")}))
    assert (again.folder, how, again.checkpoints()) == (stopped.folder, "resumed", [2])
    assert train(again) == "done"
    assert streams, "made in the second session, which asked for it"
    assert lora_path(straight, 4).read_bytes() == lora_path(again, 4).read_bytes(), "job hash in its metadata included"


def test_a_name_whose_loras_are_kept_is_not_taken_again(tmp_path):
    job = tiny_job(tmp_path, SHAPE, steps=1)
    run, _ = attach_or_create(job)
    train(run)
    shutil.rmtree(run.folder)
    again, how = attach_or_create(job)
    assert (again.name, how) == ("tiny-2", "created")


def test_a_step_that_is_not_finite_ends_the_run_before_the_lora_is_spoilt(tmp_path, monkeypatch):
    run = new_run(tmp_path, steps=4, checkpoints={"every_steps": 1})
    real = trainer.batch_loss

    def sometimes_nan(family, variant, transformer, batch):
        loss = real(family, variant, transformer, batch)
        return loss * float("nan") if len(run.read_metrics()) == 2 else loss

    monkeypatch.setattr(trainer, "batch_loss", sometimes_nan)
    with pytest.raises(RunError, match=r"in step 3; both must be finite.*step 2 is kept"):
        train(run)
    assert run.checkpoints() == [1, 2]


def test_a_preview_without_memory_is_told_and_training_goes_on(tmp_path, monkeypatch):
    run = Run.create(job_with_previews(tmp_path))

    def no_memory(*_, **__):
        raise torch.OutOfMemoryError("no")

    monkeypatch.setattr(previews, "sample_latents", no_memory)
    assert train(run) == "done"
    told = [event["message"].split()[0] for event in run.read_events() if event["event"] == "sample"]
    assert told == ["sampling", "no"] * 3, "before the first step, at step 2 and at the last"


def test_the_last_preview_comes_even_after_a_kill_before_it(tmp_path):
    run = Run.create(job_with_previews(tmp_path))
    assert train(run) == "done"
    files = sorted(path.name for path in run.samples_folder.iterdir())
    assert files == ["step-000000-0.mp4", "step-000002-0.mp4", "step-000003-0.mp4"]
    (run.samples_folder / files[-1]).unlink()
    train(Run.open(run.folder))
    assert sorted(path.name for path in run.samples_folder.iterdir()) == files


def job_with_previews(folder: Path) -> Job:
    job = tiny_job(folder, SHAPE, steps=3, base={"transformer": "", "vae": str(VAE)})
    transformer = str(folder / "tiny_wan2.1_t2v.safetensors")
    spec = {"every_steps": 2, "prompts": ["a preview"], "width": 32, "height": 32, "num_frames": 5, "sampling_steps": 2}
    return parse_job(job.model_dump(mode="json") | {"base": {"transformer": transformer, "vae": str(VAE)}, "previews": spec})


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
