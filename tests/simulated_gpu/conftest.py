"""What tests on the simulated GPU may use."""

from __future__ import annotations

import pytest
import torch

from trainers.offload import blocks
from trainers.quantise import quantised


@pytest.fixture
def small_inputs_are_offloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """As large ones are."""
    monkeypatch.setattr(blocks, "_WORTH_COPYING_BYTES", 0)


@pytest.fixture(scope="session")
def tables_of_bitsandbytes() -> None:
    """It keeps its tables on a device once it was used there: they are no leak of a test."""
    decoded = quantised(torch.zeros(64, 64, device="cuda:0"), None, "nf4", torch.device("cuda:0"))
    decoded(torch.zeros(1, 64, device="cuda:0"))
