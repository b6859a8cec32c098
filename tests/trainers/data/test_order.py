"""The order of clips: every epoch whole, one bucket a batch, the same for any number of cards."""

import time
from collections import Counter

from trainers.data.order import Order

BUCKETS = ["a", "a", "a", "b", "b"]
REPEATS = [1, 2, 1, 1, 3]


def order(**changes):
    return Order(**({"buckets": BUCKETS, "repeats": REPEATS, "batch_size": 2, "micro_per_step": 1, "seed": 5} | changes))


def test_an_epoch_shows_every_clip_as_often_as_it_repeats():
    run = order()
    steps = run.steps(epochs=1)
    assert steps == 4
    seen = Counter(clip for step in range(1, steps + 1) for micro in run.step(step) for clip in micro.clips)
    assert seen == dict(enumerate(REPEATS))


def test_a_batch_is_of_one_bucket():
    run = order()
    for step in range(1, 20):
        for micro in run.step(step):
            assert len({BUCKETS[clip] for clip in micro.clips}) == 1


def test_a_step_is_a_function_of_its_number():
    forward = {step: order().step(step) for step in range(1, 30)}
    shared = order()
    assert {step: shared.step(step) for step in reversed(range(1, 30))} == forward
    assert any(order(seed=6).step(step) != forward[step] for step in range(1, 30))


def test_epochs_are_shuffled_anew():
    run = order(batch_size=1)
    first, second = ([run.step(step)[0].clips[0] for step in range(1 + 8 * e, 9 + 8 * e)] for e in range(2))
    assert sorted(first) == sorted(second)
    assert first != second


def test_accumulation_and_processes_show_the_same_samples():
    one = order(micro_per_step=4)
    single = order(micro_per_step=1)
    for step in range(1, 6):
        micros = [single.step(4 * (step - 1) + i + 1)[0].clips for i in range(4)]
        assert [micro.clips for micro in one.step(step)] == micros
        assert one.step(step)[0].first == 0
        assert len({micro.first for micro in one.step(step)}) == 4


def test_ten_thousand_clips_start_at_once():
    started = time.process_time()
    run = Order(["x"] * 10_000, [1] * 10_000, 2, 1, 0)
    run.step(1)
    run.step(4_999)
    assert time.process_time() - started < 0.5
