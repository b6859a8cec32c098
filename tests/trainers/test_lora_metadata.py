from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file as library_save_file

from trainers.adapter import Adapter, LoraPair
from trainers.errors import LoraError
from trainers.families.wan import FAMILY as WAN
from trainers.family import Variant
from trainers.lora_description import describe
from trainers.lora_format import Form, read_lora, write_lora
from trainers.lora_metadata import lora_metadata

VARIANT = Variant("wan2.1-t2v-1.3b", "Wan 2.1 T2V 1.3B")


def _metadata(**changes: Any) -> dict[str, str]:
    values: dict[str, Any] = {
        "name": "bounce",
        "family": WAN,
        "variant": VARIANT,
        "base": "/somewhere/models/wan2.1_t2v_1.3B_bf16.safetensors",
        "rank": 8,
        "alpha": 4.0,
        "step": 500,
        "trigger_words": ("bo ünce", "ball"),
        "job_hash": "0123456789abcdef",
    }
    return lora_metadata(**(values | changes))


def _adapter() -> Adapter:
    names = [f"blocks.{i}.{part}" for i in range(3) for part in ("attn1.to_q", "ffn.net.0.proj")]
    return Adapter({name: LoraPair(torch.zeros(8, 6), torch.ones(5, 8), 4.0) for name in names})


def test_what_lora_managers_read() -> None:
    found = _metadata()
    assert found["ss_network_dim"] == "8"
    assert found["ss_network_alpha"] == "4.0"
    assert found["ss_base_model_version"] == "Wan 2.1 T2V 1.3B"
    assert found["ss_output_name"] == found["modelspec.title"] == "bounce"
    assert found["modelspec.architecture"] == "wan2.1-t2v-1.3b/lora"
    assert found["modelspec.trigger_phrase"] == "bo ünce, ball"
    assert json.loads(found["ss_tag_frequency"]) == {"bounce": {"bo ünce": 1, "ball": 1}}
    assert all(isinstance(value, str) for value in found.values())


@pytest.mark.parametrize(
    "base", ["/a b/c/base.safetensors", r"C:\models\base.safetensors", "base.safetensors", "/folder/base.safetensors/"]
)
def test_no_path_is_written(base: str) -> None:
    found = _metadata(base=base)
    assert found["video_trainer.base"] == "base.safetensors"
    assert not any("folder" in value or "models" in value or "a b" in value for value in found.values())


def test_without_alpha_or_trigger_words() -> None:
    found = _metadata(alpha=None, trigger_words=())
    assert found["video_trainer.alpha"] == "8.0"
    assert not any("trigger" in key or "tag" in key for key in found)


@pytest.mark.parametrize("form", ["native", "diffusers", "kohya"])
def test_a_file_is_described_whatever_its_form(tmp_path: Path, form: Form) -> None:
    path = tmp_path / "a.safetensors"
    write_lora(path, _adapter(), WAN, form, _metadata())
    found = describe(path)
    assert (found.family, found.form, found.ranks, found.alphas) == (WAN.title, form, (8,), (4.0,))
    assert (found.modules, found.blocks, found.parts) == (6, ("blocks 0-2",), ("attn1.to_q", "ffn.net.0.proj"))
    assert (found.trigger_words, found.base, found.variant) == (
        ("bo ünce", "ball"),
        "wan2.1_t2v_1.3B_bf16.safetensors",
        "wan2.1-t2v-1.3b",
    )
    assert found.step == 500
    assert "rank 8, alpha 4" in str(found)


def test_the_metadata_are_in_the_file(tmp_path: Path) -> None:
    write_lora(tmp_path / "a.safetensors", _adapter(), WAN, "native", _metadata())
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert _metadata().items() <= file.metadata().items()


def test_a_stranger_s_file_is_described_too(tmp_path: Path) -> None:
    tensors = {"lora_unet_blocks_0_ffn_0.lora_down.weight": torch.zeros(2, 4), "lora_unet_blocks_0_ffn_0.lora_up.weight": torch.zeros(4, 2)}
    tensors["lora_unet_blocks_0_ffn_0.alpha"] = torch.tensor(1.5)
    library_save_file(tensors, tmp_path / "a.safetensors")
    found = describe(tmp_path / "a.safetensors")
    assert (found.form, found.ranks, found.alphas, found.base, found.step) == ("kohya", (2,), (1.5,), None, None)


@pytest.mark.parametrize("record", ["[1", "[1]", '{"alpha": "much"}', '{"alpha": {"blocks.0.attn1.to_q": -1.0}}'])
def test_a_damaged_record_is_an_error(tmp_path: Path, record: str) -> None:
    write_lora(tmp_path / "a.safetensors", _adapter(), WAN, "native", {})
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    library_save_file(tensors, tmp_path / "b.safetensors", {"video_trainer.unfold": record})
    for read in (describe, read_lora):
        with pytest.raises(LoraError, match=r"b\.safetensors: video_trainer\.unfold"):
            read(tmp_path / "b.safetensors")


def test_a_lora_of_no_known_family(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from trainers import lora_keys

    write_lora(tmp_path / "a.safetensors", _adapter(), WAN)
    none = SimpleNamespace(id="none", title="None", keys=WAN.vaes[0].keys, lora_keys=WAN.vaes[0].keys, targets=WAN.targets)
    monkeypatch.setattr(lora_keys, "families", lambda: {"none": none})
    with pytest.raises(LoraError, match="must be one of None"):
        describe(tmp_path / "a.safetensors")
