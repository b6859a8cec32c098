"""The run folder: its names, what is read back, and who gets which run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from trainers import step_folders
from trainers.errors import JobError, RunError
from trainers.job import Job, MemorySpec, parse_job
from trainers.run import Run, attach_or_create, find_run, list_runs, not_taken

ROOT = Path(__file__).parents[2]


@pytest.fixture
def job(tmp_path) -> Job:
    return parse_job(
        {
            "name": "cat",
            "base": {"transformer": "wan.safetensors"},
            "encoded": "encoded",
            "steps": 100,
            "runs_folder": str(tmp_path / "runs"),
        }
    )


def _finish(run: Run, event: str) -> None:
    run.event("training")
    run.event(event)


def test_a_new_run_has_the_promised_names(job):
    run = Run.create(job)
    assert sorted(path.name for path in run.folder.iterdir()) == ["checkpoints", "control", "job.json", "samples"]
    run.event("training")
    run.metrics(step=1, loss=0.5)
    run.request("pause")
    with run.writing_checkpoint(500):
        pass
    with run.lock():
        pass
    found = " ".join(sorted(path.relative_to(run.folder).as_posix() for path in run.folder.rglob("*")))
    assert found == "checkpoints checkpoints/step-000500 control control/pause events.jsonl job.json metrics.jsonl samples worker.lock"
    assert json.loads((run.folder / "job.json").read_text())["schema_version"] == 1


def test_the_job_is_read_back_equal(job):
    assert Run.open(Run.create(job).folder).job == job.with_absolute_paths(Path.cwd())


def test_a_folder_has_one_run(job):
    run = Run.create(job)
    with pytest.raises(RunError, match="exists already"):
        Run.create(job)
    assert [path.name for path in run.folder.parent.iterdir()] == ["cat"]


def test_a_runs_folder_that_is_a_file_is_said(job, tmp_path):
    (tmp_path / "runs").write_text("")
    with pytest.raises(RunError, match="Change runs_folder"):
        Run.create(job)
    with pytest.raises(RunError, match="Change runs_folder"):
        attach_or_create(job)


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(RunError, match=r"has no job\.json"):
        Run.open(tmp_path)
    (tmp_path / "job.json").write_text("{")
    with pytest.raises(RunError, match="cannot be read"):
        Run.open(tmp_path)
    (tmp_path / "job.json").write_text("[]")
    with pytest.raises(JobError, match="is no object"):
        Run.open(tmp_path)


@pytest.mark.parametrize("name", ["nul", "COM1.x", "cat."])
def test_names_that_windows_cannot_have_are_refused(job, name):
    with pytest.raises(JobError, match="Windows cannot have a folder of that name"):
        parse_job({**job.model_dump(), "name": name})


def test_events_carry_their_time(job):
    run = Run.create(job)
    run.event("queued", device="cpu")
    (event,) = run.read_events()
    assert event["event"] == "queued"
    assert event["device"] == "cpu"
    assert event["time"] > 1.7e9


def test_the_last_line_of_a_step_counts(job):
    run = Run.create(job)
    for step, loss in ((1, 0.9), (2, 0.8), (3, 0.7), (2, 0.6)):
        run.metrics(step=step, loss=loss)
    with (run.folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "loss"')
    assert run.read_metrics() == [{"step": 1, "loss": 0.9}, {"step": 2, "loss": 0.6}, {"step": 3, "loss": 0.7}]


def test_metrics_are_followed_from_where_one_was(job):
    run = Run.create(job)
    run.metrics(step=1)
    _, offset = run.follow_metrics()
    run.metrics(step=2)
    assert run.follow_metrics(offset)[0] == [{"step": 2}]
    assert run.follow_events() == ([], 0)


def test_stopping_goes_before_pausing(job):
    run = Run.create(job)
    assert run.requested() is None
    run.request("pause")
    assert run.requested() == "pause"
    run.request("stop")
    assert run.requested() == "stop"
    run.clear("stop")
    run.clear("stop")
    assert run.requested() == "pause"


def test_old_checkpoints_go(job):
    run = Run.create(job)
    assert run.latest_checkpoint() is None
    for step in (10, 20, 1_000_000):
        with run.writing_checkpoint(step) as folder:
            (folder / "position.json").write_text("{}")
    run.prune_checkpoints(keep_last=2)
    assert run.checkpoints() == [20, 1_000_000]
    assert run.latest_checkpoint() == 1_000_000
    assert (run.checkpoint_folder(20) / "position.json").exists()


def test_a_checkpoint_that_cannot_be_removed_ends_nothing_and_goes_the_next_time(job, monkeypatch):
    run = Run.create(job)
    for step in (10, 20, 30, 40):
        with run.writing_checkpoint(step):
            pass

    def held(source: Path, target: Path, **patience: float) -> None:
        if source.name == "step-000010":
            raise PermissionError("open in the Explorer")
        os.rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(step_folders, "rename", held)
        run.prune_checkpoints(keep_last=2)
    assert run.checkpoints() == [10, 30, 40]
    run.prune_checkpoints(keep_last=2)
    assert run.checkpoints() == [30, 40]


def test_tidying_removes_the_half_written_lora_of_a_killed_worker(job, tmp_path):
    run = Run.create(job.model_copy(update={"loras_folder": str(tmp_path / "loras")}))
    run.tidy()
    loras = tmp_path / "loras/cat"
    loras.mkdir(parents=True)
    for name in ("cat-000010.safetensors", ".cat-000020.safetensors.17.partial"):
        (loras / name).touch()
    run.tidy()
    assert [path.name for path in loras.iterdir()] == ["cat-000010.safetensors"]


# attach_or_create


def test_the_same_job_is_the_same_run(job):
    first, how = attach_or_create(job)
    assert how == "created"
    again, how = attach_or_create(job)
    assert (again.folder, how) == (first.folder, "resumed")
    with first.lock():
        assert attach_or_create(job)[1] == "attached"
    _finish(first, "done")
    assert attach_or_create(job)[1] == "done"


@pytest.mark.parametrize("event", ["stopped", "failed", "paused", "training"])
def test_a_run_that_is_not_done_is_taken_up_again(job, event):
    run, _ = attach_or_create(job)
    _finish(run, event)
    run.request("stop")
    run.request("pause")
    again, how = attach_or_create(job)
    assert (again.folder, how) == (run.folder, "resumed")
    assert run.requested() is None


def test_a_changed_job_is_a_new_run(job):
    changed = job.model_copy(update={"steps": 200})
    third = job.model_copy(update={"steps": 300})
    names = [attach_or_create(each)[0].name for each in (job, changed, third)]
    assert names == ["cat", "cat-2", "cat-3"]
    assert attach_or_create(changed)[0].job.name == "cat-2"
    again, how = attach_or_create(third)
    assert (again.name, how) == ("cat-3", "resumed")


def test_a_run_goes_on_with_other_memory_settings(job):
    run, _ = attach_or_create(job)
    smaller = job.model_copy(update={"memory": MemorySpec(vram_gib=10, stream="always", host="pinned", activations="host", chunks=4)})
    with run.lock():
        again, how = attach_or_create(smaller)
        assert (again.folder, how) == (run.folder, "attached")
        assert again.job.memory == job.memory, "a worker is at it"
        assert "pause it" in not_taken(again, smaller)
    again, how = attach_or_create(smaller)
    assert (again.folder, how) == (run.folder, "resumed")
    written = smaller.with_absolute_paths(Path.cwd()).canonical_json()
    assert Run.open(run.folder).job.canonical_json() == again.job.canonical_json() == written
    assert not_taken(again, smaller) == ""
    told = again.read_events()[-1]
    assert (told["event"], told["message"].split(", ")[0]) == ("memory", "goes on with other memory settings: vram_gib 10.0 (before: None)")
    assert again.status().state == "new"
    assert smaller.hash() == job.hash(), "it trains the same"
    _finish(run, "done")
    assert attach_or_create(job)[1] == "done"
    assert Run.open(run.folder).job.canonical_json() == written, "as it was trained"


def test_a_run_under_a_number_keeps_it_with_other_memory_settings(job):
    attach_or_create(job)
    changed = job.model_copy(update={"steps": 200})
    attach_or_create(changed)
    run, _ = attach_or_create(changed.model_copy(update={"memory": MemorySpec(vram_gib=10)}))
    assert (run.name, run.job.name, run.job.steps, run.job.memory.vram_gib) == ("cat-2", "cat-2", 200, 10)


def test_other_weights_are_another_run(job):
    attach_or_create(job)
    quantised = job.model_copy(update={"memory": MemorySpec(quantise="fp8")})
    assert attach_or_create(quantised)[0].name == "cat-2"
    assert quantised.hash() != job.hash()


def test_a_deleted_first_run_does_not_hide_the_second(job):
    changed = job.model_copy(update={"steps": 200})
    first, second = attach_or_create(job)[0], attach_or_create(changed)[0]
    (first.folder / "job.json").unlink()
    assert attach_or_create(changed)[0].folder == second.folder
    assert attach_or_create(job)[0].name == "cat-3"


def test_the_longest_name_gets_a_number_too(job):
    job = job.model_copy(update={"name": "n" * 100})
    attach_or_create(job)
    changed = job.model_copy(update={"steps": 200})
    run, _ = attach_or_create(changed)
    assert run.name == "n" * 98 + "-2"
    assert Run.open(run.folder).job.name == run.name
    assert attach_or_create(changed)[0].folder == run.folder


def test_relative_and_absolute_paths_are_the_same_job(job, tmp_path, monkeypatch):
    run, _ = attach_or_create(job.with_absolute_paths(tmp_path))
    monkeypatch.chdir(tmp_path)
    relative = job.model_copy(update={"runs_folder": "runs"})
    assert attach_or_create(relative)[0].folder == run.folder


def test_the_same_job_at_the_same_time_is_one_run(job, tmp_path):
    (tmp_path / "job.json").write_text(job.canonical_json())
    code = (
        "import sys; from pathlib import Path; from trainers.job import read_job; from trainers.run import attach_or_create\n"
        "run, how = attach_or_create(read_job(Path(sys.argv[1]))); print(run.name, how)"
    )

    def start(_: int) -> str:
        command = [sys.executable, "-c", code, str(tmp_path / "job.json")]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    with ThreadPoolExecutor(3) as pool:
        answers = sorted(pool.map(start, range(3)))
    assert answers == ["cat created", "cat resumed", "cat resumed"]


# list_runs, find_run


def test_runs_are_found_by_name_and_by_path(job, tmp_path):
    run = Run.create(job)
    runs_folder = tmp_path / "runs"
    assert find_run(runs_folder, "cat").folder == run.folder
    assert find_run(tmp_path / "elsewhere", str(run.folder)).folder == run.folder
    with pytest.raises(RunError, match="Runs there: cat"):
        find_run(runs_folder, "cta")
    with pytest.raises(RunError, match="There are no runs there"):
        find_run(tmp_path / "elsewhere", "cat")


def test_only_runs_are_listed(job, tmp_path):
    Run.create(job)
    Run.create(job.model_copy(update={"name": "ant"}))
    (tmp_path / "runs" / "folder").mkdir()
    broken = tmp_path / "runs" / "broken"
    broken.mkdir()
    (broken / "job.json").write_text("{")
    assert [run.name for run in list_runs(tmp_path / "runs")] == ["ant", "cat"]
    assert list_runs(tmp_path / "none") == []
