"""Every pair of values of several parameters in a few cases; the other combinations are marked slow."""

from __future__ import annotations

from collections.abc import Collection
from itertools import combinations, product
from typing import Any

import pytest


def pairwise(names: str, *axes: Collection[Any]) -> pytest.MarkDecorator:
    """`parametrize` over the product of `axes`, of which `make test` runs only as many as have every pair of values."""
    rows = list(product(*(range(len(axis)) for axis in axes)))
    chosen = _cover(rows)
    values = [list(axis) for axis in axes]
    return pytest.mark.parametrize(
        names,
        [
            pytest.param(*(axis[index] for axis, index in zip(values, row, strict=True)), marks=[] if row in chosen else [pytest.mark.slow])
            for row in rows
        ],
    )


def _cover(rows: list[tuple[int, ...]]) -> set[tuple[int, ...]]:
    """Rows that have every pair which any row has: again and again the row that has most of those still missing."""
    chosen, missing = set(), {pair for row in rows for pair in _pairs(row)}
    while missing:
        best = max(rows, key=lambda row: len(missing & _pairs(row)))
        chosen.add(best)
        missing -= _pairs(best)
    return chosen


def _pairs(row: tuple[int, ...]) -> set[tuple[tuple[int, int], ...]]:
    return set(combinations(enumerate(row), 2))
