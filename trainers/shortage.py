"""What was given up when the GPU was full, and when it is tried again: another program may have needed the memory for a moment only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

How = TypeVar("How")

GOOD_STEPS = 100
"""Steps without running out of memory after which what was given up is tried again."""


class Shortages(Generic[How]):
    """Each shortage is followed by one attempt to go back. When that fails, or the attempt held for as many steps, it is over."""

    def __init__(self) -> None:
        self._before: How | None = None
        self._less: How | None = None
        self._step = 0
        self._on_trial = False

    @property
    def step(self) -> int:
        """The step at which memory ran out last, or at which going back was tried."""
        return self._step

    @property
    def will_go_back(self) -> bool:
        """Whether what was given up is still to be tried again."""
        return self._before is not None and not self._on_trial

    def less(self, now: How, tighter: Callable[[How], How | None], step: int) -> How | None:
        """What to use at `step` after the GPU was full with `now`; None: there is nothing less.

        On trial it is what worked before the trial, for good: `tighter` is not asked.
        """
        if self._on_trial:
            self._before, self._on_trial = None, False
            return self._less
        found = tighter(now)
        if found is not None:
            self._before = now if self._before is None else self._before
            self._step = step
        return found

    def again(self, now: How, step: int) -> How | None:
        """What to try again at `step`, in place of `now`; None: nothing."""
        if self._before is None or step - self._step < GOOD_STEPS:
            return None
        if self._on_trial:
            self._before, self._on_trial = None, False  # it held
            return None
        self._less, self._on_trial, self._step = now, True, step
        return self._before
