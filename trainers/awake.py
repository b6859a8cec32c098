"""Keeps the machine awake while a run trains."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

_CONTINUOUS, _SYSTEM_REQUIRED = 0x80000000, 0x00000001  # ES_CONTINUOUS, ES_SYSTEM_REQUIRED of the Windows API


@contextmanager
def awake() -> Iterator[None]:
    """Windows takes a machine that nobody touches for idle and puts it to sleep, whatever its GPU does. The screen may turn off.

    Elsewhere nothing is done. It holds for the calling thread, and ends with its process.
    """
    if sys.platform != "win32":
        yield
        return
    import ctypes

    set_state = ctypes.windll.kernel32.SetThreadExecutionState
    set_state(ctypes.c_uint(_CONTINUOUS | _SYSTEM_REQUIRED))
    try:
        yield
    finally:
        set_state(ctypes.c_uint(_CONTINUOUS))
