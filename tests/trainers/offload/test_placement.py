from __future__ import annotations

from itertools import pairwise

import pytest

from trainers.offload.placement import place


def test_without_a_limit_everything_stays():
    found = place([10] * 5, None)
    assert found.resident == frozenset(range(5))
    assert (found.streamed, found.slots, found.device_bytes) == ((), 0, 50)


def test_what_just_fits_stays():
    assert place([10] * 5, 50).streamed == ()
    assert place([10] * 5, 49).streamed != ()


@pytest.mark.parametrize("budget", range(20, 401, 7))
def test_the_budget_is_kept_and_used(budget):
    found = place([10] * 40, budget)
    assert found.device_bytes <= budget
    assert found.device_bytes > budget - 10, "one block more would fit"
    assert found.slots in (0, 2)
    assert sorted(found.resident | set(found.streamed)) == list(range(40))


def test_streamed_blocks_lie_evenly():
    found = place([10] * 40, 220)
    gaps = {after - before for before, after in pairwise(found.streamed)}
    assert len(found.streamed) == 20
    assert max(gaps) - min(gaps) <= 1


def test_slots_hold_the_largest_streamed_block():
    sizes = [30] * 4 + [10] * 8
    found = place(sizes, 120)
    assert found.slot_bytes == max(sizes[i] for i in found.streamed)
    assert found.device_bytes == sum(sizes[i] for i in found.resident) + 2 * found.slot_bytes <= 120


def test_one_slot_when_two_do_not_fit_and_the_smallest_when_nothing_does():
    assert (place([10] * 5, 15).slots, place([10] * 5, 15).device_bytes) == (1, 10)
    assert place([10] * 5, 3).device_bytes == 10


def test_as_many_blocks_as_slots_are_not_streamed():
    assert place([10] * 2, 19).slots == 1
    assert place([10], 3).streamed == ()
    assert place([], 5).device_bytes == 0


def test_what_a_way_copies():
    assert place([10] * 40, 0).copied_per_way == 39
    assert place([10] * 40, 20).copied_per_way == 38
