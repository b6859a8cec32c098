"""The worker on a GPU: a process of its own, started as the nodes start it, from ComfyUI's environment."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from simulated_gpu.gpu_runs import ARRANGEMENTS, job_on, trained
from trainers.family import families
from trainers.job import Job
from trainers.launch import last_log_lines, launch
from trainers.measurements import Measurements
from trainers.plan import planned
from trainers.rates import rates_of
from trainers.run import HowFound, Run, attach_or_create
from trainers.training import lora_path

TESTS = Path(__file__).parents[1]
STEPS, EVERY = 16, 4
WAN = families()["wan"]


@pytest.fixture(autouse=True)
def comfyuis_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As ComfyUI leaves it for what it starts, with a GPU in every Python, and with locks of this test's own."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(TESTS / "simulated_gpu" / "site"), str(TESTS)]))
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "backend:cudaMallocAsync")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)


def job_in(folder: Path, **fields: Any) -> Job:
    """A job on the GPU, whose rates are known already: measuring them takes a CPU seconds."""
    values = {"steps": STEPS, "deterministic": True, "checkpoints": {"every_steps": EVERY}, "lora": {"rank": 2, "dropout": 0.1}}
    job = job_on("cuda:0", folder, WAN, WAN.variants[0], **(values | {"memory": ARRANGEMENTS["mapped"]} | fields))
    Path(job.runs_folder).mkdir(exist_ok=True)
    rates_of(torch.device("cuda", 0), torch.float32, None, Measurements(Path(job.runs_folder)))
    return job


def handed_over(job: Job) -> tuple[Run, HowFound, int]:
    """What Train LoRA does with a job: (the run, what it was, the worker's process id)."""
    job, plan = planned(job)
    assert plan is not None, "there is a GPU"
    run, how = attach_or_create(job)
    return run, how, launch(run)


def wait(run: Run, true: Callable[[], bool], patience_seconds: float = 120) -> None:
    give_up = time.monotonic() + patience_seconds
    while not true():
        assert time.monotonic() < give_up, f"{run.status()}\n{last_log_lines(run, 30)}"
        assert run.status().state not in ("failed", "interrupted"), f"{run.status()}\n{last_log_lines(run, 30)}"
        time.sleep(0.02)


def ended(run: Run) -> str:
    wait(run, lambda: run.status().ended)
    return run.status().state


def steps_of(run: Run) -> int:
    return run.status().step


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The run that nothing happens to, trained in this process."""
    return trained(planned(job_in(tmp_path_factory.mktemp("straight")))[0])


def assert_same(run: Run, straight: Run) -> None:
    """LoRAs byte for byte, and every step's numbers."""
    assert lora_path(run, STEPS).read_bytes() == lora_path(straight, STEPS).read_bytes()
    without_times = [[{**step, "seconds": 0, "vram_gib": 0} for step in one.read_metrics()] for one in (run, straight)]
    assert without_times[0] == without_times[1]


def test_a_run_that_is_paused_killed_and_resumed_leaves_the_same_lora(tmp_path: Path, straight: Run) -> None:
    """By three workers, each of them started by pressing Run."""
    job = job_in(tmp_path)
    run, how, worker = handed_over(job)
    assert how == "created"
    wait(run, lambda: steps_of(run) >= 1)
    run.request("pause")
    assert ended(run) == "paused"
    paused_at = steps_of(run)
    assert run.checkpoints() == [step for step in range(EVERY, paused_at, EVERY)] + [paused_at]
    assert paused_at < STEPS - EVERY, "it was paused in its midst"

    _, how, next_worker = handed_over(job)
    assert how == "resumed"
    assert worker != next_worker
    wait(run, lambda: steps_of(run) > paused_at)
    os.kill(next_worker, signal.SIGKILL)
    give_up = time.monotonic() + 20
    while run.live:
        assert time.monotonic() < give_up
        time.sleep(0.02)
    assert run.status().state == "interrupted"
    assert steps_of(run) < STEPS, "it was killed in its midst"

    assert handed_over(job)[1] == "resumed"
    assert ended(run) == "done"
    assert_same(run, straight)


@pytest.mark.matrix
def test_the_second_run_waits_for_the_gpu_and_has_the_allocator_it_was_designed_for(tmp_path: Path, straight: Run) -> None:
    """With ComfyUI's own one, of its environment, the limit on a run's memory would not hold."""
    first, *_ = handed_over(job_in(tmp_path / "first", name="first", steps=100_000))
    wait(first, lambda: steps_of(first) >= 1)
    second, *_ = handed_over(job_in(tmp_path / "second"))
    wait(second, lambda: second.status().message != "")
    assert (second.status().state, second.status().message) == ("queued", "waiting for cuda:0, which another run uses")
    step = steps_of(first)
    wait(first, lambda: steps_of(first) > step)
    assert second.read_metrics() == []
    first.request("stop")
    assert ended(first) == "stopped"
    assert ended(second) == "done"
    assert_same(second, straight)
    allocators = {event["allocator"] for run in (first, second) for event in run.read_events() if "allocator" in event}
    assert allocators == {"native, expandable segments"}
    assert all(step["vram_gib"] > 0 for step in second.read_metrics())
    assert "Traceback" not in last_log_lines(second, 1000)
