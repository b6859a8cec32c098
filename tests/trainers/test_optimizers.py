"""Optimizers by name, and the learning rate as a function of the step."""

import pytest
import torch

from trainers.job import OptimizerSpec
from trainers.optimizers import build_optimizer, check_installed, learning_rate_factor, set_learning_rate


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


@pytest.mark.parametrize("kind", ["adamw", "adamw8bit", "prodigy"])
def test_each_optimizer_lowers_a_loss(kind):
    torch.manual_seed(0)
    spec = OptimizerSpec(kind=kind, learning_rate=1.0 if kind == "prodigy" else 0.02)
    check_installed(spec)
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
