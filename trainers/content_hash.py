"""A hash of what an object holds: plain values, containers and tensors, however they are nested.

It is the same in every process and on every device, and takes milliseconds for models of any size, because large tensors
are sampled. What has no content of its own (a function, a class) counts by its name.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Set
from typing import Any

import torch

from .checkpoint import sampled

_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype)


def content_hash(value: Any) -> str:
    """A hash of `value`.

    Tensors up to 16 KiB count whole; of a larger one, four pages of 4 KiB spread over it, so that a change of fewer bytes
    may be missed. Devices and memory layouts do not count. An object counts by its class and attributes; one that holds
    itself counts once.
    """
    digest = hashlib.sha256()
    for part in _parts(value, ()):
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


def _parts(value: Any, holders: tuple[int, ...]) -> Iterator[bytes]:
    """The bytes that stand for a value; `holders` are the ids of the objects it lies in."""
    if isinstance(value, _PLAIN):
        yield f"{type(value).__name__} {value!r}".encode()
    elif isinstance(value, torch.device):
        yield b"device"
    elif id(value) in holders:
        yield b"held by itself"
    elif isinstance(value, torch.Tensor):
        yield from _tensor_parts(value, holders)
    else:
        yield from _object_parts(value, (*holders, id(value)))


def _object_parts(value: Any, holders: tuple[int, ...]) -> Iterator[bytes]:
    kind = value if callable(value) and hasattr(value, "__qualname__") else type(value)
    yield f"{kind.__module__}.{kind.__qualname__}".encode()
    if isinstance(value, Mapping):
        yield from _mapping_parts(value, holders)
    elif isinstance(value, Set):
        yield from sorted(content_hash(item).encode() for item in value)
    elif isinstance(value, (list, tuple)):
        yield str(len(value)).encode()
        for item in value:
            yield from _parts(item, holders)
    elif kind is type(value):
        yield from _mapping_parts(getattr(value, "__dict__", {}), holders)


def _mapping_parts(values: Mapping[Any, Any], holders: tuple[int, ...]) -> Iterator[bytes]:
    yield str(len(values)).encode()
    named = {key if isinstance(key, str) else content_hash(key): item for key, item in values.items()}
    for name, item in sorted(named.items()):
        yield name.encode()
        yield from _parts(item, holders)


def _tensor_parts(tensor: torch.Tensor, holders: tuple[int, ...]) -> Iterator[bytes]:
    yield f"{tensor.dtype} {tuple(tensor.shape)}".encode()
    if hasattr(tensor, "__tensor_flatten__"):  # a quantised tensor: its parts are tensors themselves
        names, context = tensor.__tensor_flatten__()
        yield from _parts({name: getattr(tensor, name) for name in names}, holders)
        yield from _parts(context, holders)
    elif not tensor.is_meta:
        yield from _samples(tensor)


def _samples(tensor: torch.Tensor) -> Iterator[bytes]:
    """Bytes of the tensor as it lies in memory, also of a subclass that shows other shapes than it stores."""
    with torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
        flat = tensor.detach().as_subclass(torch.Tensor).reshape(-1)
        starts, length = sampled(flat.numel() * flat.element_size())
        for start in starts:
            first = start // flat.element_size()
            page = flat[first : first + length // flat.element_size()]
            yield page.cpu().contiguous().view(torch.uint8).numpy().tobytes()
