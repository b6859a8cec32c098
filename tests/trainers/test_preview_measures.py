"""A training measures its previews, writes what it found where others read it, and survives whatever goes wrong with it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from tiny import TinyShape, tiny_job
from tiny_clip import write_clip

from trainers import preview_measures, previews
from trainers.adherence import adherence
from trainers.cli.follow import _news
from trainers.cli.runs import describe as describe_in_words
from trainers.demo.demo import VAE
from trainers.errors import JobError
from trainers.job import parse_job
from trainers.overview import describe
from trainers.preflight import check
from trainers.run import Run
from trainers.run_status import last_measures
from trainers.trainer import train
from trainers.video_measures import measure

SHAPE = TinyShape(layers=1)


def new_run(folder: Path, clip_folder: Path | None = None) -> Run:
    job = tiny_job(folder, SHAPE, steps=2)
    base = {"transformer": job.base.transformer, "vae": str(VAE)}
    spec = {"every_steps": 2, "prompts": ["a preview", ""], "width": 32, "height": 32, "num_frames": 5, "sampling_steps": 1}
    values = job.model_dump(mode="json") | {"base": base, "previews": spec | {"clip_folder": clip_folder and str(clip_folder)}}
    return Run.create(parse_job(values))


def samples(run: Run) -> list[dict]:
    return [event for event in run.read_events() if event["event"] == "sample"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Run, dict]:
    """A run that was trained, with previews of two prompts at steps 0 and 2, and {file: (its prompt, its frames)}."""
    folder, written = tmp_path_factory.mktemp("measured"), {}
    run = new_run(folder, write_clip(folder / "clip"))
    write = previews.write_video
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(previews, "write_video", lambda path, frames, fps: written.update({path.name: frames}) or write(path, frames, fps))
        assert train(run) == "done"
    return run, written


def test_each_preview_is_measured_in_its_event(trained):
    run, written = trained
    told = {step: event["measures"] for event in samples(run) if (step := event["step"]) is not None and event["files"]}
    assert {step: sorted(files) for step, files in told.items()} == {
        step: [f"step-{step:06d}-{i}.mp4" for i in range(2)] for step in (0, 2)
    }
    for file, measures in (told[0] | told[2]).items():
        prompt = ("a preview", "")[int(file[-5])]
        fits = adherence(Path(run.job.previews.clip_folder), [(prompt, written[file])])[0]
        assert measures == pytest.approx(measure(written[file]) | {"adherence": fits}, abs=1e-6)


def test_the_newest_measures_are_told_as_means(trained):
    run, _ = trained
    by_file = samples(run)[-1]["measures"].values()
    means = {name: sum(measures[name] for measures in by_file) / 2 for name in ("flicker", "consistency", "sharpness", "adherence")}
    assert describe(run)["measures"] == pytest.approx({"step": 2} | means)
    sentence = f"flicker {means['flicker']:.1%}, consistency {means['consistency']:.2f}, sharpness {means['sharpness']:.0f}"
    (line,) = [line for line in describe_in_words(run).splitlines() if line.startswith("previews of step")]
    assert line == f"previews of step 2: {sentence}, fits the prompt {means['adherence']:.2f}"
    assert "measures=" not in describe_in_words(run)
    assert _news(samples(run)[-1]) == f"preview at step 2: {sentence}, fits the prompt {means['adherence']:.2f}"


def test_previews_that_are_there_already_are_not_measured_again(trained):
    run, _ = trained
    before = len(samples(run))
    train(Run.open(run.folder))
    assert len(samples(run)) == before


def test_a_run_that_measured_nothing_has_no_measures():
    assert (
        last_measures([{"event": "sample", "step": 5, "files": []}, {"event": "sample", "step": 5, "files": ["a"], "measures": {}}]) is None
    )
    torn = {"a.mp4": {"flicker": 0.5, "consistency": None}, "b.mp4": {"sharpness": 3.0, "flicker": 0.1}}
    events = [{"event": "sample", "step": 7, "files": ["a.mp4"], "measures": torn}, {"event": "checkpoint", "step": 8}]
    assert last_measures(events) == pytest.approx({"step": 7, "flicker": 0.3, "sharpness": 3.0})


def test_a_measure_that_fails_is_told_and_training_goes_on(tmp_path, monkeypatch):
    clip = write_clip(tmp_path / "clip")
    run = new_run(tmp_path, clip)

    def no_opencv(frames):
        shutil.rmtree(clip, ignore_errors=True)  # what preflight found good may be gone later
        raise ImportError("libGL.so.1 is missing")

    monkeypatch.setattr(preview_measures, "measure", no_opencv)
    assert train(run) == "done"
    assert run.latest_checkpoint() == 2
    first, *failures, done = [event for event in samples(run) if event["step"] == 0]
    assert first["message"].startswith("sampling 2 previews")
    assert [failure["message"].split(" cannot be measured (")[0] for failure in failures] == [
        "step-000000-0.mp4",
        "step-000000-1.mp4",
        "how the previews fit their prompts",
    ]
    assert "ImportError: libGL.so.1 is missing); training goes on without it" in failures[0]["message"]
    assert done["files"] == ["step-000000-0.mp4", "step-000000-1.mp4"]
    assert done["measures"] == {}
    assert describe(run)["measures"] is None


def test_without_a_folder_no_model_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(preview_measures, "adherence", None)
    run = new_run(tmp_path)
    assert train(run) == "done"
    assert samples(run)[-1]["measures"]["step-000002-0.mp4"].keys() == {"flicker", "consistency", "sharpness"}
    assert not any("cannot be measured" in event.get("message", "") for event in samples(run))


def test_a_wrong_folder_is_told_with_the_other_problems_before_anything_is_loaded(tmp_path):
    job = new_run(tmp_path, tmp_path / "none").job
    with pytest.raises(JobError, match=r"previews.clip_folder is '.*none'; there is no such folder; it must be the folder of a CLIP"):
        check(job)
    check(parse_job(job.model_dump(mode="json") | {"previews": {"clip_folder": str(tmp_path / "none")}}))


def test_the_folder_of_a_job_starts_where_the_job_is(tmp_path):
    job = new_run(tmp_path).job
    relative = parse_job(job.model_dump(mode="json") | {"previews": {"clip_folder": "clip"}})
    assert relative.with_absolute_paths(tmp_path).previews.clip_folder == str(tmp_path / "clip")
    assert job.with_absolute_paths(tmp_path).previews.clip_folder is None
