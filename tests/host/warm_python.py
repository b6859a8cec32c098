"""A Python of ComfyUI's that has imported it once, and answers each question in a fork of itself: imports take most of the time."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class WarmPython:
    """A process of `inside.py`, for POSIX. Each request runs in a new process that nothing of the others has touched."""

    def __init__(self, python: Path, inside: Path, root: Path, flags: list[str], environment: Mapping[str, str]) -> None:
        command = [python, "-u", inside, json.dumps({"root": str(root), "flags": flags})]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        self._process = subprocess.Popen(command, cwd=root, env=dict(environment), start_new_session=True, **pipes)

    def ask(self, request: Mapping[str, Any], output: Path, timeout_seconds: float) -> int:
        """Run a request; its output goes to a file. Returns the exit code of its process; too late is -SIGKILL."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({**request, "output": str(output)}).encode() + b"\n")
        self._process.stdin.flush()
        said = b""
        while not said.startswith(b"ended "):  # what ComfyUI prints while it is imported comes first
            if not select.select([self._process.stdout], [], [], timeout_seconds)[0]:
                self.end()
                return -signal.SIGKILL
            said = self._process.stdout.readline()
            assert said, f"{self._process.args} ended by itself"
        return int(said.split()[1])

    def end(self) -> None:
        """End the process, and the one that it may be waiting for."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.communicate()
