from __future__ import annotations

import json
import os
import pickle
import time
from pathlib import Path

import pytest
import torch
from model_files import T2V_1_3B, T2V_14B, VAE, entries, fp8_entries, shapes_of, write_header_only
from safetensors.torch import save_file

from trainers.checkpoint import Checkpoint
from trainers.errors import CheckpointError
from trainers.families.wan import FAMILY
from trainers.family import detect

SHAPES = shapes_of(T2V_14B)
FP16_BYTES = sum(2 * torch.Size(shape).numel() for shape in SHAPES.values())


def small_tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {f"layers.{index}.weight": torch.randn(64, 70, generator=generator) for index in range(8)}


def shards(tensors: dict[str, torch.Tensor], folder: Path, count: int = 3) -> list[Path]:
    paths = [folder / f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]
    for number, path in enumerate(paths):
        save_file(dict(list(tensors.items())[number::count]), path)
    return paths


# The forms of a real model, at full size


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_one_file(tmp_path: Path, dtype: torch.dtype) -> None:
    found = fp8_entries(SHAPES, dtype) if dtype.itemsize == 1 else entries(SHAPES, dtype)
    checkpoint = Checkpoint.open(write_header_only(tmp_path / "wan2.1_t2v_14B.safetensors", found))
    assert {name: stored.shape for name, stored in checkpoint.tensors.items()} == SHAPES
    assert checkpoint.tensors["blocks.3.ffn.0.weight"].dtype == dtype
    assert checkpoint.quantisation is None
    assert checkpoint.scale("blocks.3.ffn.0") is None
    assert detect(checkpoint).variant.id == "wan2.1-t2v-14b"


@pytest.mark.parametrize("spelling", ["scale_weight", "weight_scale"])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_fp8_scaled(tmp_path: Path, spelling: str, dtype: torch.dtype, prefix: str) -> None:
    found = fp8_entries(SHAPES, dtype, spelling)
    found |= {
        name.replace(spelling, spelling.replace("weight", "input")): entry for name, entry in found.items() if name.endswith(spelling)
    }
    found = {prefix + name: entry for name, entry in found.items()} | {prefix + "scaled_fp8": (dtype, (2,))}
    scale = torch.tensor(0.125).numpy().tobytes()
    data = {f"{prefix}blocks.3.ffn.0.{spelling}": scale}
    checkpoint = Checkpoint.open(write_header_only(tmp_path / "model.safetensors", found, data=data))
    assert checkpoint.tensors.keys() == SHAPES.keys()
    assert checkpoint.quantisation == "fp8_scaled"
    assert checkpoint.scale("blocks.3.ffn.0") == torch.tensor(0.125)
    assert checkpoint.scale("head.head") is None
    assert detect(checkpoint).variant.id == "wan2.1-t2v-14b"


@pytest.mark.parametrize("place", ["tensor", "header"])
def test_comfy_quant(tmp_path: Path, place: str) -> None:
    found = fp8_entries(SHAPES, torch.float8_e4m3fn, "weight_scale")
    modules = [name.removesuffix(".weight_scale") for name in found if name.endswith(".weight_scale")]
    entry = json.dumps({"format": "float8_e4m3fn"}).encode()
    metadata, data = None, {}
    if place == "header":
        metadata = {"_quantization_metadata": json.dumps({"layers": {module: json.loads(entry) for module in modules}})}
    else:
        found |= {f"{module}.comfy_quant": (torch.uint8, (len(entry),)) for module in modules}
        data = {f"{module}.comfy_quant": entry for module in modules}
    checkpoint = Checkpoint.open(write_header_only(tmp_path / "model.safetensors", found, metadata, data))
    assert checkpoint.tensors.keys() == SHAPES.keys()
    assert checkpoint.quantisation == "comfy_quant"
    assert checkpoint.scale(modules[0]) == torch.tensor(0.0)


@pytest.mark.parametrize("opened", ["index", "folder", "shard", "first shard without an index"])
def test_the_sharded_original(tmp_path: Path, opened: str) -> None:
    names = [f"diffusion_pytorch_model-{number:05}-of-00006.safetensors" for number in range(1, 7)]
    weight_map = {key: names[index % 6] for index, key in enumerate(SHAPES)}
    for name in names:
        shard = {key: shape for key, shape in SHAPES.items() if weight_map[key] == name}
        write_header_only(tmp_path / name, entries(shard, torch.float32))
    index = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
    if "without" not in opened:
        index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    path = {"index": index, "folder": tmp_path, "shard": tmp_path / names[3]}.get(opened, tmp_path / names[0])
    checkpoint = Checkpoint.open(path)
    assert checkpoint.nbytes == 2 * FP16_BYTES
    assert {name: stored.shape for name, stored in checkpoint.tensors.items()} == SHAPES
    assert detect(checkpoint).variant.id == "wan2.1-t2v-14b"


@pytest.mark.parametrize("opened", ["", "transformer", "transformer/diffusion_pytorch_model.safetensors"])
def test_a_diffusers_folder(tmp_path: Path, opened: str) -> None:
    shapes = {FAMILY.keys.to_diffusers(name)[0].name: shape for name, shape in shapes_of(T2V_1_3B).items()}
    (tmp_path / "transformer").mkdir()
    (tmp_path / "model_index.json").write_text("{}")
    (tmp_path / "transformer/config.json").write_text(json.dumps({"_class_name": "WanTransformer3DModel", "eps": 2e-6}))
    write_header_only(tmp_path / "transformer/diffusion_pytorch_model.safetensors", entries(shapes, torch.bfloat16))
    checkpoint = Checkpoint.open(tmp_path / opened)
    assert checkpoint.config == {"_class_name": "WanTransformer3DModel", "eps": 2e-6}
    detection = detect(checkpoint)
    assert (detection.variant.id, detection.config["eps"], detection.config["num_layers"]) == ("wan2.1-t2v-1.3b", 2e-6, 30)


@pytest.mark.parametrize(("component", "expected"), [("transformer", T2V_1_3B), ("vae", VAE)])
def test_one_component_of_a_file_with_all(tmp_path: Path, component: str, expected: str) -> None:
    found = entries(shapes_of(T2V_1_3B), torch.float16, "model.diffusion_model.") | entries(shapes_of(VAE), torch.float16, "vae.")
    found |= {"text_encoders.umt5xxl.shared.weight": (torch.float16, (8, 8))}
    checkpoint = Checkpoint.open(write_header_only(tmp_path / "all.safetensors", found), component)
    assert checkpoint.tensors.keys() == shapes_of(expected).keys()


# Tensors


def test_tensors_are_mapped_and_equal(tmp_path: Path) -> None:
    tensors = small_tensors()
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path / "model.safetensors")
    for name, tensor in tensors.items():
        assert torch.equal(checkpoint.tensor(name), tensor)
        assert checkpoint.tensor(name).data_ptr() == checkpoint.tensor(name).data_ptr()


@pytest.mark.parametrize("wrapper", [None, "module", "state_dict"])
def test_pickles_of_tensors(tmp_path: Path, wrapper: str | None) -> None:
    tensors = small_tensors()
    content = {name: torch.nn.Parameter(tensor) for name, tensor in tensors.items()}
    torch.save({wrapper: content, "epoch": 3} if wrapper else content, tmp_path / "model.pth")
    checkpoint = Checkpoint.open(tmp_path / "model.pth")
    assert checkpoint.tensors.keys() == tensors.keys()
    assert all(torch.equal(checkpoint.tensor(name), tensor) for name, tensor in tensors.items())


def test_tensors_of_a_header_that_is_not_padded_are_read(tmp_path: Path) -> None:
    header = json.dumps(
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "none": {"dtype": "F32", "shape": [0], "data_offsets": [8, 8]}}
    )
    header += " " * ((1 - len(header)) % 4)
    content = len(header).to_bytes(8, "little") + header.encode() + torch.tensor([1.0, 2.0]).numpy().tobytes()
    (tmp_path / "model.safetensors").write_bytes(content)
    checkpoint = Checkpoint.open(tmp_path / "model.safetensors")
    assert checkpoint.tensor("a").tolist() == [1.0, 2.0]
    assert checkpoint.tensor("none").shape == (0,)


def test_scales_of_rows_are_columns(tmp_path: Path) -> None:
    weight, scale = torch.ones(3, 4).to(torch.float8_e4m3fn), torch.tensor([1.0, 2.0, 3.0])
    save_file({"a.weight": weight, "a.scale_weight": scale}, tmp_path / "model.safetensors")
    assert Checkpoint.open(tmp_path / "model.safetensors").scale("a").tolist() == [[1.0], [2.0], [3.0]]


# Identity


def test_identity_is_of_the_content(tmp_path: Path) -> None:
    tensors = small_tensors()
    identity = _identity(tensors, tmp_path / "a.safetensors")
    os.utime(tmp_path / "a.safetensors", (0, 0))
    assert Checkpoint.open(tmp_path / "a.safetensors").identity() == identity
    parts = shards(tensors, tmp_path)
    assert Checkpoint.open(parts[0]).identity() == identity
    assert Checkpoint.open(parts[0]).files == tuple(parts)
    assert _identity({f"model.{name}": tensor for name, tensor in tensors.items()}, tmp_path / "b.safetensors") == identity
    torch.save({name: torch.nn.Parameter(tensor) for name, tensor in tensors.items()}, tmp_path / "c.pth")
    assert Checkpoint.open(tmp_path / "c.pth").identity() == identity


def test_identity_changes_with_a_value_a_name_a_shape_a_dtype_or_a_scale(tmp_path: Path) -> None:
    tensors = small_tensors() | {
        "small": torch.zeros(1024),
        "fp8.weight": torch.zeros(2, 2).to(torch.float8_e4m3fn),
        "fp8.scale_weight": torch.ones(()),
    }
    changed = [
        tensors,
        tensors | {"small": torch.eye(32).flatten()},
        tensors | {"small": torch.zeros(32, 32)},
        tensors | {"small": torch.zeros(1024, dtype=torch.int32)},
        tensors | {"fp8.scale_weight": torch.tensor(2.0)},
        {name.replace("small", "other"): tensor for name, tensor in tensors.items()},
        tensors | {"layers.3.weight": -tensors["layers.3.weight"]},
    ]
    assert len({_identity(content, tmp_path / f"{index}.safetensors") for index, content in enumerate(changed)}) == len(changed)


def _identity(tensors: dict[str, torch.Tensor], path: Path) -> str:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return Checkpoint.open(path).identity()


def test_identity_of_28_gb_takes_no_time(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(write_header_only(tmp_path / "model.safetensors", entries(SHAPES, torch.bfloat16)))
    start = time.process_time()
    checkpoint.identity()
    assert time.process_time() - start < 1.0


# What is refused, and what it says


def assert_refused(path: Path, *sentences: str) -> None:
    with pytest.raises(CheckpointError) as error:
        Checkpoint.open(path)
    for sentence in sentences:
        assert sentence in str(error.value)


def test_a_cut_file_says_both_sizes(tmp_path: Path) -> None:
    path = write_header_only(tmp_path / "model.safetensors", entries(SHAPES, torch.bfloat16))
    size = path.stat().st_size
    os.truncate(path, size - 1000)
    assert_refused(path, f"model.safetensors is {size - 1000:,} bytes", f"its header describes {size:,} bytes", "Download it again")
    os.truncate(path, size + 1)
    assert_refused(path, f"model.safetensors is {size + 1:,} bytes", "damaged")


@pytest.mark.parametrize("content", [b"", b"abc", b"version https://git-lfs.github.com/spec/v1\n", b"<!DOCTYPE html>" * 20])
def test_a_file_that_is_no_safetensors(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    assert_refused(tmp_path / "model.safetensors", f"is {len(content)} bytes", "Download it again")


@pytest.mark.parametrize(
    "header", [b"not json", b"[1, 2]  ", b'{"a": 3}', b'{"a":{"dtype":"F32"}}', b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,4]}}']
)
def test_a_header_that_is_no_table(tmp_path: Path, header: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    assert_refused(tmp_path / "model.safetensors", "model.safetensors has a header that is")


def test_an_unknown_dtype(tmp_path: Path) -> None:
    header = json.dumps({"a.weight": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"0")
    assert_refused(tmp_path / "model.safetensors", "a.weight is stored as F4", "Give the bf16, fp16 or fp8_scaled file")


def test_gguf(tmp_path: Path) -> None:
    (tmp_path / "wan-Q4.gguf").write_bytes(b"GGUF")
    (tmp_path / "renamed.safetensors").write_bytes(b"GGUF")
    for path in tmp_path.iterdir():
        assert_refused(path, "is a GGUF file", "Give the .safetensors file of the same model")


@pytest.mark.parametrize("quant_format", ["nvfp4", "int8_tensorwise"])
def test_other_quantisations(tmp_path: Path, quant_format: str) -> None:
    entry = torch.tensor(list(json.dumps({"format": quant_format}).encode()), dtype=torch.uint8)
    tensors = {"a.weight": torch.zeros(4, 2, dtype=torch.uint8), "a.weight_scale": torch.ones(()), "a.comfy_quant": entry}
    save_file(tensors, tmp_path / "model.safetensors")
    assert_refused(
        tmp_path / "model.safetensors", f"a: quantised as '{quant_format}'", "a.weight: stored as torch.uint8", "fp8_scaled file"
    )


def test_scales_of_blocks_and_of_nothing(tmp_path: Path) -> None:
    fp8 = torch.zeros(256, 256).to(torch.float8_e4m3fn)
    save_file({"a.weight": fp8, "a.weight_scale": torch.ones(2, 2), "b.weight_scale": torch.ones(())}, tmp_path / "model.safetensors")
    assert_refused(tmp_path / "model.safetensors", "the scale of a is [2, 2] for a weight of [256, 256]", "b: scaled but not in the file")


class Evil:
    def __reduce__(self) -> object:
        return os.mkdir, ("code_of_a_pickle_ran",)


def test_a_pickle_with_code_is_refused_and_does_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"a": torch.zeros(2), "b": Evil()}, "model.pth")
    assert_refused(
        Path("model.pth"), "model.pth holds code (posix.mkdir)" if os.name == "posix" else "holds code", "would run on this computer"
    )
    assert not Path("code_of_a_pickle_ran").exists()


def test_pickles_that_are_old_empty_or_cut(tmp_path: Path) -> None:
    (tmp_path / "old.pth").write_bytes(pickle.dumps({"a": 1}))
    assert_refused(tmp_path / "old.pth", "no zip archive", "Give the .safetensors")
    torch.save({"a": 1}, tmp_path / "none.pth")
    assert_refused(tmp_path / "none.pth", "none.pth holds no named tensors")
    torch.save(small_tensors(), tmp_path / "cut.pth")
    os.truncate(tmp_path / "cut.pth", 5000)
    assert_refused(tmp_path / "cut.pth", "cut.pth is 5,000 bytes", "must be complete")


def test_missing_files(tmp_path: Path) -> None:
    assert_refused(tmp_path / "none.safetensors", "does not exist", "Check the path")
    assert_refused(tmp_path, "holds no weights")
    paths = shards(small_tensors(), tmp_path)
    paths[1].unlink()
    assert_refused(paths[0], "2 of 3 files are there (missing: model-00002-of-00003.safetensors)", "Download the missing files")


def test_every_damaged_shard_is_named(tmp_path: Path) -> None:
    paths = shards(small_tensors(), tmp_path)
    for path in paths[1:]:
        os.truncate(path, path.stat().st_size - 4)
    assert_refused(paths[0], "2 problems", "model-00002-of-00003.safetensors is", "model-00003-of-00003.safetensors is")


def test_a_folder_of_several_models(tmp_path: Path) -> None:
    for name in ("a.safetensors", "b.safetensors"):
        save_file(small_tensors(), tmp_path / name)
    assert_refused(tmp_path, "holds 2 models (a.safetensors, b.safetensors)", "Give the path of one of them")


def test_another_suffix(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"0123456789")
    assert_refused(tmp_path / "model.onnx", "the suffix '.onnx'", ".safetensors, .pth")
