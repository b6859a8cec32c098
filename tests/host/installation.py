"""A ComfyUI on this machine: found, checked, and used for Python code that needs its modules."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from warm_python import WarmPython

PACK = Path(__file__).parents[2]
LOWEST_VERSION = (0, 8, 0)
NEEDED = [
    "torch",
    "aiohttp",
    "comfyui_frontend_package",
    "transformers",
    "diffusers",
    "peft",
    "accelerate",
    "safetensors",
    "av",
    "cv2",
    "einops",
    "pydantic",
]
"""What ComfyUI and the pack import."""

_INSIDE = Path(__file__).with_name("inside.py")


class NoComfyUI(Exception):
    """Says in one line why the tests with a ComfyUI cannot run."""


@dataclass(frozen=True)
class ComfyUI:
    """A ComfyUI folder and the Python that starts it."""

    root: Path
    python: Path
    _warm: dict[tuple[str, ...], WarmPython] = field(default_factory=dict, compare=False, repr=False)

    @cached_property
    def version(self) -> str:
        found = re.search(r'__version__ = "(.+)"', (self.root / "comfyui_version.py").read_text("utf-8"))
        return found[1] if found else "0"

    @property
    def environment(self) -> dict[str, str]:
        """For its processes: as many threads as here (tests/conftest.py), and device locks and files in the tests' temporary folder."""
        return os.environ | {"PYTHONUTF8": "1", "TMPDIR": tempfile.gettempdir()}

    def call(self, file: str | Path, *flags: str, timeout_seconds: float = 300, **arguments: Any) -> Any:
        """What `main(**arguments)` in `file` returns, in a process like ComfyUI's own on the CPU (see `inside.py`).

        `file` lies beside this module or is an absolute path; `flags` are ComfyUI's; arguments and answer are JSON. A failure is an
        AssertionError with the output of the process.
        """
        with tempfile.TemporaryDirectory() as folder:
            answer, output = Path(folder) / "answer.json", Path(folder) / "output"
            request = {"file": str(_INSIDE.parent / file), "arguments": arguments, "answer": str(answer)}
            code = self._run(["--cpu", *flags], request, output, timeout_seconds)
            said = output.read_text("utf-8", "replace") if output.exists() else ""
            assert code == 0, f"{Path(file).name} under ComfyUI's Python ended with {code}:\n{said}"
            return json.loads(answer.read_text("utf-8"))

    def end(self) -> None:
        """End the processes that wait for more questions."""
        while self._warm:
            self._warm.popitem()[1].end()

    def _run(self, flags: list[str], request: Mapping[str, Any], output: Path, timeout_seconds: float) -> int:
        if not hasattr(os, "fork"):
            whole = json.dumps({"root": str(self.root), "flags": flags, **request})
            with output.open("wb") as file:
                streams: dict[str, Any] = {"stdout": file, "stderr": subprocess.STDOUT, "timeout": timeout_seconds}
                done = subprocess.run([self.python, "-u", _INSIDE, whole], cwd=self.root, env=self.environment, check=False, **streams)
            return done.returncode
        kind = (*flags, tempfile.gettempdir())
        if kind not in self._warm:
            self._warm[kind] = WarmPython(self.python, _INSIDE, self.root, flags, self.environment)
        return self._warm[kind].ask(request, output, timeout_seconds)


def find_comfyui() -> ComfyUI:
    """The ComfyUI that COMFYUI_PATH names, else the one around this pack, else the one in a usual place.

    Raises NoComfyUI when there is none that can be used.
    """
    root = _find_root()
    comfyui = ComfyUI(root, _find_python(root))
    if tuple(int(part) for part in comfyui.version.split(".")[:3]) < LOWEST_VERSION:
        raise NoComfyUI(f"{root} is ComfyUI {comfyui.version}; 0.8.0 or newer is needed")
    if missing := _missing(comfyui.python):
        raise NoComfyUI(f"{comfyui.python} lacks {', '.join(missing)}")
    return comfyui


def _find_root() -> Path:
    if named := os.environ.get("COMFYUI_PATH"):
        if not (Path(named) / "main.py").is_file():
            raise NoComfyUI(f"COMFYUI_PATH is {named}, which has no main.py")
        return Path(named).absolute()
    around = [PACK.parents[1]] if PACK.parent.name == "custom_nodes" else []
    for root in (*around, Path.home() / "ComfyUI", Path.home() / "comfy" / "ComfyUI"):
        if (root / "main.py").is_file():
            return root
    raise NoComfyUI("there is no ComfyUI: set COMFYUI_PATH")


def _find_python(root: Path) -> Path:
    if named := os.environ.get("COMFYUI_PYTHON"):
        if not Path(named).is_file():
            raise NoComfyUI(f"COMFYUI_PYTHON is {named}, which is not there")
        return Path(named).absolute()
    name = Path("Scripts", "python.exe") if sys.platform == "win32" else Path("bin", "python")
    portable = root.parent / "python_embeded" / "python.exe"
    for python in (root / ".venv" / name, root / "venv" / name, portable):
        if python.is_file():
            return python
    raise NoComfyUI(f"{root} has no .venv: set COMFYUI_PYTHON")


def _missing(python: Path) -> list[str]:
    code = f"import importlib.util; print(*(name for name in {sorted(NEEDED)} if importlib.util.find_spec(name) is None))"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        raise NoComfyUI(f"{python} does not start")
    return done.stdout.split()
