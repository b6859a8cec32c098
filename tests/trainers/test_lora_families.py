"""LoRAs over all targets of each real family: every form and back, and the spellings of other trainers."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_lora_format import FORMS, _same

from trainers.adapter import Adapter, LoraPair
from trainers.families.hunyuan import FAMILY as HUNYUAN
from trainers.families.mochi import FAMILY as MOCHI
from trainers.family import families
from trainers.job import LoraSpec
from trainers.keytable import Fuse
from trainers.lora import dora_problem
from trainers.lora_description import describe
from trainers.lora_format import convert, read_lora, write_lora

RANK, WIDTH = 2, 6
FAMILIES = list(families().values())
IDS = [family.id for family in FAMILIES]


def names_of(family: Any) -> list[str]:
    """The targets of blocks 0 and 11."""
    patterns = [name for row in family.keys.rows for name in (row.diffusers if isinstance(row, Fuse) else (row.diffusers,))]
    if not any("to_q" in pattern for pattern in patterns):  # a family whose blocks are named alike in both
        parts = [f"attn{n}.to_{x}" for n in (1, 2) for x in ("q", "k", "v", "out.0")] + ["ff.net.0.proj", "ff.net.2"]
        patterns = [f"{block}.{{}}.{part}" for block in family.blocks for part in parts]
    names = dict.fromkeys(pattern.replace("{}", index) for pattern, index in itertools.product(patterns, ("0", "11")))
    targets = family.targets.attention + family.targets.feed_forward
    return [name for name in names if any(re.fullmatch(target, name) for target in targets)]


def adapter_of(family: Any, dora: bool = False) -> Adapter:
    """Random pairs; rows in the proportions of fused members, an even number where halves are swapped."""
    chance = torch.Generator().manual_seed(3)
    modules = {}
    for name in names_of(family):
        place = family.keys.to_native(name)
        rows = 4 * (place.stop - place.start)
        pair = LoraPair(torch.randn(RANK, WIDTH, generator=chance), torch.randn(rows, RANK, generator=chance), 1.0)
        modules[name] = replace(pair, magnitude=1 + torch.rand(rows, 1, generator=chance)) if dora else pair
    return Adapter(modules, {}, "base")


@pytest.mark.parametrize("family", FAMILIES, ids=IDS)
def test_every_form_and_back_is_the_same_file(tmp_path: Path, family: Any) -> None:
    adapter = adapter_of(family)
    for form in FORMS:
        write_lora(tmp_path / f"{form}.safetensors", adapter, family, form)
    assert not any(key.endswith(".alpha") for key in load_file(tmp_path / "native.safetensors"))
    for source, target in itertools.permutations(FORMS, 2):
        convert(tmp_path / f"{source}.safetensors", tmp_path / f"{source}_{target}.safetensors", target)
        assert (tmp_path / f"{source}_{target}.safetensors").read_bytes() == (tmp_path / f"{target}.safetensors").read_bytes()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", FAMILIES, ids=IDS)
def test_every_form_is_described(tmp_path: Path, family: Any, form: Any) -> None:
    write_lora(tmp_path / "a.safetensors", adapter_of(family), family, form)
    found = describe(tmp_path / "a.safetensors")
    assert (found.family, found.kind, found.form, found.alphas) == (family.title, "LoRA", form, (1.0,))
    assert (found.ranks, found.others) == ((RANK,), 0)
    assert found.blocks == tuple(f"{block} 0, 11" for block in sorted(family.blocks))
    assert [item.what for item in found.coverage] == ["attention", "feed-forward"]
    assert all(item.adapted == item.targets for item in found.coverage)
    assert found.modules == sum(item.adapted for item in found.coverage) == len(names_of(family))


@pytest.mark.parametrize("family", FAMILIES, ids=IDS)
def test_a_dora_keeps_every_byte_between_native_and_kohya(tmp_path: Path, family: Any) -> None:
    write_lora(tmp_path / "native.safetensors", adapter_of(family, dora=True), family)
    convert(tmp_path / "native.safetensors", tmp_path / "kohya.safetensors", "kohya")
    convert(tmp_path / "kohya.safetensors", tmp_path / "again.safetensors", "native")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "native.safetensors").read_bytes()
    assert describe(tmp_path / "native.safetensors").kind == "DoRA"


def respelt(folder: Path, family: Any, change: Any) -> Path:
    """A native file with other keys."""
    write_lora(folder / "native.safetensors", adapter_of(family), family)
    save_file({change(key): tensor for key, tensor in load_file(folder / "native.safetensors").items()}, folder / "b.safetensors")
    return folder / "b.safetensors"


def to_checkpoint_names(key: str) -> str:
    """Hunyuan's LoRA names as ComfyUI's checkpoint has them."""
    key = re.sub(r"_attn_(qkv|proj)\.", r"_attn.\1.", key)
    return key.replace("mlp.fc1.", "mlp.0.").replace("mlp.fc2.", "mlp.2.")


HUNYUAN_SPELLINGS = {
    "diffusion-pipe": lambda key: key.replace("diffusion_model.", "transformer.", 1),
    "ComfyUI's names": to_checkpoint_names,
    "ComfyUI's names behind transformer.": lambda key: to_checkpoint_names(key).replace("diffusion_model.", "transformer.", 1),
}


@pytest.mark.parametrize("spelling", HUNYUAN_SPELLINGS)
def test_hunyuan_s_spellings_are_read(tmp_path: Path, spelling: str) -> None:
    path = respelt(tmp_path, HUNYUAN, HUNYUAN_SPELLINGS[spelling])
    assert _same(read_lora(path).modules, {name: folded(pair) for name, pair in adapter_of(HUNYUAN).modules.items()})


def test_mochi_s_own_spelling_is_read(tmp_path: Path) -> None:
    """Bare native names, and parts without .weight."""
    path = respelt(tmp_path, MOCHI, lambda key: key.removeprefix("diffusion_model.").removesuffix(".weight"))
    assert "blocks.0.attn.qkv_x.lora_A" in load_file(path)
    assert _same(read_lora(path).modules, {name: folded(pair) for name, pair in adapter_of(MOCHI).modules.items()})


def folded(pair: LoraPair) -> LoraPair:
    """As a file without our metadata gives it: scale 1."""
    return LoraPair(pair.down_RI, pair.up_OR * pair.scale, float(pair.rank))


@pytest.mark.parametrize("family", FAMILIES, ids=IDS)
def test_a_dora_of_half_a_fused_weight_is_refused(family: Any) -> None:
    nothing: Any = SimpleNamespace(tensors={}, path=Path("base.safetensors"))
    assert dora_problem(nothing, family, LoraSpec(dora=True)) is None
    told = str(dora_problem(nothing, family, LoraSpec(dora=True, targets="attention")) or "")
    assert ("single_blocks.0.linear1 is one weight" in told) == (family is HUNYUAN)
