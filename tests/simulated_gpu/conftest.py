"""What every training on the simulated GPU has: small inputs are offloaded as large ones are."""

from __future__ import annotations

import pytest

from trainers.offload import blocks


@pytest.fixture(autouse=True)
def small_inputs_are_offloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "_WORTH_COPYING_BYTES", 0)
