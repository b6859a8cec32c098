"""The verb check: whether training works on this machine."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from .runs import RUNS_FOLDER
from .verbs import add_verb

if TYPE_CHECKING:
    from ..selftest.lines import Line
    from .verbs import Verbs


def add_verbs(verbs: Verbs) -> None:
    """Add this module's verb to the parser."""
    parser = add_verb(verbs, "check", check, "try this machine for a minute: what works, how fast, and what to do about the rest")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (auto)")
    parser.add_argument("--base", type=Path, metavar="FILE", help="the model you train on: how fast it is read")
    parser.add_argument("--runs", type=Path, default=Path(RUNS_FOLDER), metavar="DIR", help=f"where the runs are ({RUNS_FOLDER})")
    parser.add_argument("--seconds", type=float, default=60.0, metavar="N", help="what would begin later than this is left out (60)")


def check(options: argparse.Namespace) -> int:
    """Print the table, line by line, then a block for a bug report. The exit code is 1 when a line failed."""
    from ..environment import allow_determinism, use_memory_without_gaps

    allow_determinism()
    use_memory_without_gaps()
    from ..device import find_device
    from ..measurements import FILE
    from ..selftest.checks import run_checks
    from ..selftest.report import as_text

    device, runs = find_device(options.device), options.runs.absolute()  # processes that `check` starts have other working folders
    runs.mkdir(parents=True, exist_ok=True)
    shown: list[str] = []

    def tell(title: str, line: Line) -> None:
        if title not in shown:
            shown.append(title)
            print(title, flush=True)
        print(as_text(line), flush=True)

    report = run_checks(device, runs, options.base, tell, limit_seconds=options.seconds)
    print(f"\n{report.summary()}. Rates and this table are in {options.runs / FILE}; `plan` uses them.")
    print(f"\nFor a bug report, without paths or names:\n\n{report.block()}")
    return int(report.failed)
