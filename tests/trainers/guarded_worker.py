"""The real worker, started by path, in a process that dies with exit code 99 when it opens a socket.

Python's audit events see every socket that Python code uses, whichever library it is in.
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
EXIT_CODE = 99


def forbid_network() -> None:
    """From now on, in this process and its forked children."""

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if event.startswith("socket.") and event != "socket.gethostname":
            print(f"NETWORK: {event} {arguments[1:]}", flush=True)
            os._exit(EXIT_CODE)

    sys.addaudithook(hook)


def run_worker() -> None:
    """As if Python had been given the path of the worker itself."""
    sys.path.insert(0, str(ROOT / "trainers"))
    runpy.run_path(str(ROOT / "trainers" / "worker.py"), run_name="__main__")


if __name__ == "__main__":
    forbid_network()
    run_worker()
