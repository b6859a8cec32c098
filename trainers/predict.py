"""The velocity that the transformer answers for clean latents, noise and a noise level: training and evaluation alike."""

from __future__ import annotations

import torch

from .batches import Batch
from .family import Family, Variant
from .flow import noised, velocity_loss


def batch_loss(family: Family, variant: Variant, transformer: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """The loss of one forward pass: mean squared error of the velocity (noise - clean) where it is predicted; float32, a scalar."""
    noisy_BCFHW = noised(batch.clean_BCFHW, batch.noise_BCFHW, batch.sigma_B)
    inputs = family.prepare(variant, noisy_BCFHW, batch.sigma_B, batch.conditions)
    velocity = family.predict(transformer, inputs, batch.text)
    return velocity_loss(velocity, batch.noise_BCFHW - batch.clean_BCFHW, inputs.loss_mask)
