"""Train LoRA on a (simulated) GPU: what ComfyUI's process hands down to the worker that it starts."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from comfy_server import Server
from graphs import node, training_graph

from trainers.demo import world
from trainers.run import Run

TESTS = Path(__file__).parents[1]


@pytest.fixture
def gpu_in_every_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """And ComfyUI's allocator, which its cuda_malloc.py chooses wherever torch is a build for CUDA."""
    monkeypatch.syspath_prepend(str(TESTS))
    from simulated_gpu.build import CannotBuildError, library

    try:
        library()
    except CannotBuildError as error:
        pytest.skip(str(error))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(TESTS / "simulated_gpu" / "site"), str(TESTS)]))


@pytest.mark.skipif(sys.platform == "win32", reason="the simulated GPU is built with g++")
def test_a_run_started_in_comfyui_trains_on_the_gpu(gpu_in_every_python: None, make_server: Callable[..., Server], tmp_path: Path) -> None:
    server = make_server("--cuda-malloc")
    world.write_clips(tmp_path, world.random_scenes(2, seed=5))
    settings = {"batch_size": 1, "rank": 2, "held_out_every": 0, "save_every": 2}
    graph = training_graph(str(tmp_path), steps=3, name="on-a-gpu", **settings) | {
        "wait": node("VideoTrainer_WaitForRun", run=["train", 0])
    }
    outputs = server.prompt(graph, timeout_seconds=900)["outputs"]
    assert "The plan" in outputs["train"]["text"][0], "there is a GPU"
    run = Run.open(server.base_directory / "user" / "__video_trainer" / "runs" / "on-a-gpu")
    assert run.status().state == "done"
    assert [step["vram_gib"] > 0 for step in run.read_metrics()] == [True] * 3
    assert [event["allocator"] for event in run.read_events() if "allocator" in event] == ["native, expandable segments"]
