"""Noise levels, draws and the loss."""

import math

import pytest
import torch

from trainers.flow import draw_sample, draw_sigma, generator, noised, sampling_sigmas, shifted, velocity_loss
from trainers.job import NoiseSpec

SHAPE = (4, 2, 3, 3)


def test_a_draw_is_a_function_of_seed_step_and_index():
    spec = NoiseSpec()
    again = draw_sample(spec, 0.5, 1, 7, 3, SHAPE)
    torch.manual_seed(99)
    draw = draw_sample(spec, 0.5, 1, 7, 3, SHAPE)
    assert torch.equal(draw.noise_CFHW, again.noise_CFHW)
    assert (draw.sigma, draw.drop_caption) == (again.sigma, again.drop_caption)
    others = [draw_sample(spec, 0.5, *key, SHAPE).sigma for key in ((2, 7, 3), (1, 8, 3), (1, 7, 4))]
    assert len({draw.sigma, *others}) == 4


def test_captions_are_dropped_as_often_as_asked():
    dropped = sum(draw_sample(NoiseSpec(), 0.25, 0, step, 0, (1, 1, 1, 1)).drop_caption for step in range(2000))
    assert dropped / 2000 == pytest.approx(0.25, abs=0.04)
    assert not any(draw_sample(NoiseSpec(), 0.0, 0, step, 0, (1, 1, 1, 1)).drop_caption for step in range(200))


@pytest.mark.parametrize(
    ("spec", "cdf"),
    [
        (NoiseSpec(distribution="uniform"), lambda s: s),
        (NoiseSpec(distribution="shift", shift=3.0), lambda s: s / (3.0 - 2.0 * s)),
        (NoiseSpec(mean=0.5, std=0.8), lambda s: 0.5 * (1 + math.erf((math.log(s / (1 - s)) - 0.5) / 0.8 / math.sqrt(2)))),
    ],
)
def test_sigmas_follow_their_distribution(spec, cdf):
    chance = generator("test")
    sigmas = torch.tensor([draw_sigma(spec, chance) for _ in range(4000)])
    assert sigmas.min() > 0
    assert sigmas.max() < 1
    for level in (0.2, 0.5, 0.8):
        assert (sigmas < level).float().mean().item() == pytest.approx(cdf(level), abs=0.03)


def test_sampling_goes_from_noise_to_clean():
    sigmas = sampling_sigmas(4, 3.0)
    assert sigmas == pytest.approx([1.0, 0.9, 0.75, 0.5, 0.0])
    assert shifted(0.3, 1.0) == pytest.approx(0.3)


def test_noised_is_clean_at_0_and_noise_at_1():
    clean, noise = torch.randn(2, *SHAPE), torch.randn(2, *SHAPE)
    mixed = noised(clean, noise, torch.tensor([0.0, 1.0]))
    assert torch.equal(mixed[0], clean[0])
    assert torch.equal(mixed[1], noise[1])


def test_the_masked_loss_counts_only_what_the_mask_lets_through():
    predicted, target = torch.zeros(1, 2, 2, 1, 1), torch.ones(1, 2, 2, 1, 1)
    target[:, :, 0] = 100.0
    mask = torch.tensor([0.0, 1.0]).view(1, 1, 2, 1, 1)
    assert velocity_loss(predicted, target, mask).item() == 1.0
    assert velocity_loss(predicted, target).item() == pytest.approx((1 + 100**2) / 2)
