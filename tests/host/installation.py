"""A ComfyUI on this machine: found, checked, and used for Python code that needs its modules."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

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

    @cached_property
    def version(self) -> str:
        found = re.search(r'__version__ = "(.+)"', (self.root / "comfyui_version.py").read_text("utf-8"))
        return found[1] if found else "0"

    @property
    def environment(self) -> dict[str, str]:
        """For its processes: one thread, and device locks and temporary files in the temporary folder of the tests."""
        return os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONUTF8": "1", "TMPDIR": tempfile.gettempdir()}

    def call(self, file: str | Path, *flags: str, timeout_seconds: float = 300, **arguments: Any) -> Any:
        """What `main(**arguments)` in `file` returns, in a process like ComfyUI's own on the CPU (see `inside.py`).

        `file` lies beside this module or is an absolute path; `flags` are ComfyUI's; arguments and answer are JSON. A failure is an
        AssertionError with the output of the process.
        """
        with tempfile.TemporaryDirectory() as folder:
            answer = Path(folder) / "answer.json"
            request = {"root": str(self.root), "flags": ["--cpu", *flags], "file": str(_INSIDE.with_name(str(file)))}
            request |= {"arguments": arguments, "answer": str(answer)}
            done = subprocess.run(
                [self.python, "-u", _INSIDE, json.dumps(request)],
                cwd=self.root,
                env=self.environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                encoding="utf-8",
                errors="replace",
                timeout=timeout_seconds,
                check=False,
            )
            assert done.returncode == 0, f"{Path(file).name} under ComfyUI's Python ended with {done.returncode}:\n{done.stdout}"
            return json.loads(answer.read_text("utf-8"))


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
