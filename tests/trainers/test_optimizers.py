"""Optimizers by name, and the learning rate as a function of the step."""

import pytest
import torch

from trainers.errors import JobError
from trainers.job import Job, OptimizerSpec, parse_job
from trainers.optimizers import build_optimizer, check_optimizer, learning_rate_factor, load_optimizer_state, set_learning_rate


def factors(total=10, **settings):
    spec = OptimizerSpec(**settings)
    return [learning_rate_factor(spec, step, total) for step in range(1, total + 1)]


def test_warm_up_then_constant():
    assert factors(warmup_steps=4) == pytest.approx([0.25, 0.5, 0.75, 1.0] + [1.0] * 6)


def test_linear_starts_at_the_peak_and_nears_zero():
    assert factors(schedule="linear") == pytest.approx([1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1])


def test_cosine_is_half_in_the_middle():
    values = factors(total=11, schedule="cosine", warmup_steps=1)
    assert values[:2] == [1.0, 1.0]
    assert values[6] == pytest.approx(0.5)
    assert values == sorted(values, reverse=True)


def job_with(kind, method="full") -> Job:
    values = {"name": "cat", "base": {"transformer": "wan.safetensors"}, "encoded": "encoded", "steps": 5, "method": method}
    return parse_job(values | {"optimizer": {"kind": kind}})


@pytest.mark.parametrize("kind", ["adamw", "adamw8bit", "adamw_kahan", "prodigy"])
def test_each_optimizer_lowers_a_loss(kind):
    torch.manual_seed(0)
    spec = OptimizerSpec(kind=kind, learning_rate=1.0 if kind == "prodigy" else 0.02)
    check_optimizer(job_with(kind))
    weight = torch.nn.Parameter(torch.randn(128, 64))
    optimizer = build_optimizer(spec, [weight])
    losses = []
    for _ in range(60):
        set_learning_rate(optimizer, spec.learning_rate)
        loss = weight.square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def stepped(kind, dtype, steps, fused=None, state=None):
    """A weight after some steps of which step i has a gradient of its own, and the optimizer."""
    weight = torch.nn.Parameter(torch.full((64, 64), 1.0, dtype=dtype))
    optimizer = build_optimizer(OptimizerSpec(kind=kind, learning_rate=1e-4, weight_decay=0.1), [weight])
    for group in optimizer.param_groups:
        group["fused"] = fused
    if state is not None:
        with torch.no_grad():
            weight.copy_(state["weight"])
        load_optimizer_state(optimizer, state["optimizer"])
    for step in steps:
        weight.grad = torch.randn(64, 64, generator=torch.Generator().manual_seed(step)).to(dtype)
        optimizer.step()
    return weight.detach(), optimizer


@pytest.mark.parametrize(("kind", "dtype", "fused"), [("adamw_kahan", torch.bfloat16, None), ("adamw", torch.float32, True)])
def test_a_saved_state_goes_on_exactly(tmp_path, kind, dtype, fused):
    straight, _ = stepped(kind, dtype, range(8), fused)
    weight, optimizer = stepped(kind, dtype, range(4), fused)
    torch.save({"weight": weight, "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    again, _ = stepped(kind, dtype, range(4, 8), fused, torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(again, straight)


def test_a_state_of_another_device_does_not_say_how_steps_are_computed_here():
    weight, fused = stepped("adamw", torch.float32, range(3), fused=True)
    _, plain = stepped("adamw", torch.float32, [], state={"weight": weight, "optimizer": fused.state_dict()})
    assert plain.param_groups[0]["fused"] is None
    assert plain.state[plain.param_groups[0]["params"][0]]["step"] == 3


def test_kahan_keeps_what_bf16_rounds_away():
    """Each step is far below a bf16 step at 1: without the sum of what was lost nothing ever moves."""
    exact, _ = stepped("adamw", torch.float32, [0] * 60)
    kahan, _ = stepped("adamw_kahan", torch.bfloat16, [0] * 60)
    plain, _ = stepped("adamw", torch.bfloat16, [0] * 60)
    assert plain.eq(1.0).all()
    assert (exact - 1.0).abs().min() > 2**-8, "more than half a bf16 step above 1"
    assert (kahan.float() - exact).abs().max() <= 2**-8


def test_kahan_is_refused_over_a_lora_s_float32():
    with pytest.raises(JobError, match=r"optimizer.kind is 'adamw_kahan', method is 'lora'; a LoRA's weights are kept in float32.*Use"):
        check_optimizer(job_with("adamw_kahan", method="lora"))
