"""Files that hold tensors: a safetensors file or a PyTorch pickle, its table of contents first, its tensors mapped.

Opening a file reads its header only. A tensor is mapped from the file when it is asked for, without a copy. The mapping
is read-only, so that a file may be larger than the memory (the writable private mapping of `safetensors.safe_open` and
`torch.load` counts against it): writing to such a tensor ends the process.

The safetensors layout is eight bytes with the length N of the header (little-endian), N bytes of JSON, then the data:
https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, Protocol

import torch

from .errors import CheckpointError, Problem
from .offload.mapped_file import MappedFile

PICKLE_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt")
SUFFIXES = (".safetensors", *PICKLE_SUFFIXES)

_MAX_HEADER_BYTES = 100_000_000
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_OTHER_FILE = "Give the .safetensors file of the same model."


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: `key` of `file`, with the dtype and shape it is stored in."""

    file: Path
    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


class TensorFile(Protocol):
    """One opened file: what it says about itself, what it holds, and how to map one tensor of it."""

    metadata: Mapping[str, str]
    tensors: Mapping[str, StoredTensor]

    def load(self, key: str) -> torch.Tensor: ...

    def read(self, key: str, starts: Sequence[int], length: int) -> list[bytes]:
        """`length` bytes of a tensor from each start, read without touching (and reading ahead of) the mapping."""


def open_tensor_file(path: Path) -> TensorFile:
    """Open one file by its suffix. Raises CheckpointError when it is damaged, of an unknown kind, or holds code."""
    if not path.is_file():
        raise _error(f"{path} does not exist", "a model file is needed", "Check the path.")
    if path.suffix == ".gguf" or _starts_with(path, b"GGUF"):
        raise _error(
            f"{path.name} is a GGUF file",
            "training reads bf16, fp16 or fp8 weights",
            "Give the .safetensors file of the same model (fp8_e4m3fn or fp8_scaled is the smallest).",
        )
    if path.suffix == ".safetensors":
        return SafetensorsFile(path)
    if path.suffix in PICKLE_SUFFIXES:
        return PickleFile(path)
    raise _error(f"{path.name} has the suffix {path.suffix!r}", f"model files end in {', '.join(SUFFIXES)}", _OTHER_FILE)


class SafetensorsFile:
    """A .safetensors file. Its size is compared with what its header describes, so a broken download is found here."""

    def __init__(self, path: Path) -> None:
        self._path = path
        header, data_start = _read_header(path)
        self.metadata: Mapping[str, str] = header.pop("__metadata__", {})
        try:
            self.tensors: Mapping[str, StoredTensor] = {key: self._stored(key, entry) for key, entry in header.items()}
            spans = {key: (int(entry["data_offsets"][0]), int(entry["data_offsets"][1])) for key, entry in header.items()}
        except (KeyError, TypeError, IndexError, ValueError):
            raise self._no_table() from None
        if any(start < 0 or stop - start != self.tensors[key].nbytes for key, (start, stop) in spans.items()):
            raise self._no_table()
        _check_size(path, data_start + max((stop for _, stop in spans.values()), default=0))
        self._offsets = {key: data_start + start for key, (start, _) in spans.items()}

    def load(self, key: str) -> torch.Tensor:
        stored, offset = self.tensors[key], self._offsets[key]
        if not stored.numel:
            return torch.empty(stored.shape, dtype=stored.dtype)
        raw = self._mapped.tensor(offset, stored.nbytes)
        aligned = raw if offset % stored.dtype.itemsize == 0 else raw.clone()
        return aligned.view(stored.dtype).view(stored.shape)

    def read(self, key: str, starts: Sequence[int], length: int) -> list[bytes]:
        found = []
        with self._path.open("rb", buffering=0) as file:
            for start in starts:
                file.seek(self._offsets[key] + start)
                found.append(file.read(length))
        return found

    @cached_property
    def _mapped(self) -> MappedFile:
        return MappedFile(self._path)

    def _no_table(self) -> CheckpointError:
        return _error(f"{self._path.name} has a header that is no table of tensors", "a safetensors file needs one", _OTHER_FILE)

    def _stored(self, key: str, entry: Mapping[str, Any]) -> StoredTensor:
        name = entry["dtype"]
        if name not in _DTYPES:
            raise _error(
                f"{self._path.name}: {key} is stored as {name}",
                "training reads bf16, fp16, fp32 and fp8 (e4m3fn, e5m2) weights",
                "Give the bf16, fp16 or fp8_scaled file of the same model.",
            )
        return StoredTensor(self._path, key, _DTYPES[name], tuple(int(side) for side in entry["shape"]))


class PickleFile:
    """A .pth, .pt, .bin or .ckpt file, only ever unpickled as plain tensors and mapped from the disk."""

    metadata: Mapping[str, str] = {}

    def __init__(self, path: Path) -> None:
        self._tensors = _unpickled_tensors(path)
        self.tensors: Mapping[str, StoredTensor] = {
            key: StoredTensor(path, key, tensor.dtype, tuple(tensor.shape)) for key, tensor in self._tensors.items()
        }

    def load(self, key: str) -> torch.Tensor:
        return self._tensors[key]

    def read(self, key: str, starts: Sequence[int], length: int) -> list[bytes]:
        raw = self._tensors[key].reshape(-1).view(torch.uint8)
        return [raw[start : start + length].numpy().tobytes() for start in starts]


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The JSON header of a safetensors file and where its data begins, in bytes."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(size - 8, _MAX_HEADER_BYTES):
            raise _error(
                f"{path.name} is {size:,} bytes and begins with {start[:8]!r}",
                "a safetensors file begins with the length of its header",
                "Download it again: it is cut short, a pointer of git-lfs, or another kind of file.",
            )
        raw = file.read(length)
    try:
        header = json.loads(raw)
    except ValueError:
        header = None
    if not isinstance(header, dict):
        raise _error(f"{path.name} has a header that is not JSON", "a safetensors file needs one", "Download it again.")
    return header, 8 + length


def _check_size(path: Path, expected_bytes: int) -> None:
    actual_bytes = path.stat().st_size
    if actual_bytes == expected_bytes:
        return
    raise _error(
        f"{path.name} is {actual_bytes:,} bytes",
        f"its header describes {expected_bytes:,} bytes",
        "Download it again: it is cut short." if actual_bytes < expected_bytes else "Download it again: it is damaged.",
    )


def _unpickled_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a pickle: those of the dictionary itself, or of the one it is wrapped in."""
    import pickle
    import zipfile

    if not zipfile.is_zipfile(path):
        raise _error(
            f"{path.name} is {path.stat().st_size:,} bytes and no zip archive",
            "a PyTorch file must be complete and of the zip format (PyTorch 1.6 or later) to be mapped",
            _OTHER_FILE,
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        code = re.search(r"GLOBAL (\S+)", str(error))
        raise _error(
            f"{path.name} holds code ({code.group(1)})" if code else f"{path.name} holds more than tensors",
            "a model file may hold nothing but tensors, because code in it would run on this computer",
            _OTHER_FILE,
        ) from None
    except RuntimeError as error:
        raise _error(
            f"{path.name} cannot be read ({error})", "it must be a complete PyTorch file that fits into memory", _OTHER_FILE
        ) from None
    tensors = _tensors_of(content)
    if not tensors:
        raise _error(f"{path.name} holds no named tensors", "a model file is a dictionary of tensors", _OTHER_FILE)
    return tensors


def _tensors_of(content: Any) -> dict[str, torch.Tensor]:
    if not isinstance(content, dict):
        return {}
    for wrapper in ("module", "state_dict", "model"):
        if isinstance(content.get(wrapper), dict):
            return _tensors_of(content[wrapper])
    return {key: value.detach() for key, value in content.items() if isinstance(key, str) and isinstance(value, torch.Tensor)}


def _starts_with(path: Path, magic: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(magic)) == magic


def _error(value: str, rule: str, remedy: str) -> CheckpointError:
    return CheckpointError(Problem(value, rule, remedy))
