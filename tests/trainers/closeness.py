"""Comparing numbers that were computed in two orders, on any CPU."""

from __future__ import annotations

import torch

ROUNDING = 1e-5
"""Of float32 (eps 1.2e-7) through a model of a few layers."""


def assert_near(found: torch.Tensor, wanted: torch.Tensor, share: float = ROUNDING) -> None:
    """No number is off by more than `share` of the largest one wanted: where sums cancel, the error is that of their parts."""
    assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype)
    largest, difference = wanted.abs().max().item(), (found - wanted).abs().max().item()
    assert difference <= share * largest, f"off by {difference:.3g}, {difference / largest:.3g} of the largest ({largest:.3g})"


def assert_same(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """The same bits; with AVX2 alone to 2e-6: HunyuanVideo is off by up to 7e-7 there, with checkpointing alone too (benchmarks/LOG.md)."""
    if torch.backends.cpu.get_cpu_capability() == "AVX2":
        assert_near(found, wanted, 2e-6)
    else:
        assert torch.equal(found, wanted)
