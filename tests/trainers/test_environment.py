"""What a worker is given of the environment that starts it."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from trainers import environment, launch
from trainers.job import Job
from trainers.run import Run

ALLOCATOR = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
WORKER = """
import json, os, sys
from pathlib import Path

sys.path.insert(0, {root!r})
from trainers.environment import use_memory_without_gaps

use_memory_without_gaps()
Path(sys.argv[1], "environment.json").write_text(json.dumps(dict(os.environ)))
"""


@pytest.fixture
def of_worker(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, make_job: Callable[..., Job]) -> Callable[..., dict[str, str]]:
    """The environment that a process started by `launch` computes in, when the starter's has these variables more."""
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER.format(root=str(Path(__file__).parents[2])))
    monkeypatch.setattr(launch, "WORKER", worker)

    def start(**variables: str) -> dict[str, str]:
        for name in ALLOCATOR:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        run = Run.create(make_job())
        launch.launch(run)
        found: dict[str, str] = json.loads((run.folder / "environment.json").read_text())
        return found

    return start


@pytest.mark.skipif(sys.platform != "linux", reason="torch has expandable segments on Linux only")
@pytest.mark.parametrize(
    ("users", "expected"),
    [
        (None, "expandable_segments:True"),
        ("max_split_size_mb:64", "max_split_size_mb:64,expandable_segments:True"),
        ("roundup_power2_divisions:[256:1,>:8]", "roundup_power2_divisions:[256:1,>:8],expandable_segments:True"),
        ("expandable_segments:False", "expandable_segments:False"),
    ],
)
def test_a_worker_has_its_own_allocator_and_not_comfyuis(
    of_worker: Callable[..., dict[str, str]], users: str | None, expected: str
) -> None:
    """Runs started in ComfyUI had cudaMallocAsync: no expandable segments, and a limit that the process could exceed."""
    comfyuis = "backend:cudaMallocAsync" if users is None else f"{users},backend:cudaMallocAsync"  # as its cuda_malloc.py writes it
    assert of_worker(PYTORCH_CUDA_ALLOC_CONF=comfyuis)["PYTORCH_CUDA_ALLOC_CONF"] == expected


@pytest.mark.skipif(sys.platform != "linux", reason="torch has expandable segments on Linux only")
def test_the_users_newer_setting_is_not_hidden_by_comfyuis_older(of_worker: Callable[..., dict[str, str]]) -> None:
    found = of_worker(PYTORCH_ALLOC_CONF="max_split_size_mb:64", PYTORCH_CUDA_ALLOC_CONF="backend:cudaMallocAsync")
    assert {name: found[name] for name in ALLOCATOR if name in found} == {
        "PYTORCH_ALLOC_CONF": "max_split_size_mb:64,expandable_segments:True"
    }


def test_a_worker_keeps_what_the_user_set_and_which_gpu_comfyui_uses(of_worker: Callable[..., dict[str, str]]) -> None:
    kept = {
        "CUDA_VISIBLE_DEVICES": "1",
        "HIP_VISIBLE_DEVICES": "1",
        "PYTORCH_NO_CUDA_MEMORY_CACHING": "0",
        "HF_HOME": "models",
        "WORLD": "1",
    }
    found = of_worker(**kept)
    assert {name: found.get(name) for name in kept} == kept


def test_a_worker_is_no_part_of_another_training(of_worker: Callable[..., dict[str, str]]) -> None:
    """A pack that runs a model on two GPUs leaves these in ComfyUI: the worker would wait for another process, for ever."""
    found = of_worker(RANK="0", LOCAL_RANK="0", WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT="29500", ACCELERATE_USE_FSDP="true")
    assert [name for name in found if re.match("ACCELERATE|.*RANK|WORLD_SIZE|MASTER", name)] == []


def test_windows_has_no_expandable_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment.sys, "platform", "win32")
    monkeypatch.setattr(environment.os, "environ", {})
    environment.use_memory_without_gaps()
    assert environment.os.environ == {}


def test_wsl_has_no_expandable_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """With them the first allocation on the GPU may end in "CUDA driver error: unknown error"."""
    monkeypatch.setattr(environment.platform, "release", lambda: "5.15.153.1-microsoft-standard-WSL2")
    monkeypatch.setattr(environment.os, "environ", {})
    environment.use_memory_without_gaps()
    assert environment.os.environ == {}


@pytest.mark.parametrize("name", ALLOCATOR)
def test_no_comma_is_left_over(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch cannot be imported with one too many."""
    monkeypatch.setattr(environment.os, "environ", {name: " backend : cudaMallocAsync , max_split_size_mb:64, ,"})
    assert environment.environment_of_worker() == {name: "max_split_size_mb:64"}
    monkeypatch.setattr(
        environment.os, "environ", {name: "max_split_size_mb:64,backend:cudaMallocAsync,pinned_use_background_threads:True"}
    )
    assert environment.environment_of_worker() == {name: "max_split_size_mb:64,pinned_use_background_threads:True"}
