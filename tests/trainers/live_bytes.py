"""Counts the bytes of the tensors that operations make and that live at the same time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """While it is on: `peak`, the most bytes alive at once of storages made since; `largest`, those of the largest of them."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self.largest = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    @property
    def now(self) -> int:
        self._alive = {key: (made, nbytes) for key, (made, nbytes) in self._alive.items() if not made.expired()}
        return sum(nbytes for _, nbytes in self._alive.values())

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = {storage.data_ptr() for storage in _storages((args, kwargs))}
        made = func(*args, **(kwargs or {}))
        for storage in _storages(made):
            if storage.data_ptr() not in given and storage.nbytes():
                self._alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
                self.largest = max(self.largest, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return made


def _storages(values: object) -> Iterator[torch.UntypedStorage]:
    return (leaf.untyped_storage() for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor) and not leaf.is_meta)
