"""All checks in their order, and what runs them: each by itself, so that one that fails is a line and the others go on."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch

from ..measurements import Measurements
from ..offload.copies import on_device
from . import devices, file_checks, kernels, memory, models, packages, speeds, versions
from .lines import LIMIT_SECONDS, Bench, Check, Line, error_text
from .report import Report, Section

Tell = Callable[[str, Line], None]
NO_GPU = "no CUDA GPU"
_TOO_SLOW = "Give it more time: --seconds 180."

CHECKS: tuple[Check, ...] = (
    *versions.CHECKS,
    *devices.CHECKS,
    *memory.CHECKS,
    *speeds.CHECKS,
    *kernels.CHECKS,
    *file_checks.CHECKS,
    *packages.CHECKS,
    *models.CHECKS,
)


def run_checks(
    device: torch.device,
    runs_folder: Path,
    base: Path | None = None,
    tell: Tell | None = None,
    checks: Iterable[Check] = CHECKS,
    limit_seconds: float = LIMIT_SECONDS,
) -> Report:
    """Checks a device: what would begin after `limit_seconds` is left out. `tell` gets each line when it is found, with its group's title.

    Rates are kept beside the runs, where `plan` finds them, and so is the report. Nothing else is left behind.
    """
    bench = Bench(device, base, runs_folder, Measurements(runs_folder), limit_seconds)
    sections: dict[str, list[Line]] = {}
    with on_device(device), torch.inference_mode(False), torch.enable_grad():  # ComfyUI's nodes ask otherwise
        for check in checks:
            for line in _lines_of(check, bench):
                sections.setdefault(check.group, []).append(line)
                if tell:
                    tell(check.group, line)
            gc.collect()  # a model's cycles hold the device's memory
            if bench.on_gpu:
                torch.cuda.empty_cache()
    report = Report(tuple(Section(title, tuple(lines)) for title, lines in sections.items()), _names_to_hide(base, runs_folder))
    bench.kept.keep_report(report.values())
    return report


def _lines_of(check: Check, bench: Bench) -> Iterator[Line]:
    if check.gpu_only and not bench.on_gpu:
        yield Line(check.name, "skipped", NO_GPU)
        return
    if bench.seconds_left < check.needs_seconds:
        yield Line(check.name, "skipped", "no time was left", _TOO_SLOW)
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for line in check.run(bench):
                yield line
                if bench.seconds_left < 0:
                    yield Line(check.name, "skipped", "no time was left", _TOO_SLOW)
                    return
    except Exception as error:
        yield Line(check.name, "failed", error_text(error), "Please report it, with the block below.")


def _names_to_hide(base: Path | None, runs_folder: Path) -> tuple[str, ...]:
    paths = [runs_folder, runs_folder.absolute(), *([base, base.absolute()] if base else [])]
    return tuple({str(path) for path in paths} | ({base.name} if base else set()))
