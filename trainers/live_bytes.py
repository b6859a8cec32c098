"""What a computation takes: the storages that are alive at each moment, the matrix products, the bytes that are read and written.

Counted while the real code runs, on any device: on the meta device nothing is computed and nothing allocated.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

_aten: Any = torch.ops.aten


ROUNDED_TO_BYTES = 512
"""PyTorch's allocator for CUDA gives, and counts, multiples of this (`kMinBlockSize` in CUDACachingAllocator.h)."""


def allocated_bytes(tensor: torch.Tensor) -> int:
    """What the allocator counts for a tensor with memory of its own."""
    return rounded(tensor.numel() * tensor.itemsize)


def rounded(byte_count: int) -> int:
    return -(-byte_count // ROUNDED_TO_BYTES) * ROUNDED_TO_BYTES


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the storages made on devices of a type while it is entered, from their making until nothing refers to them.

    `live` and `peak` are bytes, each storage's rounded as the allocator does. What was there before does not count: name it in
    `known`. What an operator takes for itself and gives back before it returns is not seen. `flops` are those of matrix products
    (two for each multiply-add), `moved_bytes` what all other operators read and write.
    """

    def __init__(self, device_type: str, known: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = self.moved_bytes = 0
        self.flops = self.attention_flops = 0.0
        self._device_type = device_type
        self._sizes: dict[int, int] = {}
        self._watched: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        for tensor in known:
            self._enter(tensor.untyped_storage(), 0)

    def restart(self) -> None:
        """Counts from now on; what is alive now does not count any more."""
        for identity in self._sizes:
            self._sizes[identity] = 0
        self.live = self.peak = self.moved_bytes = 0
        self.flops = self.attention_flops = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = dict(kwargs or {})
        output = _on_meta[func](*args) if func in _on_meta and args[0].is_meta else _answers.of(func, args, kwargs)
        made = [tensor for tensor in _tensors(output) if tensor.device.type == self._device_type and self._sees(tensor)]
        if formula := flop_registry.get(func._overloadpacket):
            self.flops += formula(*args, **kwargs, out_val=output)
        elif made or func._schema.is_mutable:
            self.moved_bytes += sum(map(_bytes, made)) + sum(map(_bytes, _tensors((args, kwargs))))
        return output

    def _sees(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor's storage is new."""
        storage = tensor.untyped_storage()
        if storage._cdata in self._sizes:
            return False
        self._enter(storage, rounded(storage.nbytes()))
        return True

    def _enter(self, storage: torch.UntypedStorage, size: int) -> None:
        identity = storage._cdata
        if identity not in self._sizes:
            self._sizes[identity] = size
            self._watched[identity] = weakref.ref(storage, lambda _: self._leave(identity))
            self.live += size
            self.peak = max(self.peak, self.live)

    def _leave(self, identity: int) -> None:
        del self._watched[identity]
        self.live -= self._sizes.pop(identity, 0)


class _Answers:
    """What operators give on the meta device, found once for each form of their arguments.

    PyTorch finds it in Python for many of them (2 ms for a layer norm), and a model asks the same for every block. Kept are operators
    whose tensors are all new: views, and what is written into its arguments, are run each time.
    """

    def __init__(self) -> None:
        self._known: dict[Any, Any] = {}

    def of(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """`func(*args, **kwargs)`."""
        given = list(_tensors((args, kwargs)))
        if not given or not all(tensor.is_meta for tensor in given) or not _makes_only_new(func):
            return func(*args, **kwargs)
        form = (func, torch.get_default_dtype(), _form(args), _form(tuple(kwargs.items())))
        if form not in self._known:
            output = func(*args, **kwargs)
            if not _is_new(output, given):
                return output
            if len(self._known) == _MOST_ANSWERS:
                self._known.clear()
            self._known[form] = _form(output)
            return output
        return _made(self._known[form])


_MOST_ANSWERS = 10_000


@cache
def _makes_only_new(func: Any) -> bool:
    return all(value.alias_info is None for value in (*func._schema.arguments, *func._schema.returns))


def _is_new(output: Any, given: list[torch.Tensor]) -> bool:
    """Whether an output is meta tensors, none of which shares memory with what was given (not all operators say that they give views)."""
    made = [output] if isinstance(output, torch.Tensor) else output
    if not isinstance(made, tuple | list) or not all(isinstance(tensor, torch.Tensor) and tensor.is_meta for tensor in made):
        return False
    storages = [tensor.untyped_storage()._cdata for tensor in (*made, *given)]
    return len(set(storages[: len(made)])) == len(made) and not set(storages[: len(made)]) & set(storages[len(made) :])


def _form(value: Any) -> Any:
    """What can be told of a value apart from its memory, to be compared."""
    if isinstance(value, torch.Tensor):
        return _Layout(value.shape, value.stride(), value.dtype)
    return (type(value), *map(_form, value)) if isinstance(value, tuple | list) else (type(value), value)


def _made(form: Any) -> Any:
    """Tensors of that form, with memory of their own."""
    if isinstance(form, _Layout):
        return torch.empty_strided(form.shape, form.stride, dtype=form.dtype, device="meta")
    kind, *parts = form
    return kind(map(_made, parts))


class _Layout(NamedTuple):
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype


_answers = _Answers()


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _bytes(tensor: torch.Tensor) -> int:
    """What a tensor holds; one that was only expanded counts as often as it is stored."""
    return min(tensor.numel() * tensor.itemsize, tensor.untyped_storage().nbytes())


# Values that a computation asks for, and that no meta tensor has: every flag is set, and every element is not zero.
_on_meta: dict[Any, Callable[..., Any]] = {
    _aten._local_scalar_dense.default: lambda tensor: True if tensor.dtype == torch.bool else 1,
    _aten.nonzero.default: lambda tensor: torch.empty(tensor.numel(), max(tensor.ndim, 1), dtype=torch.int64, device="meta"),
}
