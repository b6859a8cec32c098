from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pairwise import pairwise
from safetensors import safe_open
from safetensors.torch import load_file
from safetensors.torch import save_file as library_save_file

from trainers import lora_keys
from trainers.adapter import Adapter, LoraPair
from trainers.errors import LoraError
from trainers.families.wan import FAMILY as WAN
from trainers.family import LoraTargets
from trainers.keytable import Fuse, KeyTable, Rename, SwapHalves
from trainers.lora_format import Form, convert, read_lora, write_lora

ROOT = Path(__file__).parents[2]
FORMS: tuple[Form, ...] = ("native", "diffusers", "kohya")


def _fused_keys(attention: str, feed_forward: str) -> KeyTable:
    return KeyTable(
        (
            Fuse(("layers.{}.attn.to_q", "layers.{}.attn.to_k", "layers.{}.attn.to_v"), f"double.{{}}.{attention}"),
            Fuse(("single.{}.to_q", "single.{}.to_k", "single.{}.to_v", "single.{}.mlp"), "single.{}.linear1", (1, 1, 1, 4)),
            SwapHalves("layers.{}.ff.net.0.proj", f"double.{{}}.{feed_forward}"),
            Rename("inner_layers.{}", "inner_layers.{}"),
        )
    )


# Its LoRAs are spelt otherwise than its checkpoints.
FUSED: Any = SimpleNamespace(
    id="fused",
    title="Fused",
    keys=_fused_keys("img_attn.qkv", "img_mlp.0"),
    lora_keys=_fused_keys("img_attn_qkv", "img_mlp.w1"),
    targets=LoraTargets(
        attention=(r"layers\.\d+\.attn\.to_[qkv]", r"single\.\d+\.to_[qkv]", r"inner_layers\.\d+\.attn1\.to_[qkv]"),
        feed_forward=(r"layers\.\d+\.ff\.net\.0\.proj", r"single\.\d+\.mlp"),
    ),
)
PARTS = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "attn2.to_q", "attn2.to_out.0", "ffn.net.0.proj", "ffn.net.2")
WAN_NAMES = [f"blocks.{i}.{part}" for i in (0, 11) for part in PARTS]
FUSED_NAMES = [
    *(f"layers.3.attn.to_{letter}" for letter in "qkv"),
    *(f"layers.12.attn.to_{letter}" for letter in "qv"),
    *(f"single.0.{part}" for part in ("to_q", "to_k", "to_v", "mlp")),
    "layers.3.ff.net.0.proj",
    "inner_layers.0.attn1.to_q",
]


@pytest.fixture(autouse=True)
def _two_families(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora_keys, "families", lambda: {"wan": WAN, "fused": FUSED})


def _adapter(names: list[str], rank: int = 8, alpha: float = 8.0, dtype: torch.dtype = torch.float32) -> Adapter:
    generator = torch.Generator().manual_seed(1)

    def pair(name: str) -> LoraPair:
        rows = 48 if name.endswith(".mlp") else 12
        down, up = torch.randn(rank, 10, generator=generator), torch.randn(rows, rank, generator=generator)
        return LoraPair(down.to(dtype), up.to(dtype), alpha)

    return Adapter({name: pair(name) for name in names}, {"modelspec.title": "a title", "video_trainer.step": "7", "ä": "ö"})


def _same(left: Mapping[str, LoraPair], right: Mapping[str, LoraPair]) -> bool:
    def equal(a: LoraPair, b: LoraPair) -> bool:
        tensors = ((a.down_RI, b.down_RI), (a.up_OR, b.up_OR))
        return a.alpha == b.alpha and all(x.dtype == y.dtype and torch.equal(x, y) for x, y in tensors)

    return left.keys() == right.keys() and all(equal(left[name], right[name]) for name in left)


SHAPES: dict[str, Any] = {
    "wan, alpha = rank": (WAN, WAN_NAMES, 8, 8.0),
    "wan, scale 1/4": (WAN, WAN_NAMES, 8, 2.0),
    "wan, rank 6": (WAN, WAN_NAMES, 6, 6.0),
    "fused, alpha = rank": (FUSED, FUSED_NAMES, 8, 8.0),
    "fused, scale 1/4": (FUSED, FUSED_NAMES, 8, 2.0),
}
ODD_SCALES: dict[str, Any] = {"wan, scale 3/4": (WAN, WAN_NAMES, 8, 6.0), "fused, scale 0.6625": (FUSED, FUSED_NAMES, 8, 5.3)}


@pairwise("shape, form, dtype", SHAPES, FORMS, [torch.float32, torch.bfloat16])
def test_what_is_written_is_read(tmp_path: Path, shape: str, form: Form, dtype: torch.dtype) -> None:
    family, *sizes = (SHAPES | ODD_SCALES)[shape]
    adapter = _adapter(*sizes, dtype)
    write_lora(tmp_path / "a.safetensors", adapter, family, form)
    read = read_lora(tmp_path / "a.safetensors", family)
    assert _same(read.modules, adapter.modules)
    assert read.metadata == adapter.metadata


@pairwise("shape, form, dtype", SHAPES | ODD_SCALES, FORMS, [torch.float32, torch.bfloat16, torch.float16])
def test_native_to_a_form_and_back_is_the_same_file(tmp_path: Path, shape: str, form: Form, dtype: torch.dtype) -> None:
    family, *sizes = (SHAPES | ODD_SCALES)[shape]
    write_lora(tmp_path / "native.safetensors", _adapter(*sizes, dtype), family)
    convert(tmp_path / "native.safetensors", tmp_path / "form.safetensors", form)
    convert(tmp_path / "form.safetensors", tmp_path / "again.safetensors", "native")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "native.safetensors").read_bytes()


@pairwise("shape, form, dtype", SHAPES, FORMS, [torch.float32, torch.bfloat16])
def test_a_form_to_native_and_back_is_the_same_file(tmp_path: Path, shape: str, form: Form, dtype: torch.dtype) -> None:
    family, *sizes = (SHAPES | ODD_SCALES)[shape]
    write_lora(tmp_path / "form.safetensors", _adapter(*sizes, dtype), family, form)
    convert(tmp_path / "form.safetensors", tmp_path / "native.safetensors", "native")
    convert(tmp_path / "native.safetensors", tmp_path / "again.safetensors", form)
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "form.safetensors").read_bytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kohya_with_an_odd_scale_keeps_alpha_and_the_scaled_weights(tmp_path: Path, dtype: torch.dtype) -> None:
    write_lora(tmp_path / "form.safetensors", _adapter(WAN_NAMES, 8, 6.0, dtype), WAN, "kohya")
    convert(tmp_path / "form.safetensors", tmp_path / "native.safetensors", "native")
    convert(tmp_path / "native.safetensors", tmp_path / "again.safetensors", "kohya")
    before, after = load_file(tmp_path / "form.safetensors"), load_file(tmp_path / "again.safetensors")
    assert before.keys() == after.keys()
    for key in before:
        if not key.endswith("lora_up.weight") or dtype == torch.bfloat16:
            assert torch.equal(before[key], after[key])
        else:
            assert torch.equal(before[key] * 0.75, after[key] * 0.75)
            assert (before[key].view(torch.int32) - after[key].view(torch.int32)).abs().max() <= 1


def test_the_keys_and_the_folded_scale(tmp_path: Path) -> None:
    adapter = _adapter(["blocks.3.ffn.net.0.proj", "blocks.3.attn1.to_out.0"], 8, 2.0)
    files = {}
    for form in FORMS:
        write_lora(tmp_path / f"{form}.safetensors", adapter, WAN, form)
        files[form] = load_file(tmp_path / f"{form}.safetensors")
    assert set(files["native"]) == {f"diffusion_model.blocks.3.{m}.lora_{p}.weight" for m in ("ffn.0", "self_attn.o") for p in "AB"}
    assert set(files["diffusers"]) == {
        f"transformer.blocks.3.{m}.lora_{p}.weight" for m in ("ffn.net.0.proj", "attn1.to_out.0") for p in "AB"
    }
    assert set(files["kohya"]) == {
        f"lora_unet_blocks_3_{m}.{p}" for m in ("ffn_0", "self_attn_o") for p in ("lora_down.weight", "lora_up.weight", "alpha")
    }
    up = adapter.modules["blocks.3.attn1.to_out.0"].up_OR
    assert torch.equal(files["native"]["diffusion_model.blocks.3.self_attn.o.lora_B.weight"], up * 0.25)
    assert torch.equal(files["diffusers"]["transformer.blocks.3.attn1.to_out.0.lora_B.weight"], up * 0.25)
    assert torch.equal(files["kohya"]["lora_unet_blocks_3_self_attn_o.lora_up.weight"], up)
    assert files["kohya"]["lora_unet_blocks_3_self_attn_o.alpha"].item() == 2.0


def test_fused_members_give_the_native_update(tmp_path: Path) -> None:
    adapter = _adapter(FUSED_NAMES, 8, 2.0)
    write_lora(tmp_path / "a.safetensors", adapter, FUSED)
    file = load_file(tmp_path / "a.safetensors")

    def update(name: str) -> torch.Tensor:
        pair = adapter.modules[name]
        return pair.up_OR * 0.25 @ pair.down_RI

    def native(name: str) -> torch.Tensor:
        return file[f"diffusion_model.{name}.lora_B.weight"] @ file[f"diffusion_model.{name}.lora_A.weight"]

    torch.testing.assert_close(native("double.3.img_attn_qkv"), torch.cat([update(f"layers.3.attn.to_{letter}") for letter in "qkv"]))
    q, v = update("layers.12.attn.to_q"), update("layers.12.attn.to_v")
    torch.testing.assert_close(native("double.12.img_attn_qkv"), torch.cat([q, torch.zeros_like(q), v]))
    parts = [update(f"single.0.{part}") for part in ("to_q", "to_k", "to_v", "mlp")]
    torch.testing.assert_close(native("single.0.linear1"), torch.cat(parts))
    torch.testing.assert_close(native("double.3.img_mlp.w1"), update("layers.3.ff.net.0.proj").roll(6, 0))


@pytest.mark.parametrize("prefix", ["transformer.", "diffusion_model.", "model.diffusion_model.", ""])
@pytest.mark.parametrize("naming", ["LoRAs'", "checkpoints'", "LoRAs', kohya", "checkpoints', kohya"])
def test_both_namings_of_a_family_are_read(tmp_path: Path, naming: str, prefix: str) -> None:
    adapter = _adapter(FUSED_NAMES)
    write_lora(tmp_path / "native.safetensors", adapter, FUSED)
    tensors = {}
    for key, tensor in load_file(tmp_path / "native.safetensors").items():
        module, _, part = key.removeprefix("diffusion_model.").partition(".lora_")
        if naming.startswith("checkpoints'"):
            module = module.replace("img_attn_qkv", "img_attn.qkv").replace("img_mlp.w1", "img_mlp.0")
        kohya = f"lora_unet_{module.replace('.', '_')}.lora_{'down' if part[0] == 'A' else 'up'}.weight"
        tensors[kohya if naming.endswith("kohya") else f"{prefix}{module}.lora_{part}"] = tensor
    library_save_file(tensors, tmp_path / "a.safetensors")
    assert _same(read_lora(tmp_path / "a.safetensors").modules, adapter.modules)


SPELLINGS: dict[str, Callable[[str], tuple[str, str]]] = {
    "diffusers": lambda name: (f"transformer.{name}.lora_A.weight", f"transformer.{name}.lora_B.weight"),
    "bare diffusers": lambda name: (f"{name}.lora_A.weight", f"{name}.lora_B.weight"),
    "peft": lambda name: (f"base_model.model.{name}.lora_A.weight", f"base_model.model.{name}.lora_B.weight"),
    "peft with the adapter's name": lambda name: (f"{name}.lora_A.default.weight", f"{name}.lora_B.default.weight"),
    "native": lambda name: (f"diffusion_model.{_native(name)}.lora_A.weight", f"diffusion_model.{_native(name)}.lora_B.weight"),
    "native, up and down": lambda name: (
        f"diffusion_model.{_native(name)}.lora_down.weight",
        f"diffusion_model.{_native(name)}.lora_up.weight",
    ),
    "bare native": lambda name: (f"{_native(name)}.lora_A", f"{_native(name)}.lora_B"),
    "old diffusers": lambda name: (f"transformer.{name}_lora.down.weight", f"transformer.{name}_lora.up.weight"),
    "dotted": lambda name: (f"transformer.{name}.lora.down.weight", f"transformer.{name}.lora.up.weight"),
}


def _native(name: str) -> str:
    return WAN.keys.to_native(name).name


@pytest.mark.parametrize("with_alpha", [False, True])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_common_spellings_are_read(tmp_path: Path, spelling: str, with_alpha: bool) -> None:
    adapter = _adapter(WAN_NAMES, 8, 2.0 if with_alpha else 8.0)
    tensors = {}
    for name, pair in adapter.modules.items():
        down, up = SPELLINGS[spelling](name)
        tensors |= {down: pair.down_RI, up: pair.up_OR}
        if with_alpha:
            module = down.split(".lora")[0].split("_lora")[0]
            tensors[f"{module}.alpha"] = torch.tensor(2.0)
    library_save_file(tensors, tmp_path / "a.safetensors")
    assert _same(read_lora(tmp_path / "a.safetensors").modules, adapter.modules)


def test_a_musubi_file_with_its_own_alphas(tmp_path: Path) -> None:
    """Sixteen bits and an alpha of each module's own, as such files have them."""
    adapter = _adapter(WAN_NAMES, 8, 8.0, torch.bfloat16)
    modules = {name: LoraPair(pair.down_RI, pair.up_OR, 1.0 + i) for i, (name, pair) in enumerate(adapter.modules.items())}
    tensors = {}
    for name, pair in modules.items():
        stem = "lora_unet_" + _native(name).replace(".", "_")
        tensors |= {f"{stem}.lora_down.weight": pair.down_RI, f"{stem}.lora_up.weight": pair.up_OR}
        tensors[f"{stem}.alpha"] = torch.tensor(pair.alpha, dtype=torch.bfloat16)
    library_save_file(tensors, tmp_path / "a.safetensors", {"ss_network_dim": "8"})
    assert _same(read_lora(tmp_path / "a.safetensors").modules, modules)
    convert(tmp_path / "a.safetensors", tmp_path / "native.safetensors", "native")
    convert(tmp_path / "native.safetensors", tmp_path / "b.safetensors", "kohya")
    assert _same(read_lora(tmp_path / "b.safetensors").modules, modules)


@pytest.mark.parametrize("rslora", [False, True])
def test_the_alpha_that_diffusers_writes_into_the_header(tmp_path: Path, rslora: bool) -> None:
    adapter = _adapter(["blocks.0.attn1.to_q", "blocks.1.ffn.net.2"], 4)
    tensors = {
        f"transformer.{name}.lora_{p}.weight": t
        for name, pair in adapter.modules.items()
        for p, t in zip("AB", (pair.down_RI, pair.up_OR), strict=True)
    }
    config = {"r": 4, "lora_alpha": 2, "alpha_pattern": {"blocks.1.ffn.net.2": 16}, "use_rslora": rslora}
    header = {"lora_adapter_metadata": json.dumps({f"transformer.{key}": value for key, value in config.items()})}
    library_save_file(tensors, tmp_path / "a.safetensors", header)
    read = read_lora(tmp_path / "a.safetensors")
    factor = 2.0 if rslora else 1.0
    assert {name: pair.scale for name, pair in read.modules.items()} == {
        "blocks.0.attn1.to_q": 0.5 * factor,
        "blocks.1.ffn.net.2": 4.0 * factor,
    }
    convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "diffusers")
    with safe_open(tmp_path / "b.safetensors", "pt") as file:
        assert "lora_adapter_metadata" not in file.metadata()
    assert _same(read_lora(tmp_path / "b.safetensors").modules, read.modules)


def test_the_alpha_that_peft_writes_beside_the_file(tmp_path: Path) -> None:
    pair = _adapter(["blocks.0.attn1.to_q"], 4).modules["blocks.0.attn1.to_q"]
    stem = "base_model.model.blocks.0.attn1.to_q"
    library_save_file({f"{stem}.lora_A.weight": pair.down_RI, f"{stem}.lora_B.weight": pair.up_OR}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"r": 4, "lora_alpha": 2}')
    assert read_lora(tmp_path / "adapter_model.safetensors").modules["blocks.0.attn1.to_q"].alpha == 2.0


def test_an_alpha_that_was_added_later_counts_and_the_record_does_not(tmp_path: Path) -> None:
    write_lora(tmp_path / "a.safetensors", _adapter(["blocks.0.attn1.to_q"], 8, 2.0), WAN)
    tensors = load_file(tmp_path / "a.safetensors") | {"diffusion_model.blocks.0.self_attn.q.alpha": torch.tensor(4.0)}
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        library_save_file(tensors, tmp_path / "b.safetensors", file.metadata())
    pair = read_lora(tmp_path / "b.safetensors").modules["blocks.0.attn1.to_q"]
    assert pair.alpha == 4.0
    assert torch.equal(pair.up_OR, tensors["diffusion_model.blocks.0.self_attn.q.lora_B.weight"])


def test_the_order_of_modules_and_metadata_does_not_matter(tmp_path: Path) -> None:
    adapter = _adapter(FUSED_NAMES)
    other = Adapter(dict(reversed(adapter.modules.items())), dict(reversed(adapter.metadata.items())))
    write_lora(tmp_path / "a.safetensors", adapter, FUSED)
    write_lora(tmp_path / "b.safetensors", other, FUSED)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_another_process_writes_the_same_file(tmp_path: Path) -> None:
    write_lora(tmp_path / "a.safetensors", _adapter(WAN_NAMES, 8, 6.0), WAN)
    code = (
        "import sys; from pathlib import Path; from trainers.lora_format import convert;"
        "convert(Path(sys.argv[1]), Path(sys.argv[2]), 'native')"
    )
    arguments = [str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors")]
    subprocess.run([sys.executable, "-c", code, *arguments], check=True, cwd=ROOT, env={**os.environ, "PYTHONHASHSEED": "1"})
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def _save(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    library_save_file(tensors, path)
    return path


PAIR = {
    "diffusion_model.blocks.0.self_attn.q.lora_A.weight": torch.zeros(2, 4),
    "diffusion_model.blocks.0.self_attn.q.lora_B.weight": torch.zeros(4, 2),
}


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ({"diffusion_model.blocks.0.self_attn.q.dora_scale": (3, 1)}, r"magnitudes \(3, 1\) for a weight of \(4, 4\)"),
        ({"diffusion_model.blocks.0.self_attn.k.dora_scale": (4, 1)}, r"self_attn\.k\.dora_scale without its counterpart"),
        ({"diffusion_model.blocks.0.self_attn.q.lora_mid.weight": (2, 2, 3, 3)}, "a middle factor"),
        ({"diffusion_model.blocks.0.ffn.0.lokr_w1": (2, 2)}, "LoKr"),
        ({"diffusion_model.blocks.0.norm3.diff_b": (4,)}, "full differences"),
        ({"diffusion_model.blocks.0.self_attn.q.lora_B.bias": (4,)}, "biases"),
        ({"text_encoder.q.what": (4,)}, r"holds .*text_encoder\.q\.what"),
        ({"diffusion_model.blocks.0.self_attn.k.lora_A.weight": (2, 4)}, r"self_attn\.k\.lora_A\.weight without its counterpart"),
        ({"diffusion_model.blocks.0.self_attn.q.lora_down.weight": (2, 4)}, r"lora_down\.weight"),
        (
            {"diffusion_model.blocks.0.nothing.lora_A.weight": (2, 4), "diffusion_model.blocks.0.nothing.lora_B.weight": (4, 2)},
            r"blocks\.0\.nothing",
        ),
        (
            {"diffusion_model.blocks.0.ffn.0.lora_A.weight": (2, 4), "diffusion_model.blocks.0.ffn.0.lora_B.weight": (4, 3)},
            r"A \(2, 4\) and B \(4, 3\)",
        ),
    ],
)
def test_keys_that_are_no_lora_are_named_and_not_dropped(tmp_path: Path, extra: dict[str, tuple[int, ...]], said: str) -> None:
    path = _save(tmp_path / "a.safetensors", PAIR | {key: torch.zeros(shape) for key, shape in extra.items()})
    with pytest.raises(LoraError, match=said):
        read_lora(path)


def test_a_lora_of_another_family_is_refused_by_its_name(tmp_path: Path) -> None:
    path = _save(tmp_path / "a.safetensors", PAIR)
    with pytest.raises(LoraError, match=r"a\.safetensors is a LoRA for Wan.*Fused was asked for"):
        read_lora(path, FUSED)
    unknown = {key.replace("self_attn", "strange"): value for key, value in PAIR.items()}
    with pytest.raises(LoraError, match=r"blocks\.0\.strange\.q.*Wan.* or Fused"):
        read_lora(_save(tmp_path / "b.safetensors", unknown))


def test_a_file_that_is_no_safetensors_file(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"not a LoRA at all")
    with pytest.raises(LoraError, match=r"a\.safetensors cannot be read"):
        read_lora(tmp_path / "a.safetensors")
    with pytest.raises(LoraError, match=r"b\.safetensors cannot be read"):
        read_lora(tmp_path / "b.safetensors")


def test_no_file_is_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_lora(path, _adapter(WAN_NAMES), WAN)
    before = path.read_bytes()
    write_lora(path, _adapter(WAN_NAMES), WAN)
    with pytest.raises(LoraError, match=r"a\.safetensors exists"):
        write_lora(path, _adapter(WAN_NAMES, rank=4, alpha=4.0), WAN)
    with pytest.raises(LoraError, match=r"a\.safetensors exists"):
        convert(path, path, "kohya")
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(LoraError, match=r"nowhere.*cannot be written"):
        write_lora(tmp_path / "nowhere" / "a.safetensors", _adapter(WAN_NAMES), WAN)
