"""How a family's tensors are named, cut and ordered: native file <-> diffusers class, in one table for both ways.

A row's pattern stands for a module or a parameter and matches at dots: "blocks.{}.attn1.to_q" matches
"blocks.3.attn1.to_q.weight", and "{}" stands for one block index. In a native pattern "{last}" stands for the index of the
last block only, where a name means another module there. The longest matching pattern wins. The same table fills a model
from a native file, names LoRA modules, and writes a native file back.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Generic, TypeVar

import torch

from .errors import KeyTableError, Problem


@dataclass(frozen=True)
class Rename:
    """The same tensor under another name."""

    diffusers: str
    native: str


def same(*names: str) -> tuple[Rename, ...]:
    """Tensors that have one name in both."""
    return tuple(Rename(name, name) for name in names)


@dataclass(frozen=True)
class Fuse:
    """Several diffusers tensors stacked along dimension 0 of one native tensor, `sizes` giving their proportions."""

    diffusers: tuple[str, ...]
    native: str
    sizes: tuple[int, ...] = ()


@dataclass(frozen=True)
class SwapHalves:
    """The same tensor with the two halves of dimension 0 exchanged."""

    diffusers: str
    native: str


@dataclass(frozen=True)
class Pointwise:
    """A Linear that the native file stores as a convolution of size 1 in three dimensions; the bias is the same in both."""

    diffusers: str
    native: str


Row = Rename | Fuse | SwapHalves | Pointwise
LAST = "{last}"
_INDEX = r"\d+"
T = TypeVar("T")


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in its counterpart: rows `start/total .. stop/total` of `name`, halves swapped or not.

    `pointwise`: the native weight has three more dimensions, of size 1.
    """

    name: str
    start: int = 0
    stop: int = 1
    total: int = 1
    swap: bool = False
    pointwise: bool = False

    @property
    def whole(self) -> bool:
        return self.stop - self.start == self.total

    def rows(self, length: int) -> slice:
        """The rows of a native dimension 0 of `length`."""
        assert length % self.total == 0, f"{self.name}: {length} rows are not {self.total} equal parts"
        unit = length // self.total
        return slice(self.start * unit, self.stop * unit)

    def cut(self, native: torch.Tensor) -> torch.Tensor:
        """This piece of the native tensor: a view, unless the halves are swapped."""
        piece = native if self.whole else native[self.rows(native.shape[0])]
        if self.pointwise and piece.ndim > 1:
            return piece.flatten(1)
        return torch.cat(piece.chunk(2)[::-1]) if self.swap else piece

    def uncut(self, piece: torch.Tensor) -> torch.Tensor:
        """The piece as the native tensor holds it."""
        if self.pointwise and piece.ndim > 1:
            return piece[..., None, None, None]
        return torch.cat(piece.chunk(2)[::-1]) if self.swap else piece

    def shape(self, native: tuple[int, ...]) -> tuple[int, ...]:
        """The piece's shape in a native tensor of shape `native`; of one that cannot be cut: its own."""
        if self.pointwise and native[2:] == (1, 1, 1):
            return native[:2]
        if self.whole or not native or native[0] % self.total:
            return native
        rows = self.rows(native[0])
        return (rows.stop - rows.start, *native[1:])


@dataclass(frozen=True)
class KeyTable:
    """The rows of one module (a transformer or a VAE).

    `ignored` are native patterns that carry no weights of the model (e.g. stored rope tables). `last` is the "{last}" of a
    name that is asked for by itself; in a file it is the highest index that is there.
    """

    rows: tuple[Row, ...]
    ignored: tuple[str, ...] = ()
    last: int = 0

    def to_native(self, name: str) -> Place:
        """Where the diffusers tensor or module `name` lies. Raises KeyTableError when no row matches."""
        return self._native_names[name]

    def to_diffusers(self, name: str) -> tuple[Place, ...]:
        """The diffusers tensors (in stacking order) that the native tensor or module `name` holds."""
        return self._diffusers_names[name]

    def is_ignored(self, native_name: str) -> bool:
        return any(re.fullmatch(_regex(pattern), native_name) for pattern in self.ignored)

    def map_file(self, native_names: Iterable[str]) -> dict[str, Place]:
        """{diffusers name: its place in the file} for every native name; an unmatched name raises KeyTableError."""
        native_names = list(native_names)
        last = self._last_of(native_names)
        if last != self.last:
            return replace(self, last=last).map_file(native_names)
        found: dict[str, Place] = {}
        unknown: list[str] = []
        for native in native_names:
            if self.is_ignored(native):
                continue
            try:
                members = self.to_diffusers(native)
            except KeyTableError:
                unknown.append(native)
                continue
            found.update({member.name: replace(member, name=native) for member in members})
        if unknown:
            raise _unmatched(unknown)
        return found

    @cached_property
    def _native_names(self) -> _Index[Place]:
        return _Index([(_members(row)[i][0], _to_native(row, i)) for row in self.rows for i in range(len(_members(row)))])

    @cached_property
    def _diffusers_names(self) -> _Index[tuple[Place, ...]]:
        return _Index([(row.native.replace(LAST, f"{{{self.last}}}"), _to_diffusers(row)) for row in self.rows])

    def _last_of(self, native_names: list[str]) -> int:
        """The highest index of the blocks whose last one has names of its own; `last` where there is none."""
        starts = {row.native.partition(LAST)[0] for row in self.rows if LAST in row.native}
        indices = (re.match(r"\d+", name.removeprefix(start)) for start in starts for name in native_names if name.startswith(start))
        return max((int(index[0]) for index in indices if index), default=self.last)


def _members(row: Row) -> list[tuple[str, int, int, int]]:
    """(diffusers pattern, start, stop, total) of each member of a row."""
    if not isinstance(row, Fuse):
        return [(row.diffusers, 0, 1, 1)]
    sizes = row.sizes or (1,) * len(row.diffusers)
    total, start, members = sum(sizes), 0, []
    for name, size in zip(row.diffusers, sizes, strict=True):
        members.append((name, start, start + size, total))
        start += size
    return members


def _to_native(row: Row, member: int) -> Callable[[str, str], Place]:
    _, start, stop, total = _members(row)[member]
    kind = isinstance(row, SwapHalves), isinstance(row, Pointwise)
    native = row.native.replace(LAST, "{}")
    return lambda index, rest: Place(native.replace("{}", index) + rest, start, stop, total, *kind)


def _to_diffusers(row: Row) -> Callable[[str, str], tuple[Place, ...]]:
    kind = isinstance(row, SwapHalves), isinstance(row, Pointwise)
    return lambda index, rest: tuple(
        Place(name.replace("{}", index) + rest, start, stop, total, *kind) for name, start, stop, total in _members(row)
    )


class _Index(Generic[T]):
    """Patterns, longest first, each with what makes the answer from the block index and the rest of the name."""

    def __init__(self, entries: list[tuple[str, Callable[[str, str], T]]]) -> None:
        self._entries = [(re.compile(_regex(pattern)), make) for pattern, make in sorted(entries, key=lambda e: -len(e[0]))]
        self._known: dict[str, T] = {}

    def __getitem__(self, name: str) -> T:
        if name not in self._known:
            self._known[name] = self._find(name)
        return self._known[name]

    def _find(self, name: str) -> T:
        for pattern, make in self._entries:
            if match := pattern.match(name):
                return make(match.group(1) if pattern.groups else "", name[match.end() :])
        raise _unmatched([name])


def _regex(pattern: str) -> str:
    return re.sub(r"\\{(\d*)\\}", lambda index: f"({index[1] or _INDEX})", re.escape(pattern)) + r"(?=\.|$)"


def _unmatched(names: list[str]) -> KeyTableError:
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return KeyTableError(
        Problem(f"no place for {shown}", "every key of a model file must be known", "Check that the file is the model it is named after")
    )
