"""The script for a real GPU runs every case on the simulated one, with tiny models: so it will run when there is a GPU."""

from __future__ import annotations

import importlib.util
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import simulated_gpu
from simulated_gpu.gpu_runs import forget_accelerate, in_use
from trainers import residency

sys.path.insert(0, str(Path(simulated_gpu.__file__).parents[1] / "benchmarks"))
import full_size  # first: it says where the others are
from cases import CASES

OURS = [case for case in CASES if case.kind != "peer"]
SOME = {"wan-14b 512x512x81 in 12 GiB"}


@pytest.mark.parametrize(
    "name", [pytest.param(case.name, marks=() if case.name in SOME else pytest.mark.matrix) for case in OURS], ids=lambda name: name
)
def test_a_case_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for change in ("go_offline", "use_memory_without_gaps"):  # they change the whole process
        monkeypatch.setattr(f"trainers.environment.{change}", lambda: None)
    if "compiled" in name:  # inductor needs Triton, which needs a real GPU: the same graph, run by torch's own operators
        monkeypatch.setattr(residency, "compiled", partial(residency.compiled, backend="aot_eager"))
        find = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: find("torch" if name == "triton" else name, *rest))
    forget_accelerate()
    before = in_use()
    found = measured(name, tmp_path)
    assert "error" not in found, found["trace"]
    assert found["step_seconds"] > 0
    assert found["card"]["peak_allocated_gib"] > 0
    assert found.get("met") in (True, None), "times mean nothing here; a cap does"
    assert in_use() == before


def measured(name: str, folder: Path) -> dict[str, Any]:
    out = folder / "result.json"
    arguments = ["--device", "cuda:0", "--tiny", "--in-process", "--folder", str(folder / "made"), "--out", str(out)]
    full_size.main([*arguments, "--cases", name.partition(",")[0]])
    (found,) = json.loads(out.read_text())["cases"]
    assert found["case"] == name
    return found
