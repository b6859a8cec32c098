"""What a seed promises on another CPU: a run started on one computer goes on, or is repeated, on another.

`ATEN_CPU_CAPABILITY=default` makes torch compute as on a CPU without AVX2 and without fused multiply-add. It is read once, when
torch is imported, so the other CPU is a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from trainers.data.order import Order
from trainers.flow import draw_sample
from trainers.job import NoiseSpec
from trainers.lora import initial_down

ROOT = Path(__file__).parents[2]


def draws() -> dict[str, Any]:
    """Everything that a seed decides before a model has computed anything."""
    samples = [draw_sample(NoiseSpec(), 0.5, 1, step, 0, (16, 3, 5, 7)) for step in range(8)]
    return {
        "lora": [initial_down("blocks.0.attn1.to_q", 4, width, 3, torch.device("cpu")) for width in (8, 1000, 5120)],
        "levels": [(sample.sigma, sample.drop_caption) for sample in samples],
        "noise": torch.stack([sample.noise_CFHW for sample in samples]),
        "order": [batch.clips for step in range(1, 7) for batch in Order("aabbbab", [1] * 7, 2, 1, seed=5).step(step)],
    }


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The draws of a CPU without AVX2."""
    file = tmp_path_factory.mktemp("elsewhere") / "draws.pt"
    environment = os.environ | {"ATEN_CPU_CAPABILITY": "default", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, __file__, str(file)], env=environment, check=True)
    drawn: dict[str, Any] = torch.load(file)
    assert drawn["capability"] == "DEFAULT"
    return drawn


def test_a_lora_starts_with_the_same_bits_on_every_cpu(elsewhere: dict[str, Any]) -> None:
    """A run that was repeated on another computer started from another LoRA."""
    assert all(torch.equal(here, there) for here, there in zip(draws()["lora"], elsewhere["lora"], strict=True))


def test_order_noise_levels_and_dropped_captions_are_the_same_on_every_cpu(elsewhere: dict[str, Any]) -> None:
    here = draws()
    assert (here["order"], here["levels"]) == (elsewhere["order"], elsewhere["levels"])


def test_noise_is_the_same_to_its_last_bits_on_every_cpu(elsewhere: dict[str, Any]) -> None:
    torch.testing.assert_close(draws()["noise"], elsewhere["noise"], rtol=0, atol=2e-6)


if __name__ == "__main__":
    torch.save(draws() | {"capability": torch.backends.cpu.get_cpu_capability()}, sys.argv[1])
