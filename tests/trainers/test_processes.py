"""Two processes are one with twice the accumulation: the same samples, the same steps."""

from __future__ import annotations

import time

import pytest
import torch
from safetensors.torch import load_file
from tiny import TinyShape, tiny_job

from trainers import launch
from trainers.run import Run
from trainers.training import lora_path


def test_two_processes_train_what_one_does(tmp_path):
    # Adam with a small epsilon divides what is nearly zero by itself: the last bit of a sum would decide a sign.
    settings = {"optimizer": {"epsilon": 0.1, "learning_rate": 0.01}, "steps": 4, "caption_dropout": 0.0, "checkpoints": {"every_steps": 2}}
    runs = []
    for processes, accumulation in ((1, 2), (2, 1)):
        folder = tmp_path / str(processes)
        folder.mkdir()
        run = Run.create(tiny_job(folder, TinyShape(layers=1), accumulation=accumulation, **settings))
        launch.launch(run, processes)
        give_up = time.monotonic() + 180
        while not run.status().ended:
            assert time.monotonic() < give_up
            time.sleep(0.2)
        assert run.status().state == "done", launch.last_log_lines(run, 40)
        runs.append(run)
    alone, together = runs
    for expected, found in zip(alone.read_metrics(), together.read_metrics(), strict=True):
        for value in ("loss", "grad_norm", "sigma"):
            assert found[value] == pytest.approx(expected[value], rel=1e-5)
    expected, found = load_file(lora_path(alone, 4)), load_file(lora_path(together, 4))
    for name in expected:
        assert torch.linalg.norm(found[name] - expected[name]) < 1e-4 * torch.linalg.norm(expected[name]), name
