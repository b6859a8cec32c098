from __future__ import annotations

import pytest
import torch

from trainers.errors import KeyTableError
from trainers.keytable import Fuse, KeyTable, Pointwise, Rename, SwapHalves
from trainers.load import native_state

TABLE = KeyTable(
    (
        Rename("blocks.{}.proj", "layers.{}.out"),
        Fuse(("blocks.{}.to_q", "blocks.{}.to_k", "blocks.{}.mlp"), "layers.{}.qkv_mlp", (1, 1, 3)),
        SwapHalves("norm_out.linear", "final.1"),
    ),
    ignored=("rope.freqs",),
)


def state() -> dict[str, torch.Tensor]:
    rows = {"proj": 2, "to_q": 2, "to_k": 2, "mlp": 6}
    shapes = {f"blocks.{index}.{name}.weight": (count, 3) for index in (0, 12) for name, count in rows.items()}
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(*shape, generator=generator) for name, shape in (shapes | {"norm_out.linear.bias": (4,)}).items()}


def test_native_and_back_is_equal_in_bytes() -> None:
    native = native_state(state(), TABLE)
    assert {name: tuple(tensor.shape) for name, tensor in native.items()} == {
        "layers.0.out.weight": (2, 3),
        "layers.0.qkv_mlp.weight": (10, 3),
        "layers.12.out.weight": (2, 3),
        "layers.12.qkv_mlp.weight": (10, 3),
        "final.1.bias": (4,),
    }
    back = {name: place.cut(native[place.name]) for name, place in TABLE.map_file(native).items()}
    assert back.keys() == state().keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in state().items())


def test_fused_rows_are_in_the_order_of_the_row() -> None:
    native, parts = native_state(dict(reversed(state().items())), TABLE), state()
    expected = [parts[f"blocks.12.{name}.weight"] for name in ("to_q", "to_k", "mlp")]
    assert torch.equal(native["layers.12.qkv_mlp.weight"], torch.cat(expected))
    assert torch.equal(native["final.1.bias"], parts["norm_out.linear.bias"].roll(2))


def test_a_fused_tensor_is_written_whole() -> None:
    incomplete = {name: tensor for name, tensor in state().items() if name != "blocks.0.to_k.weight"}
    with pytest.raises(KeyTableError, match=r"parts of layers\.0\.qkv_mlp\.weight are missing"):
        native_state(incomplete, TABLE)


def test_pieces_are_views() -> None:
    native = native_state(state(), TABLE)
    fused = native["layers.0.qkv_mlp.weight"]
    piece = TABLE.to_native("blocks.0.mlp.weight").cut(fused)
    assert piece.untyped_storage().data_ptr() == fused.untyped_storage().data_ptr()


def test_unknown_names_are_listed() -> None:
    names = [f"layers.0.strange_{index}" for index in range(7)]
    with pytest.raises(KeyTableError, match=r"no place for layers\.0\.strange_0, .*and 2 more"):
        TABLE.map_file([*names, "rope.freqs", "layers.0.out.weight"])
    with pytest.raises(KeyTableError, match="no place for blocks_0"):
        TABLE.to_native("blocks_0.proj")


def test_patterns_end_at_dots() -> None:
    with pytest.raises(KeyTableError):
        TABLE.to_native("blocks.1.project.weight")
    assert TABLE.to_native("blocks.1.proj").name == "layers.1.out"


def test_a_linear_is_a_convolution_of_size_1_in_the_file() -> None:
    table = KeyTable((Pointwise("attentions.0.to_q", "attn_1.q"),))
    ours = {"attentions.0.to_q.weight": torch.randn(4, 3), "attentions.0.to_q.bias": torch.randn(4)}
    native = native_state(ours, table)
    assert {name: tuple(tensor.shape) for name, tensor in native.items()} == {"attn_1.q.weight": (4, 3, 1, 1, 1), "attn_1.q.bias": (4,)}
    for name, place in table.map_file(native).items():
        assert torch.equal(place.cut(native[place.name]), ours[name])
        assert place.shape(tuple(native[place.name].shape)) == tuple(ours[name].shape)
    assert table.to_native("attentions.0.to_q.weight").shape((4, 3, 3, 3, 3)) == (4, 3, 3, 3, 3), "no convolution of size 1"


def test_the_last_block_may_have_names_of_its_own() -> None:
    table = KeyTable((Rename("blocks.{}.norm.linear", "layers.{}.mod"), Rename("blocks.{}.norm.linear_1", "layers.{last}.mod")), last=47)
    names = [f"layers.{index}.mod.weight" for index in (0, 1, 10)]
    assert [*table.map_file(names)] == ["blocks.0.norm.linear.weight", "blocks.1.norm.linear.weight", "blocks.10.norm.linear_1.weight"]
    assert [*table.map_file(names[:1])] == ["blocks.0.norm.linear_1.weight"], "a file's own last block"
    assert table.to_native("blocks.10.norm.linear_1.weight").name == "layers.10.mod.weight"
    assert [table.to_diffusers(f"layers.{index}.mod")[0].name[-8:] for index in (4, 47, 147)] == ["m.linear", "linear_1", "m.linear"]
