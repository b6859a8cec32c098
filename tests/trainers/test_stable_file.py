from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from trainers.stable_file import save_file

METADATA = {f"key {i}": f"wert ä {i}" for i in range(20)}


def _tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(3, 5, generator=generator)
    return {
        "odd": torch.tensor([1, 2, 3], dtype=torch.uint8),
        "scalar": torch.tensor(2.5),
        "transposed": values.T,
        "half": values.half(),
        "brain": values.bfloat16(),
        "eighth": values.to(torch.float8_e4m3fn),
        "double": values.double(),
        "none": torch.empty(0, 4),
        "flag": torch.tensor([True, False]),
        "whole": torch.arange(7),
    }


def test_the_library_reads_what_was_written(tmp_path: Path) -> None:
    save_file(_tensors(), tmp_path / "a.safetensors", METADATA)
    read = load_file(tmp_path / "a.safetensors")
    assert {name: (value.dtype, value.shape) for name, value in read.items()} == {
        name: (value.dtype, value.shape) for name, value in _tensors().items()
    }
    for name, value in _tensors().items():
        assert torch.equal(read[name].view(torch.uint8), value.contiguous().view(torch.uint8)) if value.dim() else read[name] == value
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == METADATA


def test_every_tensor_is_aligned_to_its_elements(tmp_path: Path) -> None:
    save_file(_tensors(), tmp_path / "a.safetensors")
    content = (tmp_path / "a.safetensors").read_bytes()
    assert int.from_bytes(content[:8], "little") % 8 == 0
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert all(entry["data_offsets"][0] % _tensors()[name].element_size() == 0 for name, entry in header.items())


def test_the_order_of_the_content_does_not_matter(tmp_path: Path) -> None:
    save_file(_tensors(), tmp_path / "a", METADATA)
    save_file(dict(reversed(_tensors().items())), tmp_path / "b", dict(reversed(METADATA.items())))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_another_file_of_that_name_stays(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.zeros(2)}, path)
    before, file_before = path.read_bytes(), path.stat()
    save_file({"a": torch.zeros(2)}, path)
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (file_before.st_ino, file_before.st_mtime_ns)
    with pytest.raises(FileExistsError, match=r"a\.safetensors"):
        save_file({"a": torch.ones(2)}, path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.safetensors"]
    save_file({"a": torch.ones(2)}, path, overwrite=True)
    assert torch.equal(load_file(path)["a"], torch.ones(2))


def test_a_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(KeyError):
        save_file({"a": torch.zeros(2, dtype=torch.complex64)}, tmp_path / "a.safetensors")
    assert list(tmp_path.iterdir()) == []
