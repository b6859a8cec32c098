"""What a plan promises is what training takes: between 5 % less and 10 % more than the most that is allocated on the simulated GPU.

A plan that is too low ends in out of memory, or in a run that shrinks in its first step; one that is too high sends weights to
the host that the GPU has memory for.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from simulated_gpu import wide_models
from simulated_gpu.plans import Cell, cells, compared, compared_apart
from trainers.offload import blocks


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the models lie: each is written once."""
    return tmp_path_factory.mktemp("wide")


@pytest.fixture(autouse=True)
def small_inputs_are_offloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "_WORTH_COPYING_BYTES", 0)


def _parameter(cell: Cell) -> Any:
    marks = [pytest.mark.matrix] if cell.every else []
    return pytest.param(cell, id=str(cell), marks=marks)


@pytest.mark.parametrize("cell", [_parameter(cell) for cell in cells()])
def test_a_plan_is_the_peak(cell: Cell, files: Path, tmp_path: Path) -> None:
    """Without the batch and each allocation's rounding, plans were up to 13 % (TI2V 5B) and 19 % (Mochi) under."""
    found = list(compared(wide_models.job_of(cell, files, tmp_path), cell.arrangements))
    wrong = [str(one) for one in found if not one.is_right]
    assert not wrong, f"arrangement | planned MiB | peak MiB | ratio: {'; '.join(wrong)}"
    assert len(found) == len(cell.arrangements)


@pytest.mark.parametrize(
    ("variant", "size_factor"),
    [
        pytest.param("wan2.1-t2v", 1),
        pytest.param("wan2.2-ti2v", 1, marks=pytest.mark.matrix),
        pytest.param("ltxv-2b-0.9.5", 1, marks=pytest.mark.matrix),
        pytest.param("hunyuan-t2v", 1, marks=pytest.mark.matrix),
        pytest.param("mochi-1-preview", 1, marks=pytest.mark.matrix),
    ],
)
def test_previews_and_held_out_loss_take_what_is_planned(variant: str, size_factor: int, files: Path, tmp_path: Path) -> None:
    """No held-out clip takes more than a step; a preview takes what the plan says of sampling and of decoding, whichever is more."""
    job = wide_models.job_with_previews(variant, files, tmp_path, size_factor)
    held_out, preview = compared_apart(job)
    assert held_out.peak <= held_out.planned
    assert preview.is_right, str(preview)
