"""Which arrangement is chosen: over a model of made-up bytes, where every number can be followed; and over a real (tiny) job."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_job
from tiny_families import tiny_job_of

from trainers.checkpoint import Checkpoint
from trainers.cli import main
from trainers.errors import JobError
from trainers.family import detect, families
from trainers.job import Job, MemorySpec, OptimizerSpec, parse_job
from trainers.job_memory import tracer_of
from trainers.machine import GIB, Machine, card_of
from trainers.memory_plan import MemoryPlan, choose, optimizer_bytes, too_large
from trainers.memory_report import as_values, reasons, report
from trainers.memory_trace import ModelBytes, StepShape, StepTrace, Work
from trainers.offload.arrangement import Arrangement
from trainers.optimizers import build_optimizer
from trainers.plan import make_plan
from trainers.run import Run
from trainers.training import open_training

SHAPE = StepShape((16, 8, 64, 64), 1, 256, 4096)
MODEL = ModelBytes((GIB // 2,) * 40, 10 * GIB, GIB // 2, 400, 100_000_000, 400_000_000)
MACHINE = Machine("a card", "cuda", 24 * GIB, 23 * GIB, 64 * GIB, 100e12, 1e12, 20e9)


@dataclass(frozen=True)
class MadeUp:
    """40 blocks of 0.5 GiB; a step of 12 GiB, 8 of them inputs of blocks and 2 a feed-forward, for 8 latent frames."""

    model: ModelBytes = MODEL
    shape: StepShape = SHAPE
    flops: float = 1e15
    inputs_gib: float = 8

    def step(self, shape: StepShape, arrangement: Arrangement) -> StepTrace:
        share = shape.latents_CFHW[1] / 8 * shape.batch_size
        inputs, gib = self.inputs_gib * share * arrangement.checkpointing, 4 * share
        gib += 8 * share if arrangement.activations == "device" else 0.4 * share
        gib -= 2 * share * (1 - 1 / arrangement.chunks)
        gib = 200 * share if not arrangement.checkpointing else gib
        more = 1.1 if arrangement.chunks > 1 else 1.0
        work = Work(self.flops * share, 0.0, 0.0)
        return StepTrace(int(gib * GIB), int(inputs * GIB), work, work.plus(work, more))


def job_of(**fields: Any) -> Job:
    values = {"name": "cat", "base": {"transformer": "wan.safetensors"}, "encoded": "encoded", "steps": 100, "lora": {"rank": 32}}
    return parse_job(values | fields)


def chosen(machine: Machine = MACHINE, traced: MadeUp | None = None, **fields: Any) -> MemoryPlan:
    return choose(job_of(**fields), traced or MadeUp(), machine)


def gib(value: float) -> int:
    return int(value * GIB)


def test_a_large_card_keeps_everything() -> None:
    plan = chosen(replace(MACHINE, free_bytes=79 * GIB))
    assert plan.arrangement == Arrangement()
    assert plan.price.weights_bytes == gib(20.5)
    assert plan.price.copy_seconds == 0
    assert reasons(plan) == ["All weights stay on the device, because they fit."]


def test_of_what_hides_the_least_is_copied() -> None:
    room = replace(MACHINE, free_bytes=gib(28))
    plan, with_inputs = chosen(room), chosen(room, memory={"activations": "host"})
    assert not with_inputs.price.placement.streamed
    assert plan.price.step_seconds < 1.02 * plan.price.unhindered_seconds
    assert 0 < plan.price.copy_seconds < with_inputs.price.copy_seconds
    close = choose(job_of(), MadeUp(inputs_gib=4), room)
    assert close.arrangement.activations == "host"
    assert not close.price.placement.streamed


def test_weights_stream_as_few_as_needed() -> None:
    plan = chosen()
    streamed = plan.price.placement.streamed
    assert 0 < len(streamed) < 40
    assert plan.price.device_bytes + plan.price.reserve_bytes <= MACHINE.free_bytes
    assert plan.price.device_bytes > MACHINE.free_bytes - 2 * GIB
    assert plan.arrangement.host == "pinned"
    assert f"{len(streamed)} of 40 blocks" in reasons(plan)[0]
    assert "hide" in reasons(plan)[0]


def test_copies_that_cannot_hide_cost_time() -> None:
    slow, fast = chosen(traced=MadeUp(flops=1e12)), chosen()
    assert slow.price.step_seconds > 1.02 * slow.price.unhindered_seconds
    assert fast.price.step_seconds == pytest.approx(fast.price.unhindered_seconds, rel=0.02)
    assert "longer" in reasons(slow)[0]


def test_without_ram_weights_stay_in_the_file() -> None:
    plan = chosen(replace(MACHINE, ram_bytes=gib(8)))
    assert plan.arrangement.host == "mapped"
    assert plan.arrangement.activations == "device"
    assert plan.price.host_bytes <= gib(8)


@pytest.mark.parametrize("pinnable_gib", [0, 3, 6, 100])
def test_no_more_is_pinned_than_the_machine_allows(pinnable_gib: float) -> None:
    """All free RAM was taken for pinned memory, of which Windows gives less than half: the plan promised a speed that no run had."""
    machine = replace(MACHINE, pinnable_bytes=gib(pinnable_gib))
    plan, mapped = (chosen(machine, MadeUp(flops=1e13), memory={"activations": "device", "host": host}) for host in ("auto", "mapped"))
    streamed, pinned = len(plan.price.placement.streamed), plan.price.pinned_blocks
    assert streamed > 20
    staging = 2 * (GIB // 2)
    if pinnable_gib == 100:
        assert (pinned, plan.arrangement.most_pinned_bytes) == (streamed, None)
    elif pinnable_gib == 0:
        assert (pinned, plan.arrangement.host) == (0, "mapped")
    else:
        assert pinned == 2 * pinnable_gib - 2, "two staging buffers are pinned as well"
        assert plan.arrangement.most_pinned_bytes == gib(pinnable_gib) - staging
        assert f"from pinned memory ({pinned} blocks, no more may be pinned) and from the mapped file" in reasons(plan)[0]
        assert plan.price.host_bytes == mapped.price.host_bytes + pinned * GIB // 2
    assert plan.price.copy_seconds <= mapped.price.copy_seconds
    assert as_values(plan, 1.0)["pinned_blocks"] == pinned


def test_who_asks_for_pinned_memory_gets_as_much_as_the_system_gives() -> None:
    plan = chosen(replace(MACHINE, pinnable_bytes=gib(3)), memory={"host": "pinned"})
    assert plan.price.pinned_blocks == len(plan.price.placement.streamed)


def test_inputs_of_blocks_are_pinned_before_weights() -> None:
    plan = chosen(replace(MACHINE, pinnable_bytes=gib(12)), MadeUp(flops=1e13), memory={"activations": "host", "stream": "always"})
    assert plan.arrangement.most_pinned_bytes == gib(12 - 8) - 2 * (GIB // 2)


def test_inputs_that_may_not_be_pinned_take_longer() -> None:
    memory = {"activations": "host", "stream": "never"}
    limited, free = (chosen(replace(MACHINE, pinnable_bytes=limit), memory=memory) for limit in (gib(2), None))
    assert limited.price.copy_seconds == pytest.approx((2 + 4 * 6) / 8 * free.price.copy_seconds)


def test_feed_forwards_are_cut_last() -> None:
    plan = chosen(replace(MACHINE, free_bytes=gib(6)))
    assert plan.fits
    assert plan.arrangement.chunks > 1
    assert plan.arrangement.activations == "host"


@pytest.mark.parametrize(
    ("memory", "expected"),
    [
        ({"stream": "always"}, lambda plan: len(plan.price.placement.streamed) == 40),
        ({"host": "mapped"}, lambda plan: plan.arrangement.host == "mapped"),
        ({"activations": "device"}, lambda plan: plan.arrangement.activations == "device"),
        ({"activations": "host"}, lambda plan: plan.arrangement.activations == "host"),
        ({"chunks": 8}, lambda plan: plan.arrangement.chunks == 8),
        ({"vram_gib": 16.0}, lambda plan: plan.price.device_bytes + plan.price.reserve_bytes <= 16 * GIB),
        ({"ram_gib": 8.0}, lambda plan: plan.price.host_bytes <= 8 * GIB),
    ],
)
def test_the_job_is_kept_to(memory: dict[str, Any], expected: Any) -> None:
    plan = chosen(memory=memory)
    assert plan.fits
    assert expected(plan)


def test_what_the_job_forbids_is_not_done() -> None:
    assert not chosen(memory={"stream": "never"}).fits
    assert not chosen(gradient_checkpointing=False).fits
    assert chosen(replace(MACHINE, free_bytes=300 * GIB), gradient_checkpointing=False).arrangement == Arrangement(checkpointing=False)


def test_reasons_name_the_job_only_where_it_was_followed() -> None:
    never = chosen(replace(MACHINE, free_bytes=79 * GIB), memory={"stream": "never"})
    assert reasons(never) == ["All weights stay on the device, because the job says memory.stream = 'never'."]
    always = chosen(memory={"stream": "always", "activations": "host", "chunks": 4})
    assert all("because the job says memory." in reason for reason in reasons(always))
    nothing = MadeUp(model=replace(MODEL, blocks=(0,) * 40))
    kept = chosen(traced=nothing, memory={"stream": "always"})
    assert not kept.price.placement.streamed
    assert "stream" not in " ".join(reasons(kept))


def test_a_limit_above_what_is_free_is_not_believed() -> None:
    plan = chosen(memory={"vram_gib": 80, "ram_gib": 500})
    assert plan.price == chosen().price
    assert reasons(plan)[-2:] == [
        "The job says memory.vram_gib = 80, but only 23.0 GiB are free, which counts.",
        "The job says memory.ram_gib = 500, but only 64.0 GiB are free, which counts.",
    ]
    assert "only" not in " ".join(reasons(chosen(memory={"vram_gib": 16.1, "ram_gib": 32.3})))


def test_the_report_has_no_zeros_for_small_sizes_and_all_values() -> None:
    plan = chosen(traced=MadeUp(model=replace(MODEL, parameters=1_000_000, parameter_bytes=4_000_000)))
    lines = report(plan, 100.0)
    assert "LoRA and optimizer 11 MiB" in lines[0]
    assert " 0.0" not in lines[0]
    values = as_values(plan, 100.0)
    assert values["slots"] == 2
    assert values["slot_bytes"] == GIB // 2
    assert (values["compute_seconds"], values["copy_seconds"]) == (plan.price.compute_seconds, plan.price.copy_seconds)


def test_two_experts_keep_two_optimizers_and_one_model() -> None:
    one = chosen().price
    two = chosen(traced=MadeUp(model=replace(MODEL, trained=2))).price
    assert two.trained_bytes == 2 * one.trained_bytes
    assert two.step_seconds > one.step_seconds


def test_when_nothing_fits_the_problem_says_what_would() -> None:
    plan = chosen(replace(MACHINE, free_bytes=3 * GIB))
    assert not plan.fits
    problem = str(too_large(plan, MadeUp()))
    assert "a card has 3.0 GiB" in problem
    assert "latent frames (now 8)" in problem
    assert "memory.*" in str(too_large(chosen(memory={"stream": "never"}), MadeUp()))


def test_when_the_machine_lacks_memory_its_own_is_named() -> None:
    """It named the GPU's 23 GiB as the machine's, and a user bought the wrong thing."""
    plan = chosen(replace(MACHINE, ram_bytes=gib(1)), memory={"stream": "always", "host": "pinned"})
    assert not plan.fits
    problem = str(too_large(plan, MadeUp()))
    assert "1.0 GiB of the machine's memory are free" in problem
    assert "23.0" not in problem


def test_what_does_not_fit_is_not_said_to() -> None:
    plan = chosen(replace(MACHINE, device="cpu", free_bytes=gib(9)))
    assert not plan.fits
    assert reasons(plan)[0] == "All weights stay on the device, although that does not fit."


def test_weights_are_quantised_when_that_is_what_lacks() -> None:
    large = MadeUp(model=ModelBytes((3 * GIB,) * 8, 12 * GIB, GIB // 2, 400, 100_000_000, 400_000_000))
    plan = chosen(replace(MACHINE, free_bytes=8 * GIB), large)
    assert 'memory.quantise = "fp8"' in str(too_large(plan, large))
    packed = MadeUp(model=replace(large.model, blocks=(int(0.6 * GIB),) * 8))
    assert "fp8" not in str(too_large(chosen(replace(MACHINE, free_bytes=2 * GIB), packed), packed))


@pytest.mark.parametrize(("how", "bytes_each"), [("fp8", 1.0), ("nf4", 0.5625)])
def test_quantised_weights_are_counted_as_they_are_kept(tmp_path: Path, how: str, bytes_each: float) -> None:
    """Nothing is quantised for it: bitsandbytes need not be here."""
    job = tiny_job(tmp_path, gradient_checkpointing=True, memory={"quantise": how})
    checkpoint = Checkpoint.open(job.base.transformer)
    model = tracer_of(job, checkpoint, detect(checkpoint), card_of(None, 12).machine(16), torch.bfloat16).model
    assert sum(model.blocks) == pytest.approx(bytes_each * model.block_weights, rel=0.05)


def test_a_job_is_planned_for_another_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = tiny_job(tmp_path)
    (tmp_path / "job.json").write_text(job.canonical_json())
    assert main(["plan", str(tmp_path / "job.json"), "--vram", "12", "--ram", "16", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["memory"]["fits"]
    assert values["memory"]["machine"]["name"] == "RTX 3060"
    assert values["memory"]["streamed_blocks"] == 0
    assert values["memory"]["run_seconds"] == pytest.approx(job.steps * values["memory"]["step_seconds"])
    assert main(["plan", str(tmp_path / "job.json"), "--card", "T4"]) == 0
    assert "T4" in capsys.readouterr().out


@pytest.mark.parametrize("option", ["--vram", "--ram"])
@pytest.mark.parametrize("value", ["nan", "0", "-8", "inf", "much"])
def test_sizes_of_another_machine_are_positive_numbers(option: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["plan", "job.json", "--card", "T4", f"{option}={value}"])
    assert exit_.value.code == 2
    assert f"{option}: it is {value}; it must be above 0" in capsys.readouterr().err


def test_ram_alone_is_no_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "job.json").write_text(tiny_job(tmp_path).canonical_json())
    assert main(["plan", str(tmp_path / "job.json"), "--ram", "16"]) == 1
    assert "set memory.ram_gib in the job" in capsys.readouterr().err


def test_a_card_smaller_than_its_context_is_one_message() -> None:
    plan = chosen(card_of(None, 0.1).machine(32, 0.1))
    assert "RTX 4060 has 0 MiB for it" in str(too_large(plan, MadeUp()))


def test_a_tiny_card_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    job = tiny_job(tmp_path)
    machine = replace(card_of(None, 12).machine(16), free_bytes=2**20)
    with pytest.raises(JobError, match="at the least"):
        make_plan(job, machine)


def test_parts_that_a_block_does_not_have_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in another release of diffusers. The plan itself does without them."""
    asked, machine = tiny_job(tmp_path, gradient_checkpointing=True, memory={"chunks": 4}), card_of(None, 12).machine(16)
    assert make_plan(asked, machine).memory
    monkeypatch.setattr("trainers.offload.chunks.ChunkedForward.suits", lambda self, block: False)
    with pytest.raises(JobError, match=r"memory.chunks is 4; WanTransformerBlock of diffusers .* Leave memory.chunks out"):
        make_plan(asked, machine)
    assert make_plan(asked.model_copy(update={"memory": MemorySpec()}), machine).memory
    with pytest.raises(JobError, match=r"memory.chunks is 4"):
        open_training(Run.create(asked))  # without a card, which has no plan


def test_both_experts_count(tmp_path: Path) -> None:
    family = families()["wan"]
    variant = next(variant for variant in family.variants if variant.id == "wan2.2-t2v")
    job = tiny_job_of(tmp_path, family, variant)
    base = job.base.model_copy(update={"transformer_low_noise": str(tmp_path / "low_noise.safetensors"), "variant": variant.id})
    (tmp_path / "low_noise.safetensors").write_bytes(Path(job.base.transformer).read_bytes())
    both = job.model_copy(update={"base": base, "experts": job.experts.model_copy(update={"train": "both"})})
    plan = make_plan(both)
    assert plan.loras == 2
    assert plan.memory
    assert plan.memory.price.trained_bytes == 2 * plan.parameters * 12
    assert "for each expert" in str(plan)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("adamw", torch.float32), ("adamw_kahan", torch.bfloat16), ("adamw_kahan", torch.float32), ("prodigy", torch.float32)],
)
def test_an_optimizer_s_state_is_as_planned(kind: Any, dtype: torch.dtype) -> None:
    """With method "full" in float32, adamw_kahan keeps 8 bytes for each number; 6 were planned, of bf16."""
    parameters = [torch.nn.Parameter(torch.ones(256, 64, dtype=dtype)), torch.nn.Parameter(torch.ones(512, dtype=dtype))]
    optimizer = build_optimizer(OptimizerSpec(kind=kind, learning_rate=1e-3), parameters)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    kept = sum(value.nbytes for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor))
    planned = optimizer_bytes(kind, sum(p.numel() for p in parameters), sum(p.nbytes for p in parameters))
    assert planned == pytest.approx(kept, rel=0.01)
