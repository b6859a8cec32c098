"""One thread for each process, unless the environment says another number: two processes of two threads on two cores are ten
times slower.

With `-n 2` the tests of a real ComfyUI's server and page all run in one process, so that they share them; those that call
ComfyUI's code alone (`test_native_*`) run together, too, in whichever process is free. Any other file's tests run in one process,
so that what they share is made once; of the simulated GPU's `test_training`, which takes longest, all of a model.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import pytest

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):  # read when torch is imported, here and in the processes that tests start
    os.environ.setdefault(name, "1")


collect_ignore: list[str] = []
"""Tests on the simulated GPU need a process of their own: it must be there before torch is imported (`make test` starts it)."""
if "simulated_gpu.plugin" not in sys.modules:
    collect_ignore = ["simulated_gpu"]
elif os.environ.get("SIMULATED_DEVICES") != "2":
    collect_ignore = ["simulated_gpu/test_second_gpu.py"]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """The groups of xdist 3.8 (`--dist loadgroup`) have no effect from pytest 9.2 on, and nothing says so."""
    from xdist.scheduler import LoadScopeScheduling

    class FilesTogether(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            together = next((start for start in ("tests/host/test_native_", "tests/host/") if nodeid.startswith(start)), "")
            return together or nodeid.partition(": " if "/test_training.py" in nodeid else "::")[0]

    config.option.loadscopereorder = False  # files with many tests are not those that take long
    return FilesTogether(config, log)
