"""Every family in the precision that a GPU is best at: the CPU's losses in it (which has no fp16: in float32)."""

from __future__ import annotations

from pathlib import Path

import pytest

from simulated_gpu import gpu
from simulated_gpu.gpu_runs import FIRST_VARIANTS, in_use, job_on, losses, trained
from trainers.errors import JobError
from trainers.family import Family, Variant
from trainers.plan import make_plan
from trainers.preflight import find_problems
from trainers.run import Run

IDS = [variant.id for _, variant in FIRST_VARIANTS]


def chosen(run: Run) -> tuple[str, str]:
    (event,) = [event for event in run.read_events() if event["event"] == "precision"]
    return event["precision"], event["message"]


@pytest.mark.parametrize("capability", [(7, 5), (8, 0)], ids=["T4", "A100"])
@pytest.mark.parametrize(("family", "variant"), FIRST_VARIANTS, ids=IDS)
def test_auto_learns_what_the_cpu_learns(tmp_path: Path, family: Family, variant: Variant, capability: tuple[int, int]) -> None:
    """A T4 trained every family in fp16: a night of a HunyuanVideo gave a LoRA that does nothing."""
    gpu.pretend_to_be("a GPU", capability)
    run = trained(job_on("cuda:0", tmp_path / "gpu", family, variant, precision="auto"))
    precision, message = chosen(run)
    on_cpu = job_on("cpu", tmp_path / "cpu", family, variant, precision="bf16" if precision == "bf16" else "fp32")
    expected = losses(trained(on_cpu))
    assert precision == ("bf16" if capability == (8, 0) else "fp16" if "fp16" in family.precisions else "fp32")
    assert message.startswith(f"Computes in {precision}: ")
    assert losses(run) == pytest.approx(expected, rel=1e-5 if precision == "fp32" else 2e-3)


@pytest.mark.parametrize(("family", "variant"), FIRST_VARIANTS, ids=IDS)
def test_fp16_is_refused_by_families_that_overflow_in_it(tmp_path: Path, family: Family, variant: Variant) -> None:
    job = job_on("cuda:0", tmp_path, family, variant, precision="fp16")
    if "fp16" in family.precisions:
        assert make_plan(job).precision.name == "fp16"
        return
    before = in_use()
    with pytest.raises(JobError, match=rf"precision is fp16; {family.title} computes in bf16 and fp32"):
        make_plan(job)
    assert in_use() == before


def test_a_run_that_began_in_fp16_goes_on(tmp_path: Path) -> None:
    """One of an older version, which let every family have it."""
    family, variant = next(pair for pair in FIRST_VARIANTS if "fp16" not in pair[0].precisions)
    job = job_on("cuda:0", tmp_path, family, variant, precision="fp16")
    assert len(list(find_problems(job))) == 1
    assert list(find_problems(job, started=True)) == []
