"""Flow matching: which noise levels are trained, what is drawn for a sample, and the loss.

Rectified flow (Liu et al. 2022, arXiv:2209.03003): x = (1 - sigma) * clean + sigma * noise, target velocity =
noise - clean. Every draw is a function of (seed, purpose, step, index of the sample in the global batch), made on the
CPU, so that a resumed run, or one on more GPUs, sees exactly the same samples. On another computer, noise levels, order and
dropped captions are still the same; noise is `torch.randn`, whose last bits (up to 2e-6) differ on a CPU without AVX2.

Shape suffixes: B batch, C channels, F latent frames, H and W latent height and width.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from statistics import NormalDist

import torch

from .job import NoiseSpec


def derived_seed(*parts: object) -> int:
    """A 63-bit seed that is a function of its parts only (Python's own hash differs between processes)."""
    digest = hashlib.blake2b("/".join(str(part) for part in parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(*parts: object) -> torch.Generator:
    """A CPU generator seeded by `derived_seed`."""
    return torch.Generator("cpu").manual_seed(derived_seed(*parts))


@dataclass(frozen=True)
class Draw:
    """What chance gives one sample: its noise (C, F, H, W), its noise level, and whether its caption is dropped."""

    noise_CFHW: torch.Tensor
    sigma: float
    drop_caption: bool


def draw_sample(
    noise: NoiseSpec,
    caption_dropout: float,
    seed: int,
    step: int,
    index: int,
    shape_CFHW: tuple[int, int, int, int],
    sigmas: tuple[float, float] = (0.0, 1.0),
) -> Draw:
    """The draw of sample `index` of the global batch of `step`, its noise level between the two of `sigmas`."""
    chance = generator(seed, "sample", step, index)
    sigma = draw_sigma(noise, chance, *sigmas)
    drop = torch.rand((), generator=chance).item() < caption_dropout
    return Draw(torch.randn(shape_CFHW, generator=chance), sigma, drop)


def draw_sigma(noise: NoiseSpec, chance: torch.Generator, lowest: float = 0.0, highest: float = 1.0) -> float:
    """One noise level in (0, 1). logit_normal: Esser et al. 2024, arXiv:2403.03206, section 3.1; shift: section 5.3.2.

    Between `lowest` and `highest`: the part of the distribution that lies there, by its quantiles.
    """
    if (lowest, highest) != (0.0, 1.0):
        share = torch.rand((), generator=chance).item()
        low, high = (_share_below(noise, sigma) for sigma in (lowest, highest))
        return min(max(_quantile(noise, low + share * (high - low)), lowest), highest)
    if noise.distribution == "logit_normal":
        logit = noise.mean + noise.std * torch.randn((), generator=chance).item()
        return 1.0 / (1.0 + math.exp(-logit))
    uniform = torch.rand((), generator=chance).item()
    return shifted(uniform, noise.shift) if noise.distribution == "shift" else uniform


def _share_below(noise: NoiseSpec, sigma: float) -> float:
    """How much of the distribution lies below `sigma`."""
    if noise.distribution == "logit_normal":
        return NormalDist(noise.mean, noise.std).cdf(math.log(sigma / (1.0 - sigma))) if 0.0 < sigma < 1.0 else sigma
    return shifted(sigma, 1.0 / noise.shift) if noise.distribution == "shift" else sigma


def _quantile(noise: NoiseSpec, share: float) -> float:
    """The noise level that `share` of the distribution lies below."""
    if noise.distribution == "logit_normal":
        if not 0.0 < share < 1.0:
            return share
        return 1.0 / (1.0 + math.exp(-NormalDist(noise.mean, noise.std).inv_cdf(share)))
    return shifted(share, noise.shift) if noise.distribution == "shift" else share


def shifted(sigma: float, shift: float) -> float:
    """`sigma` moved towards 1 by `shift` (1 leaves it where it is)."""
    return shift * sigma / (1.0 + (shift - 1.0) * sigma)


def sampling_sigmas(steps: int, shift: float) -> list[float]:
    """`steps + 1` noise levels from 1 down to 0, evenly spaced and then shifted."""
    return [shifted(1.0 - i / steps, shift) for i in range(steps + 1)]


def noised(clean_BCFHW: torch.Tensor, noise_BCFHW: torch.Tensor, sigma_B: torch.Tensor) -> torch.Tensor:
    """The latents at noise level `sigma_B`."""
    sigma = sigma_B.view(-1, *([1] * (clean_BCFHW.ndim - 1)))
    return (1.0 - sigma) * clean_BCFHW + sigma * noise_BCFHW


def velocity_loss(predicted: torch.Tensor, target: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Mean squared error in float32, over what `mask` (broadcastable, 0 or 1) lets count: sum(mask * err^2) / sum(mask)."""
    error = (predicted.float() - target.float()).square()
    if mask is None:
        return error.mean()
    mask = mask.to(error).expand_as(error)
    return (mask * error).sum() / mask.sum()
