"""A step that takes much longer than others of its kind, five times in a row, is said once."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from trainers import pace
from trainers.pace import Pace

SMALL, LARGE = "small clips", "large clips"


def warnings(times: list[tuple[str, float]]) -> list[int]:
    """The indices of the times that gave a warning."""
    watched = Pace()
    return [index for index, (kind, seconds) in enumerate(times) if watched.add(kind, seconds)]


def steps(count: int, seconds: float, kind: str = SMALL) -> list[tuple[str, float]]:
    return [(kind, seconds)] * count


def test_the_fifth_slow_step_warns_once() -> None:
    """On Windows a full GPU spills into RAM: a run of a night became one of a fortnight, and nothing said so."""
    assert warnings(steps(20, 1.0) + steps(50, 30.0)) == [24]
    assert warnings(steps(20, 1.0) + steps(4, 30.0) + steps(1, 1.0) + steps(4, 30.0)) == []
    assert warnings(steps(20, 1.0) + steps(50, 2.9)) == []


def test_it_is_said_again_only_after_it_was_over() -> None:
    slow, usual = steps(10, 10.0), steps(5, 1.0)
    assert warnings(steps(20, 1.0) + slow + usual + slow) == [24, 39]
    assert warnings(steps(20, 1.0) + slow + usual[:2] + slow) == [24]


def test_kinds_have_their_own_usual_time() -> None:
    mixed = [time for _ in range(20) for time in (*steps(1, 1.0), *steps(1, 9.0, LARGE))]
    assert warnings(mixed + steps(20, 9.0, LARGE)) == []
    assert warnings(mixed + steps(5, 9.0)) == [44]


def test_first_steps_do_not_count() -> None:
    """Kernels are chosen and blocks compiled in them: they are slow, and would make what is usual too high."""
    assert warnings(steps(3, 100.0) + steps(5, 1.0) + steps(5, 4.0)) == [12]
    assert warnings(steps(20, 1.0) + steps(7, 50.0, LARGE)) == []


def test_a_kind_that_is_new_neither_counts_nor_breaks_a_row() -> None:
    slow = [time for _ in range(5) for time in (*steps(1, 10.0), *steps(1, 50.0, LARGE))]
    assert warnings(steps(20, 1.0) + slow) == [28]


@pytest.mark.parametrize(("platform", "named"), [("win32", True), ("linux", False)])
def test_the_cause_is_that_of_the_system(monkeypatch: pytest.MonkeyPatch, platform: str, named: bool) -> None:
    monkeypatch.setattr(pace, "sys", SimpleNamespace(platform=platform))
    watched = Pace()
    said = "".join(watched.add(SMALL, seconds) for _, seconds in steps(20, 1.0) + steps(5, 12.0))
    assert said.startswith("the last 5 steps took 12.0 times as long as usual. Another program may be using the GPU")
    assert ('"CUDA - Sysmem Fallback Policy" to "Prefer No Sysmem Fallback"' in said) == named
