"""For `pytest -p simulated_gpu.plugin`: inserts the GPU before any test imports torch. Every test must leave no race.

Without a compiler one test is skipped, and says so for all; where CI is set, that is an error.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from . import gpu
from .build import CannotBuildError

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):  # as in tests/conftest.py, which comes too late: the GPU imports torch
    os.environ.setdefault(name, "1")

_reason = ""
try:
    gpu.insert()
except CannotBuildError as error:
    _reason = str(error)


def pytest_configure() -> None:
    if _reason and os.environ.get("CI"):
        raise pytest.UsageError(_reason)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if _reason and items:
        items[0].add_marker(pytest.mark.skip(reason=f"{len(items)} tests not run: {_reason}"))
        config.hook.pytest_deselected(items=items[1:])
        del items[1:]


@pytest.fixture(autouse=True)
def no_race(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fails a test that left an unordered access. Rates are stated: measuring them takes a CPU seconds."""
    from trainers import rates
    from trainers.offload.layout import Flat

    for name, rate in (("flops_rate", 1e13), ("memory_rate", 1e11), ("copy_rate", 1e10)):
        monkeypatch.setattr(rates, name, lambda *_, rate=rate: rate)
    write = Flat.write

    def seen_write(layout: Flat, run: object, *how: bool) -> None:  # the host writes by itself: only here can it be seen
        gpu.module.host_access(run, True, "Flat.write")
        write(layout, run, *how)  # type: ignore[arg-type]

    monkeypatch.setattr(Flat, "write", seen_write)
    gpu.reset()
    yield
    assert not (races := gpu.report().races), "\n".join(dict.fromkeys(races))
