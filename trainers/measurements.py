"""check.json beside the runs: what was measured of devices, drives and this computer, so that it is measured once.

Each entry is kept under a key that changes with the hardware, the driver and PyTorch: what another machine left there is not
found. The file holds nothing else, and may be deleted.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import torch

from .lock import held_by_another
from .whole_files import written_beside

FILE = "check.json"
_VERSION = 1


class Measurements:
    """The kept measurements of a runs folder; None: nothing is kept."""

    def __init__(self, runs_folder: Path | None) -> None:
        self._path = None if runs_folder is None else runs_folder / FILE

    def rates(self, kind: str, key: str) -> dict[str, float]:
        """The numbers that are kept of a thing; what is damaged or makes no sense is left out."""
        entry = self._read().get(kind)
        found = entry.get(key) if isinstance(entry, dict) else None
        if not isinstance(found, dict):
            return {}
        return {name: float(value) for name, value in found.items() if isinstance(value, (int, float)) and 0 < value < 1e18}

    def keep(self, kind: str, key: str, values: Mapping[str, float], device: torch.device | None = None) -> None:
        """Adds numbers to those of a thing; what cannot be written is not kept.

        Nothing is kept of a GPU that another run is training on: it would seem slow for good.
        """
        if device is not None and held_by_another(str(device)):
            return
        content = self._read()
        entries = content.get(kind)
        content[kind] = entries = entries if isinstance(entries, dict) else {}
        entry = entries.get(key)
        entries[key] = (entry if isinstance(entry, dict) else {}) | dict(values)
        self._write(content)

    def keep_report(self, report: Mapping[str, Any]) -> None:
        """The last table of `check`, for other programs."""
        self._write(self._read() | {"report": dict(report), "time": time.time()})

    def _read(self) -> dict[str, Any]:
        try:
            content = json.loads(self._path.read_text("utf-8")) if self._path else {}
        except (OSError, ValueError):
            return {"version": _VERSION}
        known = isinstance(content, dict) and content.get("version") == _VERSION
        return content if known else {"version": _VERSION}

    def _write(self, content: Mapping[str, Any]) -> None:
        """Into a folder that is there already: to plan a job makes none."""
        if self._path is None or not self._path.parent.is_dir():
            return
        with suppress(OSError), written_beside(self._path) as partial:
            partial.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", "utf-8")


def device_key(device: torch.device) -> str:
    """Changes with the GPU, its driver and PyTorch, and for the CPU with its threads."""
    if device.type != "cuda":
        return f"{device.type}, {host_key()}, {torch.get_num_threads()} threads, PyTorch {torch.__version__}"
    properties = torch.cuda.get_device_properties(device)
    name = str(getattr(properties, "uuid", properties.name))
    driver = getattr(torch._C, "_cuda_getDriverVersion", lambda: 0)()
    return f"{name}, {properties.total_memory} bytes, driver {driver}, PyTorch {torch.__version__}"


def host_key() -> str:
    """Changes with the processor's cores and the memory."""
    return f"{os.cpu_count()} cores, {psutil.virtual_memory().total} bytes"


def drive_key(file: Path) -> str:
    """Changes with the drive that a file lies on."""
    return f"{file.stat().st_dev}, {shutil.disk_usage(file.parent).total} bytes"
