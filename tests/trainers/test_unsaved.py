"""A checkpoint that cannot be written costs that checkpoint, not the training; a run whose last files are missing is not done."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_job

from trainers import previews, trainer
from trainers.demo.demo import VAE
from trainers.errors import RunError
from trainers.run import Run
from trainers.training import Training, lora_path

resource = pytest.importorskip("resource", reason="files are limited in size by POSIX")
Failure = Callable[[Run], AbstractContextManager[None]]


@contextmanager
def files_limited_to(size_bytes: int, run: Run) -> Iterator[None]:
    """Longer files cannot be written, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def checkpoints_held(run: Run) -> Iterator[None]:
    """No checkpoint gets its name, as when a program on Windows has one of its files open for longer than renames wait."""
    real = os.rename

    def held(source: Path, target: Path) -> None:
        if target.name.startswith("step-"):
            raise PermissionError(13, "it is used by another process", str(source), None, str(target))
        real(source, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "rename", held)
        yield


@contextmanager
def loras_folder_gone(run: Run) -> Iterator[None]:
    """The folder of LoRAs is on a drive that went away; a file is where it was."""
    folder = run.job.output_folder / run.name
    aside = folder.with_name("aside")
    if folder.exists():
        folder.rename(aside)
    folder.parent.mkdir(exist_ok=True)
    folder.touch()
    yield
    folder.unlink()
    if aside.exists():
        aside.rename(folder)


FULL = partial(files_limited_to, 4096)
NO_ROOM_FOR_OPTIMIZER = partial(files_limited_to, 120_000)


def run_in(folder: Path) -> Run:
    folder.mkdir()
    return Run.create(tiny_job(folder, steps=6, checkpoints={"every_steps": 2}))


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The LoRA of a run that nothing happened to."""
    run = run_in(tmp_path_factory.mktemp("straight") / "run")
    assert trainer.train(run) == "done"
    return lora_path(run, 6).read_bytes()


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[Failure, int], None]:
    """Lets the checkpoints of one step fail."""
    save = trainer.save_checkpoint

    def fail_at(failure: Failure, step: int) -> None:
        def fail(training: Training) -> None:
            if training.step != step:
                return save(training)
            with failure(training.run):
                return save(training)

        monkeypatch.setattr(trainer, "save_checkpoint", fail)

    return fail_at


def warnings(run: Run) -> list[str]:
    return [event["message"] for event in run.read_events() if event["event"] == "warning"]


def loras(run: Run) -> list[int]:
    return [int(file.stem[-6:]) for file in sorted((run.job.output_folder / run.name).iterdir())]


@pytest.mark.parametrize(
    ("failure", "why"),
    [
        (FULL, "File too large"),
        (NO_ROOM_FOR_OPTIMIZER, r"optimizer.pt could not be written, its disk has [\d,]+ MiB free"),
        (checkpoints_held, "it is used by another process"),
    ],
)
def test_training_goes_on_without_a_checkpoint_and_is_the_same(
    tmp_path: Path, failing: Callable[[Failure, int], None], expected: bytes, failure: Failure, why: str
) -> None:
    """The run ended in the middle of the night, because a virus scanner had a file open or another program had filled the disk."""
    failing(failure, 4)
    run = run_in(tmp_path / "run")
    assert trainer.train(run) == "done"
    (warning,) = warnings(run)
    assert re.fullmatch(f"the checkpoint of step 4 could not be saved: .*{why}.*; a resume would start from step 2", warning)
    assert run.checkpoints() == [2, 6]
    assert sorted(os.listdir(run.checkpoint_folder(2).parent)) == ["step-000002", "step-000006"]
    assert loras(run) == [2, 6], "a LoRA of step 4 would be in the way after a resume that computes another one"
    assert lora_path(run, 6).read_bytes() == expected


def test_a_resume_from_the_last_good_checkpoint_is_exact(
    tmp_path: Path, failing: Callable[[Failure, int], None], expected: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped on a full disk, a run said "stopped", and nothing of the steps since its last checkpoint was there."""
    failing(FULL, 4)
    run = run_in(tmp_path / "run")
    monkeypatch.setattr(Run, "requested", lambda which: "stop" if len(which.read_metrics()) == 4 else None)
    with pytest.raises(RunError, match=r"The run stopped at step 4, but the checkpoint of step 4 could .* it starts from step 2\."):
        trainer.train(run)
    assert run.status().warning.startswith("the checkpoint of step 4 could not be saved")
    monkeypatch.undo()
    run.clear("pause")
    assert trainer.train(run) == "done"
    assert [line["step"] for line in run.follow_metrics()[0]] == [1, 2, 3, 4, 3, 4, 5, 6]
    assert lora_path(run, 6).read_bytes() == expected
    assert run.status().warning == "", "it is over"


@pytest.mark.parametrize("full_at", [(3,), (3, 4)])
def test_a_pause_that_cannot_be_saved_is_put_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: bytes, full_at: tuple[int, ...]
) -> None:
    """On a full disk the run was "paused" without a checkpoint: the steps since the last one were lost, and nobody said so."""
    tried, save = [], trainer.save_checkpoint

    def save_on_a_full_disk(training: Training) -> None:
        tried.append(training.step)
        with FULL(training.run) if training.step in full_at else nullcontext():
            save(training)

    monkeypatch.setattr(trainer, "save_checkpoint", save_on_a_full_disk)
    run = run_in(tmp_path / "run")
    monkeypatch.setattr(Run, "requested", lambda which: "pause" if len(which.read_metrics()) >= 3 else None)
    assert trainer.train(run) == ("paused" if full_at == (3,) else "done")
    assert tried == ([2, 3, 4, 4] if full_at == (3,) else [2, 3, 4, 6]), "once, and then with the checkpoints"
    (warning,) = [warning for warning in warnings(run) if "pause" in warning]
    assert re.fullmatch(
        r"The run cannot pause yet: the checkpoint of step 3 could not be saved: .*File too large.*\. "
        r"It goes on and tries again at the next checkpoint, so that the steps since step 2 are not lost\. "
        r"Free disk space; to end it at once, stop it\.",
        warning,
    )
    monkeypatch.undo()
    if full_at == (3,):
        assert run.checkpoints() == [2, 4]
        assert trainer.train(run) == "done"
    assert [line["step"] for line in run.follow_metrics()[0]] == [1, 2, 3, 4, 5, 6]
    assert lora_path(run, 6).read_bytes() == expected


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # of TensorBoard
def test_metrics_on_a_full_disk_are_written_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run ended at the next step's line of metrics, although its checkpoints could wait for the disk to have space again."""
    report = trainer.report

    def report_on_a_full_disk(training: Training, metrics: dict[str, Any]) -> None:
        with files_limited_to(20, training.run) if training.step in (3, 4) else nullcontext():
            report(training, metrics)

    monkeypatch.setattr(trainer, "report", report_on_a_full_disk)
    (tmp_path / "run").mkdir()
    run = Run.create(tiny_job(tmp_path / "run", steps=6, tensorboard=True))
    assert trainer.train(run) == "done"
    assert [line["step"] for line in run.follow_metrics()[0]] == [1, 2, 3, 4, 5, 6]
    curves, files = warnings(run)
    assert re.fullmatch(r"TensorBoard's curves could not be written: .*File too large.* metrics\.jsonl has every step\.", curves)
    assert re.fullmatch(
        r"Events and metrics could not be written for a while \(.*File too large.*\)\. They are written now, and none is missing\.", files
    )


def test_a_lora_that_cannot_be_written_is_not_the_end(tmp_path: Path, failing: Callable[[Failure, int], None], expected: bytes) -> None:
    failing(loras_folder_gone, 4)
    run = run_in(tmp_path / "run")
    assert trainer.train(run) == "done"
    (warning,) = warnings(run)
    assert warning.startswith("tiny-000004.safetensors in ")
    assert warning.endswith("; a resume would start from step 4")
    assert lora_path(run, 6).read_bytes() == expected


@pytest.mark.parametrize(("failure", "from_step"), [(loras_folder_gone, 6), (FULL, 4)])
def test_a_run_without_its_last_lora_is_not_done_and_a_resume_writes_it(
    tmp_path: Path, failing: Callable[[Failure, int], None], expected: bytes, failure: Failure, from_step: int
) -> None:
    failing(failure, 6)
    run = run_in(tmp_path / "run")
    with pytest.raises(RunError, match=rf"All 6 steps are done, but .* could not be saved: .*it starts from step {from_step}\."):
        trainer.train(run)
    assert not lora_path(run, 6).exists()
    failing(failure, 0)
    assert trainer.train(Run.open(run.folder)) == "done"
    assert lora_path(run, 6).read_bytes() == expected


def test_a_run_that_has_its_last_lora_is_done_without_the_last_checkpoint(
    tmp_path: Path, failing: Callable[[Failure, int], None], expected: bytes
) -> None:
    """What it was started for is there; no more than `start.extends` from its last step is lost, and that is said."""
    failing(checkpoints_held, 6)
    run = run_in(tmp_path / "run")
    assert trainer.train(run) == "done"
    assert lora_path(run, 6).read_bytes() == expected
    assert len(warnings(run)) == 1
    assert run.checkpoints() == [2, 4]


def test_a_preview_that_cannot_be_saved_is_not_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sample = {"prompts": ["a preview"], "negative": "", "width": 64, "height": 64, "num_frames": 5, "sampling_steps": 2, "shift": 1.0}
    job = tiny_job(tmp_path, steps=2, previews=sample | {"every_steps": 2})
    run = Run.create(job.model_copy(update={"base": job.base.model_copy(update={"vae": str(VAE)})}))
    write = previews.write_video

    def on_a_full_disk(*args: Any) -> None:
        with FULL(run):
            write(*args)

    monkeypatch.setattr(previews, "write_video", on_a_full_disk)
    assert trainer.train(run) == "done"
    assert [warning[:44] for warning in warnings(run)] == [
        "the preview step-000000-0.mp4 could not be s",
        "the preview step-000002-0.mp4 could not be s",
    ]
    assert os.listdir(run.samples_folder) == []
    assert loras(run) == [2]
