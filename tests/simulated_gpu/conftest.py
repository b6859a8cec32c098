"""What every training on the simulated GPU has: small inputs are offloaded as large ones are."""

from __future__ import annotations

import pytest
import torch

from trainers.offload import blocks
from trainers.quantise import quantised


@pytest.fixture(autouse=True)
def small_inputs_are_offloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "_WORTH_COPYING_BYTES", 0)


@pytest.fixture(autouse=True, scope="session")
def tables_of_bitsandbytes() -> None:
    """It keeps its tables on a device once it was used there: they are no leak of a test."""
    decoded = quantised(torch.zeros(64, 64, device="cuda:0"), None, "nf4", torch.device("cuda:0"))
    decoded(torch.zeros(1, 64, device="cuda:0"))
