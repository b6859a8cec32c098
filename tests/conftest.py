"""With `-n 2` the tests with a real ComfyUI all run in one of the processes, so that they share one server."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """The groups of xdist 3.8 (`--dist loadgroup`) have no effect from pytest 9.2 on, and nothing says so."""
    from xdist.scheduler import LoadScopeScheduling

    class HostTestsTogether(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "tests/host" if nodeid.startswith("tests/host/") else nodeid

    return HostTestsTogether(config, log)
