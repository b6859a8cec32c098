"""A GPU that is full at any moment of a run: the run goes on and learns the same, or ends with a sentence that says what to do."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from simulated_gpu import gpu
from simulated_gpu.gpu_runs import ARRANGEMENTS, forget_accelerate, in_use, losses, shared_job, with_two_experts, with_videos
from trainers import previews, room, trainer
from trainers.errors import RunError
from trainers.job import Job
from trainers.run import Run

pytestmark = pytest.mark.usefixtures("small_inputs_are_offloaded", "tables_of_bitsandbytes")

POINTS, BURSTS = 100, {4: 10, 10: 10, 60: 10}
"""Of each case: single allocations that fail, spread over the whole run; runs of so many failures, and how many of them."""
WHOLE_RUNS = {"one expert, mapped": "hunyuan-t2v", "two experts, pinned": "wan2.2-t2v", "resident": "ltxv-2b-0.9"}
WHILE_LOADING = (
    r"out of memory on cuda:0 while (the model was loaded .*; .* must stay free|its speed was measured) .*\. Close other programs"
)
IN_THE_UPDATE = r"for the optimizer in step \d\. (No|The) checkpoint .*\. Close other programs"
Video = npt.NDArray[np.uint8]


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room.time, "sleep", lambda seconds: None)


def job_of(case: str, folder: Path) -> Job:
    """Three steps with previews before and after, and held-out loss."""
    ways = {"one expert, mapped": "mapped", "two experts, pinned": "pinned", "resident": "resident"}
    job = shared_job("cuda:0", folder, WHOLE_RUNS[case], memory=ARRANGEMENTS[ways[case]])
    return with_videos(with_two_experts(job) if "two" in case else job)


@dataclass(frozen=True)
class Outcome:
    """How a run ended. `said` is its error, `loaded` whether the model was there."""

    losses: list[float]
    held_out: list[float]
    videos: list[Video]
    allocations: int
    said: str = ""
    loaded: bool = True
    failed_in: str = ""

    @property
    def ended(self) -> str:
        """In a few words."""
        return "survived" if not self.said else "ended in the optimizer's step" if self.loaded else "ended in loading"


def run_of(case: str, folder: Path, after: int = 10**9, count: int = 0) -> Outcome:
    """A whole run in which allocations fail; afterwards nothing may be in use."""
    videos: list[Video] = []
    before = in_use()
    run, said = Run.create(job_of(case, folder)), ""
    forget_accelerate()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(previews, "write_video", lambda path, frames, fps: (videos.append(frames), path.write_bytes(b"video")))
        gpu.fail_allocations(after, count)
        try:
            assert trainer.train(run) == "done"
        except RunError as error:
            said = str(error)
        allocations, failed_in = gpu.module.allocations(), gpu.module.failed_in()
        gpu.fail_allocations(-1, 0)
    assert in_use() == before, "nothing may be left on the GPU or pinned"
    held_out = [line["held_out_loss"] for line in run.read_metrics() if "held_out_loss" in line]
    loaded = any("total_steps" in event for event in run.read_events())
    return Outcome(losses(run), held_out, videos, allocations, said, loaded, failed_in)


@lru_cache
def roomy(case: str) -> Outcome:
    """What a GPU makes that is never full."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        run_of(case, Path(folder) / "warm")
        found = run_of(case, Path(folder) / "measured")
    assert found.allocations > 1000
    assert len(found.losses) == 3
    assert len(found.videos) == 2
    assert len(found.held_out) == 1
    return found


def assert_equal(found: Outcome, expected: Outcome) -> None:
    """Parts of a sequence are summed in another order, so that the last bits may differ."""
    assert found.losses == pytest.approx(expected.losses, rel=1e-5)
    assert found.held_out == pytest.approx(expected.held_out, rel=1e-5)


def assert_same_videos(found: Outcome, expected: Outcome) -> None:
    assert len(found.videos) == len(expected.videos)
    for video, like in zip(found.videos, expected.videos, strict=True):
        assert np.abs(video.astype(int) - like.astype(int)).max() <= 1


def some(points: int) -> list[Any]:
    """Every 50th of the points is in `make test`."""
    return [pytest.param(point, marks=[] if point % 50 == 12 else [pytest.mark.matrix]) for point in range(points)]


@pytest.mark.parametrize("point", some(POINTS))
@pytest.mark.parametrize("case", WHOLE_RUNS)
def test_one_allocation_fails(tmp_path: Path, case: str, point: int, record_property: Callable[[str, object], None]) -> None:
    """Anywhere but in loading and in the optimizer's step, which cannot be done again, the run survives with the same videos."""
    expected = roomy(case)
    found = run_of(case, tmp_path, int((point + 0.5) / POINTS * expected.allocations), 1)
    assert found.failed_in
    record_property("outcome", found.ended)
    if found.said:
        assert re.search(IN_THE_UPDATE if found.loaded else WHILE_LOADING, found.said), found.said
        return
    assert_equal(found, expected)
    assert_same_videos(found, expected)


@pytest.mark.matrix
@pytest.mark.parametrize("count", BURSTS)
@pytest.mark.parametrize("case", WHOLE_RUNS)
def test_many_fail_in_a_row(tmp_path: Path, case: str, count: int, record_property: Callable[[str, object], None]) -> None:
    """Another program takes the GPU for a while: at least 8 of 10 runs go on; a preview may be left out. The others say why."""
    expected, survived, points = roomy(case), 0, BURSTS[count]
    for point in range(points):
        found = run_of(case, tmp_path / str(point), int((point + 0.5) / points * expected.allocations), count)
        record_property("outcome", f"{count} in a row: {found.ended}")
        if found.said:
            assert re.search(f"{WHILE_LOADING}|{IN_THE_UPDATE}", found.said), found.said
            continue
        assert_equal(found, expected)
        survived += 1
    assert survived >= 0.8 * points
