"""A tensor that is missing, or has another shape than in its siblings, is told from the header."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from model_files import T2V_1_3B, Shapes, entries, shapes_of, write_header_only

from trainers.checkpoint import Checkpoint
from trainers.even_blocks import block_problem
from trainers.inspection import inspect_file

PUBLISHED = sorted(path.stem for path in (Path(__file__).parents[1] / "assets" / "keys").glob("*.json") if not path.stem.startswith("vae"))


def file(folder: Path, shapes: Shapes) -> Path:
    return write_header_only(folder / "model.safetensors", entries(shapes, torch.bfloat16))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_are_even(tmp_path: Path, name: str) -> None:
    assert block_problem(Checkpoint.open(file(tmp_path, shapes_of(name)))) is None


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    shapes = {name: shape for name, shape in shapes_of(T2V_1_3B).items() if name != "blocks.5.ffn.0.weight"}
    report = inspect_file(file(tmp_path, shapes))
    assert report.problems == ("blocks.5.ffn.0.weight is missing; the blocks of a model are alike. Download the file again.",)


def test_another_shape_is_named(tmp_path: Path) -> None:
    shapes = shapes_of(T2V_1_3B) | {"blocks.3.ffn.0.weight": (100, 1536)}
    problem = block_problem(Checkpoint.open(file(tmp_path, shapes)))
    assert problem is not None
    assert problem.value == "blocks.3.ffn.0.weight is [100, 1536], not [8960, 1536] as in the other blocks"
