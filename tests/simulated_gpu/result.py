"""For `pytest -p simulated_gpu.result --result FILE`: what ran, how it ended and how long it took, as a dated file."""

from __future__ import annotations

import json
import subprocess
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

_started = time.time()
_ends: Counter[str] = Counter()
_by_file: dict[str, Counter[str]] = {}
_seconds: Counter[str] = Counter()
_slowest: dict[str, float] = {}
_outcomes: Counter[str] = Counter()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--result", type=Path, help="write counts and durations to this file")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Of every process, where there are more."""
    _seconds[_file(report)] += report.duration
    if report.when != "call" and report.passed:
        return
    _ends[report.outcome] += 1
    _by_file.setdefault(_file(report), Counter())[report.outcome] += 1
    _slowest[report.nodeid] = report.duration
    _outcomes.update(str(value) for name, value in report.user_properties if name == "outcome")


def _file(report: pytest.TestReport) -> str:
    return Path(report.nodeid.partition("::")[0]).name


def pytest_sessionfinish(session: pytest.Session) -> None:
    path: Path | None = session.config.getoption("--result")
    if path is None or hasattr(session.config, "workerinput"):
        return
    slowest = sorted(_slowest, key=lambda name: -_slowest[name])[:10]
    values: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d", time.gmtime(_started)),
        "commit": _git("rev-parse", "--short", "HEAD") + ("" if not _git("status", "--porcelain") else " with changes"),
        "torch": version("torch"),
        "minutes": round((time.time() - _started) / 60, 1),
        "tests": dict(_ends),
        "by_file": {name: dict(found) | {"seconds": round(_seconds[name])} for name, found in sorted(_by_file.items())},
        "out_of_memory": dict(sorted(_outcomes.items())),
        "slowest_seconds": {name.partition("::")[2]: round(_slowest[name], 1) for name in slowest},
    }
    path.write_text(json.dumps(values, indent=1) + "\n")


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], check=False, capture_output=True, text=True, cwd=Path(__file__).parent)
    return done.stdout.strip()
