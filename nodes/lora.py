"""A trained LoRA in a native model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from comfy_api.latest import io

from ..trainers.errors import LoraError, Problem
from ..trainers.experts import lora_of
from ..trainers.lora_description import LoraDescription, describe, expert_of
from ..trainers.lora_format import native_tensors
from ..trainers.run import Run
from . import host, native_lora
from .records import RUN, RunFolder
from .schema import schema
from .train import newest_lora

NEWEST = ": newest"
"""What follows a run's name for the last LoRA file it has written so far."""


class ApplyLoRA(io.ComfyNode):
    """Patches a LoRA into a model as ComfyUI's own loader does, and says whether it fits."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        strength: dict[str, Any] = {"default": 1.0, "min": -20.0, "max": 20.0, "step": 0.05}
        return schema(
            "ApplyLoRA",
            "Apply LoRA",
            "Applies a LoRA to a model and says how many of its layers matched. A LoRA of another model is refused. "
            "`<run>: newest` is the last file of a run, also while it trains.",
            inputs=[
                io.Model.Input("model", tooltip="The model; of Wan 2.2 A14B the high-noise one."),
                io.Combo.Input(
                    "lora",
                    _choices(),
                    tooltip="A LoRA file, or the newest one of a run. Not looked at when `run` is connected.",
                ),
                io.Float.Input("strength", tooltip="How much of the LoRA is added. 1 is as it was trained.", **strength),
                io.Model.Input(
                    "model_low_noise",
                    optional=True,
                    tooltip="The low-noise model of Wan 2.2 A14B: gets the LoRA of its own, the file of the same name with low for high.",
                ),
                io.Float.Input("strength_low_noise", optional=True, tooltip="The strength for the low-noise model.", **strength),
                RUN.Input("run", optional=True, tooltip="Use the newest LoRA of this run."),
            ],
            outputs=[
                io.Model.Output("model", tooltip="The model with the LoRA."),
                io.Model.Output("model_low_noise", tooltip="The low-noise model with the LoRA, if one was given."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, lora: str, **others: Any) -> str:
        if lora == host.NONE:
            return ""
        path = _path(lora)
        return f"{path} {path.stat().st_mtime_ns}"

    @classmethod
    def execute(
        cls,
        model: Any,
        lora: str,
        strength: float,
        model_low_noise: Any = None,
        strength_low_noise: float = 1.0,
        run: RunFolder | None = None,
    ) -> io.NodeOutput:
        if run is None and lora == host.NONE:
            return io.NodeOutput(model, model_low_noise, ui={"text": ["no LoRA chosen: the model is unchanged"]})
        path = _path(lora) if run is None else newest_lora(Run.open(Path(run.folder)))
        high, low = _files(path, model_low_noise is not None)
        applied = [_applied(model, high, strength), _applied(model_low_noise, low, strength_low_noise)]
        return io.NodeOutput(*(patched for patched, _ in applied), ui={"text": ["\n".join(line for _, lines in applied for line in lines)]})


def _files(path: Path, both: bool) -> tuple[Path | None, Path | None]:
    """The LoRAs for a model and for its low-noise expert, when `both` are there: of a pair of files each its own.

    A file of one expert whose other one was not trained is for that expert only.
    """
    if not both:
        return path, None
    high, low = (lora_of(path, name) for name in ("high", "low"))
    if high != low:
        return high, low
    only = expert_of(path)
    return None if only == "low" else path, None if only == "high" else path


def _applied(model: Any, path: Path | None, strength: float) -> tuple[Any, list[str]]:
    """The model with the LoRA of a file, and what is said about it. Raises LoraError when it is not for this model."""
    if model is None or path is None:
        return model, [] if model is None else ["the other expert is unchanged: the LoRA was not trained for it"]
    fit = native_lora.fit(model, host.read_tensors(path))
    if not fit.matched and (native := _under_native_names(path)):
        fit = native_lora.fit(model, native)
    _check(fit, path)
    told = [f"{path.name}: {fit.matched} of {fit.total} layers matched, strength {strength:g}"]
    return native_lora.patched(model, fit, strength), told + [f"not used: {name}" for name in fit.unmatched[:5]]


def _choices() -> list[str]:
    runs = host.runs_folder()
    names = sorted(folder.name for folder in runs.iterdir() if (folder / "job.json").is_file()) if runs.is_dir() else []
    return [host.NONE, *(name + NEWEST for name in names), *host.lora_names()]


def _path(lora: str) -> Path:
    """The file of a choice. Raises RunError or ValueError when it is not there."""
    if lora.endswith(NEWEST):
        return newest_lora(Run.open(host.runs_folder() / lora.removesuffix(NEWEST)))
    return host.lora_path(lora)


def _under_native_names(path: Path) -> Mapping[str, Any]:
    """The tensors of a file whose own names ComfyUI does not read; empty for one that is read nowhere else either.

    Raises LoraError for a DoRA of peft, whose magnitudes are other numbers here.
    """
    found = _described(path)
    return native_tensors(path) if found and found.kind in ("LoRA", "DoRA") and not found.also else {}


def _check(fit: native_lora.Fit, path: Path) -> None:
    """Raises LoraError when the LoRA is not for this model."""
    if fit.matched and not fit.misfits:
        return
    found = _described(path)
    if fit.misfits:
        name, layer, lora = fit.misfits[0]
        value = f"{path.name} is for a model of another size: {name} is {layer} in the model, {lora} in the LoRA"
        remedy = f"Load the model of that size{f' ({found.variant})' if found and found.variant else ''}."
    else:
        value = f"none of the {fit.total} layers of {path.name} is in this model ({fit.model})"
        remedy = f"Load that model{f': {found.variant or found.family}' if found else ''}."
    raise LoraError(str(Problem(value, "a LoRA fits the model that it was trained on", remedy)))


def _described(path: Path) -> LoraDescription | None:
    """What the file says of itself; None for one that no family here knows."""
    try:
        return describe(path)
    except LoraError:
        return None


NODES = [ApplyLoRA]
