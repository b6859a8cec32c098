"""A text encoder with its tokenizer is found from any of the places that a user may choose."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from trainers.transformers_folder import TransformersFolder


def write_encoder(folder: Path, names: tuple[str, ...] = ("model.safetensors",)) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text('{"model_type": "umt5", "d_model": 8}')
    for name in names:
        save_file({f"shared.{name}": torch.zeros(2)}, folder / name)


def write_tokenizer(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "spiece.model").write_bytes(b"pieces")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    write_encoder(tmp_path / "wan" / "text_encoder")
    write_tokenizer(tmp_path / "wan" / "tokenizer")
    return tmp_path / "wan"


@pytest.mark.parametrize("chosen", [".", "text_encoder", "text_encoder/model.safetensors"])
def test_it_is_found_from_every_place(model: Path, chosen: str):
    found = TransformersFolder.find(model / chosen)
    assert found is not None
    assert found.folder == model / "text_encoder"
    assert found.tokenizer == model / "tokenizer"
    assert found.config["d_model"] == 8
    assert found.files() == (model / "text_encoder" / "model.safetensors",)


def test_shards_are_all_found(model: Path):
    names = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    write_encoder(model / "shards", names)
    for chosen in (model / "shards", model / "shards" / names[0]):
        found = TransformersFolder.find(chosen)
        assert found is not None
        assert [file.name for file in found.files()] == list(names)


def test_the_tokenizer_may_lie_inside(tmp_path: Path):
    write_encoder(tmp_path / "one")
    write_tokenizer(tmp_path / "one")
    write_encoder(tmp_path / "two")
    write_tokenizer(tmp_path / "two" / "tokenizer")
    for name, place in (("one", "one"), ("two", "two/tokenizer")):
        found = TransformersFolder.find(tmp_path / name)
        assert found is not None
        assert found.tokenizer == tmp_path / place


def test_other_files_are_no_such_layout(model: Path, tmp_path: Path):
    save_file({"a": torch.zeros(1)}, tmp_path / "umt5_xxl_fp16.safetensors")
    assert TransformersFolder.find(tmp_path / "umt5_xxl_fp16.safetensors") is None
    (model / "tokenizer" / "spiece.model").unlink()
    assert TransformersFolder.find(model) is None
    write_tokenizer(model / "tokenizer")
    (model / "text_encoder" / "config.json").write_text("[]")
    assert TransformersFolder.find(model) is None
