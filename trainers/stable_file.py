"""Safetensors files that are the same bytes for the same content.

The safetensors library stores a file's metadata in the order of a hash map, which differs from process to process.
Here the header is sorted, so equal tensors and metadata are an equal file, on any machine. Every safetensors reader
reads it. The format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch

from .whole_files import written_beside

_DTYPE_NAMES = {
    torch.float64: "F64",
    torch.int64: "I64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_HEADER_ALIGNMENT_BYTES = 8


def save_file(
    tensors: Mapping[str, torch.Tensor], path: Path, metadata: Mapping[str, str] | None = None, *, overwrite: bool = False
) -> None:
    """Write `tensors` (on any device, of any strides) and `metadata` to `path`, whole or not at all.

    The file is written beside `path` and renamed. Unless `overwrite` is true, a file of that name is never replaced: one
    of the same bytes stays as it is. Raises FileExistsError for other bytes, and OSError when the folder cannot be written.
    """
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    with written_beside(path, overwrite=overwrite) as partial, open(partial, "wb") as file:
        file.write(_header(ordered, metadata or {}))
        for _, tensor in ordered:
            file.write(_bytes(tensor))


def _header(ordered: list[tuple[str, torch.Tensor]], metadata: Mapping[str, str]) -> bytes:
    """The length, then the JSON of names, shapes and offsets. Wide elements lie first, so that all are aligned."""
    entries: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    start = 0
    for name, tensor in ordered:
        stop = start + tensor.numel() * tensor.element_size()
        entries[name] = {"dtype": _DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _HEADER_ALIGNMENT_BYTES)
    return len(text).to_bytes(8, "little") + text


def _bytes(tensor: torch.Tensor) -> memoryview:
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data
