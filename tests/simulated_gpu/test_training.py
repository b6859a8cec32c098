"""Training on the GPU is training on the CPU: the same losses, nothing unordered, nothing left behind.

Every variant, each way to keep it, in each precision: all of them by `make gpu-matrix`, by `make test` a part in which each pair
of a family, a way and a precision comes, and each variant.
"""

from __future__ import annotations

import gc
import re
from itertools import count, product
from pathlib import Path
from typing import Any

import pytest

from simulated_gpu.gpu_runs import ARRANGEMENTS, VARIANTS, forget_accelerate, in_use, loss_on_cpu, losses, shared_job, trained
from trainers import trainer
from trainers.run import Run

pytestmark = pytest.mark.usefixtures("small_inputs_are_offloaded", "tables_of_bitsandbytes")

_BF16, _NF4 = {"precision": "bf16"}, {"memory": {"quantise": "nf4"}}
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any], float]] = {
    "fp32": ({}, {}, 1e-5),
    "bf16": (_BF16, _BF16, 2e-3),
    "fp16": ({"precision": "fp16"}, {}, 2e-3),
    "nf4": (_NF4, _NF4, 1e-5),
}
"""(fields of the job, those of the CPU's, which has no fp16, how far losses may be from the CPU's, relatively)."""


def kinds_of(variant_id: str) -> list[str]:
    """fp16 is Wan's alone: the others are not computed in it."""
    return [kind for kind in KINDS if kind != "fp16" or VARIANTS[variant_id][0].id == "wan"]


WHOLE = [(variant, way, kind) for variant in VARIANTS for way in ARRANGEMENTS for kind in kinds_of(variant)]


def pairwise() -> set[tuple[str, str, str]]:
    """A part of WHOLE in which each pair of (family, way), (family, kind) and (way, kind) comes, and each variant."""
    variants = {family: [name for name, (of, _) in VARIANTS.items() if of.id == family] for family in ("wan", "ltx", "hunyuan", "mochi")}
    turn, found = {family: count() for family in variants}, set()
    for (place, family), (shift, way) in product(enumerate(variants), enumerate(ARRANGEMENTS)):
        names = variants[family]
        name = names[next(turn[family]) % len(names)]
        kinds = kinds_of(name)
        found.add((name, way, kinds[(place + shift) % len(kinds)]))
        found |= {(name, way, "fp16")} if "fp16" in kinds else set()
    left = [name for name in VARIANTS if name not in {case[0] for case in found}]
    return found | {(name, list(ARRANGEMENTS)[index % len(ARRANGEMENTS)], "fp32") for index, name in enumerate(left)}


PART = pairwise()
CASES = [pytest.param(*case, id=": ".join(case), marks=[] if case in PART else [pytest.mark.matrix]) for case in WHOLE]


def all_blocks_streamed(run: Run) -> bool:
    """Whether the run says so after the probe, which may change what was planned."""
    found = [event["message"] for event in run.read_events() if event["event"] == "memory"]
    return bool(re.search(r"\b0 of \d+ blocks stay", found[-1]))


def test_the_part_has_every_pair() -> None:
    family = {name: VARIANTS[name][0].id for name in VARIANTS}
    for chosen in (lambda v, w, k: (family[v], w), lambda v, w, k: (family[v], k), lambda v, w, k: (w, k), lambda v, w, k: v):
        assert {chosen(*case) for case in PART} == {chosen(*case) for case in WHOLE}


@pytest.mark.parametrize(("variant", "way", "kind"), CASES)
def test_losses_are_those_of_the_cpu(tmp_path: Path, variant: str, way: str, kind: str) -> None:
    fields, on_cpu, tolerance = KINDS[kind]
    memory = ARRANGEMENTS[way] | fields.get("memory", {})
    run = trained(shared_job("cuda:0", tmp_path, variant, **fields | {"memory": memory}))
    assert losses(run) == pytest.approx(loss_on_cpu(variant, **on_cpu), rel=tolerance)
    assert all_blocks_streamed(run) == (way != "resident"), "stream = always streams every block of every step, after the probe too"


def test_nothing_is_left_even_before_objects_are_collected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A training is closed when it ends: whoever trains next in the process, or waits on a pause, would find the GPU full."""
    trained(shared_job("cuda:0", tmp_path / "warm", "wan2.1-t2v", memory=ARRANGEMENTS["pinned"]))
    run = Run.create(shared_job("cuda:0", tmp_path / "run", "wan2.1-t2v", memory=ARRANGEMENTS["pinned"]))
    forget_accelerate()
    before = in_use()
    monkeypatch.setattr(gc, "collect", lambda *_: 0)
    gc.disable()
    try:
        assert trainer.train(run) == "done"
        (on_gpu, *_), pinned = in_use()
    finally:
        gc.enable()
    assert pinned == before[1]
    assert on_gpu - before[0][0] < 100_000, "of the model only what is trained, 58 kB"
