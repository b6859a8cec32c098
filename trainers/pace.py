"""Notices when steps become slow. On Windows a full GPU does not run out of memory: it spills into RAM.

With the driver's default, what does not fit the GPU any more goes to shared memory, and steps take many times as long, without
an error. Only the time of a step shows it.
"""

from __future__ import annotations

import sys
from collections import defaultdict, deque
from collections.abc import Hashable
from statistics import median

_FACTOR = 3.0
_IN_A_ROW = 5
_WARM_UP_STEPS = 3
"""Of each kind: kernels are loaded and chosen in them, blocks compiled."""
_KNOWN_STEPS = 5
"""Of a kind, before its median counts."""
_REMEMBERED_STEPS = 200


class Pace:
    """The usual seconds of each kind of step: of one expert, clips of one size, weights kept in one way."""

    def __init__(self) -> None:
        self._usual: dict[Hashable, deque[float]] = defaultdict(lambda: deque(maxlen=_REMEMBERED_STEPS))
        self._warm_up: dict[Hashable, int] = defaultdict(lambda: _WARM_UP_STEPS)
        self._slow: list[float] = []
        self._quick = 0
        self._said = False

    def add(self, kind: Hashable, seconds: float) -> str:
        """Takes the time of a step that nothing else delayed. Returns a warning when it is the fifth slow one; else "".

        Slow steps do not change what is usual. The warning comes again only after five usual steps.
        """
        if self._warm_up[kind]:
            self._warm_up[kind] -= 1
            return ""
        usual = self._usual[kind]
        if len(usual) < _KNOWN_STEPS:
            if not self._slow:
                usual.append(seconds)
            return ""
        if seconds <= _FACTOR * median(usual):
            usual.append(seconds)
            self._slow, self._quick = [], self._quick + 1
            self._said = self._said and self._quick < _IN_A_ROW
            return ""
        self._slow, self._quick = [*self._slow, seconds / median(usual)], 0
        if self._said or len(self._slow) < _IN_A_ROW:
            return ""
        self._said = True
        return f"the last {_IN_A_ROW} steps took {median(self._slow):.1f} times as long as usual. {_likely_cause()}"


def _likely_cause() -> str:
    other = "Another program may be using the GPU: close it, or pause the training while it runs."
    if sys.platform != "win32":
        return other
    return (
        f"{other} If the GPU's memory is full, Windows moves part of it to RAM: to get an out of memory message instead, which the "
        'training recovers from, set "CUDA - Sysmem Fallback Policy" to "Prefer No Sysmem Fallback" in the NVIDIA Control Panel.'
    )
