"""diffusers' own loader reads what is written here, and the model answers as the trained one did."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from trainers.families.wan import FAMILY as WAN
from trainers.job import LoraSpec
from trainers.lora import adapter_state, inject
from trainers.lora_format import Form, write_lora

SPECS = {
    "alpha = rank": LoraSpec(rank=4),
    "scale 1/2": LoraSpec(rank=4, alpha=2.0),
    "scale 3/4": LoraSpec(rank=4, alpha=3.0),
    "attention only": LoraSpec(rank=4, targets="attention"),
}
# diffusers reads a kohya file only when every Linear of every block is in it.
CASES = [(form, name) for form in ("native", "diffusers", "kohya") for name in SPECS if (form, name) != ("kohya", "attention only")]


def _tiny_wan() -> Any:
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    return WanTransformer3DModel(
        num_attention_heads=1, attention_head_dim=128, in_channels=4, out_channels=4, text_dim=64, freq_dim=32, ffn_dim=64, num_layers=2
    ).eval()


@torch.no_grad()
def _answer(transformer: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    latents_BCFHW = torch.randn(1, 4, 2, 4, 4, generator=generator)
    text_BLD = torch.randn(1, 512, 64, generator=generator)
    answer: torch.Tensor = transformer(latents_BCFHW, torch.tensor([500.0]), text_BLD, return_dict=False)[0]
    return answer


@pytest.fixture(scope="module")
def base_answer() -> torch.Tensor:
    return _answer(_tiny_wan())


@pytest.mark.parametrize(("form", "name"), CASES)
def test_the_pipeline_loads_the_file_and_answers_the_same(tmp_path: Path, base_answer: torch.Tensor, form: Form, name: str) -> None:
    from diffusers import WanPipeline

    spec, trained = SPECS[name], _tiny_wan()
    with torch.no_grad():
        for parameter in inject(trained, WAN, spec, seed=0):
            parameter.add_(0.1 * torch.randn_like(parameter))
    expected = _answer(trained)
    assert (expected - base_answer).abs().max() > 0.01

    write_lora(tmp_path / "a.safetensors", adapter_state(trained, spec), WAN, form)
    pipeline = WanPipeline(tokenizer=None, text_encoder=None, vae=None, scheduler=None, transformer=_tiny_wan())
    pipeline.load_lora_weights(str(tmp_path), weight_name="a.safetensors", local_files_only=True)
    answer = _answer(pipeline.transformer)
    torch.testing.assert_close(answer, expected)
    if name != "scale 3/4":
        assert torch.equal(answer, expected), "folding a power of two changes no bit of the answer"
