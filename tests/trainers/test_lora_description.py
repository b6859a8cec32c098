"""What `inspect` says of LoRA files of every kind and of every trainer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_lora_format import FORMS, FUSED, FUSED_NAMES, WAN_NAMES, _adapter, _native

from trainers import lora_keys
from trainers.errors import LoraError
from trainers.families.wan import FAMILY as WAN
from trainers.inspection import inspect_file
from trainers.lora_description import describe
from trainers.lora_format import read_lora, write_lora

Q = "diffusion_model.blocks.0.self_attn.q"
PAIR = {f"{Q}.lora_A.weight": torch.zeros(2, 4), f"{Q}.lora_B.weight": torch.zeros(4, 2)}
WHOLE = [f"blocks.{i}.{part}" for i in range(3) for part in ("ffn.net.0.proj", "ffn.net.2")]
WHOLE += [f"blocks.{i}.attn{n}.{part}" for i in range(3) for n in (1, 2) for part in ("to_q", "to_k", "to_v", "to_out.0")]


@pytest.fixture(autouse=True)
def _two_families(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora_keys, "families", lambda: {"wan": WAN, "fused": FUSED})


def _saved(folder: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> Path:
    save_file(tensors, folder / "a.safetensors", metadata)
    return folder / "a.safetensors"


def _zeros(**shapes: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Tensors of one module, by the ends of their keys."""
    return {f"{Q}.{end}": torch.zeros(shape) for end, shape in shapes.items()}


LOKR = _zeros(lokr_w1=(2, 2), lokr_w2=(8, 8))
PATCH = "diffusion_model.patch_embedding"
CONTROL = PAIR | {
    f"{PATCH}.lora_A.weight": torch.zeros(2, 32, 1, 2, 2),
    f"{PATCH}.lora_B.weight": torch.zeros(4, 2, 1, 1, 1),
    f"{PATCH}.reshape_weight": torch.tensor([4, 32, 1, 2, 2]),
}
KINDS: dict[str, tuple[dict[str, torch.Tensor], str, tuple[str, ...], tuple[int, ...]]] = {
    "LoRA": (PAIR, "LoRA", (), (2,)),
    "DoRA": (PAIR | _zeros(dora_scale=(4, 1)), "DoRA", (), (2,)),
    "DoRA of peft": (PAIR | _zeros(lora_magnitude_vector=(4,)), "DoRA", (), (2,)),
    "LyCORIS' DoRA": (_zeros(lora_A=(2, 6), lora_B=(4, 2), dora_scale=(1, 6)), "DoRA of columns", (), (2,)),
    "LoKr": (_zeros(lokr_w1=(2, 2), lokr_w2_a=(8, 3), lokr_w2_b=(3, 8)), "LoKr", (), (3,)),
    "LoKr, whole": (LOKR | {f"{Q}.alpha": torch.tensor(1.0)}, "LoKr", (), ()),
    "LoKr with magnitudes": (LOKR | _zeros(dora_scale=(16, 1)), "LoKr", ("magnitudes",), ()),
    "LoHa": (_zeros(hada_w1_a=(8, 5), hada_w1_b=(5, 8), hada_w2_a=(8, 5), hada_w2_b=(5, 8)), "LoHa", (), (5,)),
    "with biases": (PAIR | _zeros(diff_b=(4,)) | {f"{Q}.lora_B.bias": torch.zeros(4)}, "LoRA", ("biases", "full differences"), (2,)),
    "full differences": (_zeros(diff=(4, 4), diff_b=(4,)), "full differences", (), ()),
    "control": (CONTROL, "control LoRA", (), (2,)),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_is_told(tmp_path: Path, name: str) -> None:
    tensors, kind, also, ranks = KINDS[name]
    found = describe(_saved(tmp_path, tensors))
    assert (found.family, found.kind, found.also, found.ranks) == (WAN.title, kind, also, ranks)
    report = inspect_file(tmp_path / "a.safetensors")
    assert (report.kind, report.problems) == ("LoRA", ())
    assert report.notes[0].startswith(f"{' with '.join([kind, *also])} for Wan, native form")


@pytest.mark.parametrize("name", [name for name, case in KINDS.items() if case[1] not in ("LoRA", "DoRA", "DoRA of columns")])
def test_other_kinds_are_not_read_into_an_adapter(tmp_path: Path, name: str) -> None:
    with pytest.raises(LoraError, match=r"only LoRA and DoRA .*Load it in ComfyUI as it is"):
        read_lora(_saved(tmp_path, KINDS[name][0]))


def test_the_whole_of_the_targets_and_less_of_them(tmp_path: Path) -> None:
    write_lora(tmp_path / "whole.safetensors", _adapter(WHOLE), WAN)
    found = describe(tmp_path / "whole.safetensors")
    assert [str(item) for item in found.coverage] == ["attention 24 of 24", "feed-forward 6 of 6"]
    assert (found.others, found.blocks) == (0, ("blocks 0-2",))
    some = [name for name in WHOLE if "attn1" in name and "blocks.1" not in name] + ["blocks.7.attn1.to_q", "proj_out"]
    write_lora(tmp_path / "some.safetensors", _adapter(some), WAN)
    found = describe(tmp_path / "some.safetensors")
    assert [str(item) for item in found.coverage] == ["attention 9 of 24"]
    assert (found.modules, found.others, found.blocks) == (10, 1, ("blocks 0, 2, 7",))
    assert "10 modules (attention 9 of 24, 1 others) in blocks 0, 2, 7" in str(found)


def test_fused_members_are_counted_one_by_one(tmp_path: Path) -> None:
    write_lora(tmp_path / "a.safetensors", _adapter(FUSED_NAMES), FUSED)
    found = describe(tmp_path / "a.safetensors")
    assert found.blocks == ("inner_layers 0", "layers 3, 12", "single 0")
    assert [str(item) for item in found.coverage] == ["attention 10 of 10", "feed-forward 2 of 3"]


FORM_OF = {
    "diffusion_model.": "native",
    "transformer.": "native names behind transformer.",
    "": "bare native names",
}


@pytest.mark.parametrize("prefix", FORM_OF)
def test_the_form_of_native_names(tmp_path: Path, prefix: str) -> None:
    """diffusion-pipe writes Wan behind diffusion_model. and Hunyuan behind transformer.; Mochi's trainer writes bare names."""
    write_lora(tmp_path / "native.safetensors", _adapter(FUSED_NAMES), FUSED)
    file = load_file(tmp_path / "native.safetensors")
    path = _saved(tmp_path, {prefix + key.removeprefix("diffusion_model."): tensor for key, tensor in file.items()})
    assert (describe(path).family, describe(path).form) == ("Fused", FORM_OF[prefix])
    assert read_lora(path).modules.keys() == _adapter(FUSED_NAMES).modules.keys()


@pytest.mark.parametrize("form", FORMS)
def test_the_forms_that_are_written(tmp_path: Path, form: Any) -> None:
    write_lora(tmp_path / "a.safetensors", _adapter(WAN_NAMES), WAN, form)
    assert describe(tmp_path / "a.safetensors").form == form


def test_a_folder_of_diffusion_pipe(tmp_path: Path) -> None:
    """Its adapter_model.safetensors has ComfyUI's names; the config beside it is peft's, with alpha = rank."""
    adapter = _adapter(WAN_NAMES, 8, 8.0, torch.bfloat16)
    (tmp_path / "epoch20").mkdir()
    tensors = {f"diffusion_model.{_native(name)}.lora_A.weight": pair.down_RI for name, pair in adapter.modules.items()}
    tensors |= {f"diffusion_model.{_native(name)}.lora_B.weight": pair.up_OR for name, pair in adapter.modules.items()}
    save_file(tensors, tmp_path / "epoch20" / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": ["blocks.0.self_attn.q"], "use_rslora": False}
    (tmp_path / "epoch20" / "adapter_config.json").write_text(json.dumps(config))
    report = inspect_file(tmp_path / "epoch20")
    assert (report.kind, report.problems) == ("LoRA", ())
    assert report.notes[:2] == ("LoRA for Wan, native form", "rank 8, alpha 8")
    read = read_lora(tmp_path / "epoch20" / "adapter_model.safetensors")
    assert {pair.alpha for pair in read.modules.values()} == {8.0}
    assert read.modules.keys() == adapter.modules.keys()


def test_the_doubled_underscore_of_wan_fun(tmp_path: Path) -> None:
    tensors = {"lora_unet__blocks_0_cross_attn_k.lora_down.weight": torch.zeros(2, 4)}
    tensors |= {"lora_unet__blocks_0_cross_attn_k.lora_up.weight": torch.zeros(4, 2)}
    assert describe(_saved(tmp_path, tensors)).parts == ("attn2.to_k",)


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"video_trainer.trigger_words": '["a", "b"]', "modelspec.trigger_phrase": "c"}, ("a", "b")),
        ({"modelspec.trigger_phrase": "a b", "ss_tag_frequency": '{"x": {"c": 1}}'}, ("a b",)),
        ({"ss_tag_frequency": '{"x": {"rare": 1, "often ": 9}, "y": {"often": 1, "some": 3}}'}, ("often", "some", "rare")),
        ({"ss_tag_frequency": "{", "video_trainer.trigger_words": "{"}, ()),
        ({"ss_tag_frequency": '[1, {"x": 3}]'}, ()),
    ],
)
def test_trigger_words_of_every_trainer(tmp_path: Path, metadata: dict[str, str], words: tuple[str, ...]) -> None:
    assert describe(_saved(tmp_path, PAIR, metadata)).trigger_words == words


@pytest.mark.parametrize(
    ("metadata", "variant"),
    [
        ({"video_trainer.variant": "wan2.1-t2v-14b", "ss_base_model_version": "x"}, "wan2.1-t2v-14b"),
        ({"ss_base_model_version": "wan"}, "wan"),
        ({"modelspec.architecture": "wan2.1/lora"}, "wan2.1"),
        ({}, None),
    ],
)
def test_the_variant_that_the_metadata_tell(tmp_path: Path, metadata: dict[str, str], variant: str | None) -> None:
    assert describe(_saved(tmp_path, PAIR, metadata)).variant == variant


def test_another_family_than_asked_for(tmp_path: Path) -> None:
    with pytest.raises(LoraError, match=r"is a LoRA for Wan; Fused was asked for\. Use it with Wan"):
        describe(_saved(tmp_path, PAIR), FUSED)
