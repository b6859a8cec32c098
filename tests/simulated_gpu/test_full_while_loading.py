"""Another program takes the GPU between plan and load: the run ended with a bare OutOfMemoryError and no word of what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from simulated_gpu import gpu
from simulated_gpu.gpu_runs import ARRANGEMENTS, forget_accelerate, in_use, shared_job, trained
from trainers import training
from trainers.errors import RunError
from trainers.plan import make_plan
from trainers.run import Run
from trainers.training import open_training

pytestmark = pytest.mark.usefixtures("small_inputs_are_offloaded", "tables_of_bitsandbytes")


@contextmanager
def refused(message: str) -> Iterator[None]:
    """What is done within ends with this message, and leaves nothing in use."""
    before = in_use()
    with pytest.raises(RunError, match=message) as caught:
        yield
    del caught
    gpu.fail_allocations(-1, 0)
    assert in_use() == before


@pytest.mark.parametrize("quantise", ["none", "fp8", "nf4"])
def test_a_gpu_that_is_full_while_the_model_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quantise: str) -> None:
    run = Run.create(shared_job("cuda:0", tmp_path, "wan2.1-t2v", memory=ARRANGEMENTS["mapped"] | {"quantise": quantise}))
    forget_accelerate()
    load = training.load_transformer

    def load_on_a_full_gpu(*given: Any, **options: Any) -> Any:
        gpu.fail_allocations(0)
        return load(*given, **options)

    monkeypatch.setattr(training, "load_transformer", load_on_a_full_gpu)
    with refused(r"out of memory on cuda:0 while the model was loaded .*must stay free.*start the run again"):
        open_training(run)


def test_a_gpu_that_has_no_memory_even_for_a_plan(tmp_path: Path) -> None:
    """`plan` ended with a bare OutOfMemoryError."""
    job = shared_job("cuda:0", tmp_path, "wan2.1-t2v")
    gpu.fail_allocations(0)
    with refused(r"out of memory on cuda:0 while its speed was measured \(.* GiB are free\); half a GiB must be free .*Close other"):
        make_plan(job)


def test_a_resume_that_fails_half_way_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the session of a pause that is taken back the next attempt is made in the same process."""
    run = trained(shared_job("cuda:0", tmp_path, "wan2.1-t2v", memory=ARRANGEMENTS["pinned"]))
    before = in_use()

    def fails(*given: object) -> None:
        raise OSError("the drive is gone")

    forget_accelerate()
    with monkeypatch.context() as patch:
        patch.setattr("trainers.training._load_checkpoint", fails)
        with pytest.raises(OSError, match="the drive is gone") as caught:
            open_training(run)
    del caught
    assert in_use() == before
