"""What "auto" chooses, what it says about it, and what is refused before anything is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from model_files import fp8_entries, shapes_of, write_header_only
from tiny import tiny_job
from tiny_families import TINY

from trainers.device import Hardware, no_gpu_problem, pick_precision, precision_problem
from trainers.errors import JobError
from trainers.family import Family, families
from trainers.job import Job, SpeedSpec, parse_job
from trainers.machine import card_of
from trainers.plan import make_plan
from trainers.preflight import check_settings, find_problems
from trainers.run import Run
from trainers.trainer import train

RTX, T4, GTX_16 = Hardware.cuda("RTX 4090", True), Hardware.cuda("T4", False), Hardware.cuda("NVIDIA GeForce GTX 1660", False)
CPU, APPLE = Hardware("cpu", "the CPU", ("fp32",)), Hardware("mps", "Apple's GPU", ("fp32",))
WAN = families()["wan"]


def job_of(**fields: object) -> Job:
    return parse_job({"name": "cat", "base": {"transformer": "base.safetensors"}, "encoded": "encoded", "steps": 5} | fields)


def of_14b(folder: Path, dtype: torch.dtype = torch.bfloat16, **fields: object) -> Job:
    """A job over the header of the published Wan 14B, which has no weights."""
    path = folder / "wan2.1_t2v_14B.safetensors"
    published = next(one for one in TINY["wan"].published if one.file_name.startswith("wan2.1_t2v_14B"))
    entries = {name: (dtype, shape) for name, shape in shapes_of(published.keys).items()}
    write_header_only(path, entries, published.metadata)  # type: ignore[arg-type]
    return job_of(base={"transformer": str(path), "variant": published.variant}, **fields)


@pytest.mark.parametrize("family", families().values(), ids=lambda family: family.id)
def test_auto_is_the_family_s_best_that_the_gpu_does_at_full_speed(family: Family) -> None:
    """On a T4 every family was trained in fp16, in which HunyuanVideo, LTX-Video and Mochi overflow: their LoRAs learned nothing."""
    found = [pick_precision(job_of(), family, hardware).name for hardware in (RTX, T4, GTX_16, CPU, APPLE)]
    assert found == ["bf16", "fp16" if family is WAN else "fp32", "fp32", "fp32", "fp32"]


@pytest.mark.parametrize(
    ("name", "best"),
    [
        ("NVIDIA GeForce GTX 1650 Ti", "fp32"),
        ("NVIDIA T600 Laptop GPU", "fp32"),
        ("NVIDIA T1000 8GB", "fp32"),
        ("Quadro T2000", "fp32"),
        ("NVIDIA GeForce MX450", "fp32"),
        ("NVIDIA CMP 30HX", "fp32"),
        ("Tesla T4", "fp16"),
        ("NVIDIA GeForce RTX 2080 Ti", "fp16"),
        ("Quadro RTX 6000", "fp16"),
        ("NVIDIA TITAN RTX", "fp16"),
    ],
)
def test_turing_gpus_whose_fp16_is_not_a_number_are_known_by_name(name: str, best: str) -> None:
    """On a laptop's T600 or MX450 the loss was not-a-number in the first step."""
    assert pick_precision(job_of(), WAN, Hardware.cuda(name, False)).name == best


def test_a_choice_says_why_and_what_it_costs() -> None:
    mochi = families()["mochi"]
    assert "T4 has no bf16 (its compute capability is below 8.0), and Mochi does not work in fp16. A step takes several times" in str(
        pick_precision(job_of(), mochi, T4)
    )
    assert "its fp16 gives not-a-number" in str(pick_precision(job_of(), WAN, GTX_16))
    asked = pick_precision(job_of(precision="bf16"), WAN, T4)
    assert asked.dtype == torch.bfloat16
    assert str(asked).startswith("Computes in bf16: the job says so. T4 only emulates it: slower than fp32")
    assert "Nothing is streamed there" in str(pick_precision(job_of(), WAN, APPLE))


def test_fp16_is_refused_where_a_family_overflows_in_it() -> None:
    for family in families().values():
        problem = precision_problem(job_of(precision="fp16"), family, T4)
        assert (problem is None) == (family is WAN)
    assert str(precision_problem(job_of(precision="fp16"), families()["ltx"], T4)) == (
        "precision is fp16; LTX-Video computes in bf16 and fp32, as in ComfyUI: in others its values overflow. "
        'Use "auto", which is fp32 on T4.'
    )
    assert "loss scaling needs a CUDA GPU" in str(precision_problem(job_of(precision="fp16"), WAN, CPU))


def test_a_plan_for_another_gpu_is_in_that_gpu_s_precision(tmp_path: Path) -> None:
    """And what this machine lacks is no problem there: a GPU, its compiler, its libraries."""
    job = tiny_job(tmp_path, gradient_checkpointing=True, device="auto", speed={"attention": "flash"})
    for card, name in (("T4", "fp16"), ("RTX 4090", "bf16")):
        plan = make_plan(job, card_of(card, None).machine(32))
        assert plan.precision.name == plan.as_values()["precision"]["name"] == name
        assert f"\ncompute  in {name}: {plan.precision.reason}\n" in str(plan)
    in_fp32 = make_plan(job.model_copy(update={"precision": "fp32", "speed": SpeedSpec()}), card_of("T4", None).machine(32))
    assert in_fp32.memory.machine.flops_rate == 4.5e12
    with pytest.raises(JobError, match=r"speed\.attention is 'flash' on cpu"):
        make_plan(job)


def test_a_large_model_without_a_gpu_asks(tmp_path: Path) -> None:
    """With a broken driver or a CPU build of PyTorch a 14B job was planned, and started, on the CPU."""
    job = of_14b(tmp_path)
    with pytest.raises(JobError) as raised:
        check_settings(job)  # what the node asks before anything is encoded
    (problem,) = raised.value.problems
    assert f"PyTorch {torch.__version__} finds no GPU for wan2.1_t2v_14B.safetensors (14.3 billion parameters)" in problem.value
    assert "built for the CPU: install the build for your GPU" in problem.remedy
    assert 'Or set device to "cpu" to train on the CPU anyway' in problem.remedy
    assert problem in list(find_problems(job))
    check_settings(of_14b(tmp_path, device="cpu"))


def test_a_small_model_is_trained_on_the_cpu(tmp_path: Path) -> None:
    run = Run.create(tiny_job(tmp_path, device="auto", steps=1))
    assert train(run) == "done"
    (event,) = [event for event in run.read_events() if event["event"] == "precision"]
    assert (event["precision"], event["message"]) == ("fp32", "Computes in fp32: nothing else is faster on the CPU.")


@pytest.mark.parametrize(
    ("built_for", "says"), [("12.8", "Check that nvidia-smi lists the GPU"), (None, "This PyTorch is built for the CPU: install the build")]
)
def test_what_to_check_depends_on_the_build(monkeypatch: pytest.MonkeyPatch, built_for: str | None, says: str) -> None:
    monkeypatch.setattr(torch.version, "cuda", built_for)
    problem = no_gpu_problem(job_of(), int(14e9), "wan.safetensors")
    assert problem
    assert problem.remedy.startswith(says)
    assert no_gpu_problem(job_of(), int(2e9), "wan.safetensors") is None


def test_what_apple_s_gpu_cannot_hold_is_said_before_loading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    job = of_14b(tmp_path, device="mps", memory={"quantise": "fp8", "stream": "always"})
    write_header_only(Path(job.base.transformer), fp8_entries(shapes_of("wan2.1_t2v_1.3B"), torch.float8_e4m3fn, None))
    job = job.model_copy(update={"base": job.base.model_copy(update={"variant": "wan2.1-t2v-1.3b"})})
    with pytest.raises(JobError) as raised:
        check_settings(job)
    assert {problem.value for problem in raised.value.problems} == {
        "wan2.1_t2v_14B.safetensors is stored as fp8",
        "memory.quantise is fp8",
        "memory.stream is always",
    }
    assert 'Set device to "mps"' in str(no_gpu_problem(job.model_copy(update={"device": "auto"}), int(14e9), "wan.safetensors"))


def replace_device(job: Job) -> Job:
    return job.model_copy(update={"device": "auto"})
