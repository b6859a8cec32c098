"""Everything a resumed run needs to be the run that was never interrupted: trained tensors, optimizer, loss scale, step."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from .adapter import Adapter, LoraPair
from .errors import Problem, ProblemsError, RunError
from .stable_file import save_file

FORMAT = 1


@dataclass(frozen=True)
class Position:
    """Where a run stands: `step` optimizer steps are done, over the data set `encoded_identity`.

    `skipped_steps`: how many of the last steps a loss scaler skipped in a row. A run that must end for it ends in the same step
    whether it was interrupted or not. Checkpoints of older versions do not say it.
    """

    step: int
    encoded_identity: str
    micro_per_step: int
    skipped_steps: int = 0


@dataclass(frozen=True)
class Learnt:
    """What one expert has learnt: its tensors, and the state of its optimizer."""

    tensors: Mapping[str, torch.Tensor]
    optimizer: dict[str, Any]


def save_state(folder: Path, position: Position, file: str, learnt: Mapping[str, Learnt], scaler: dict[str, Any] | None) -> None:
    """Writes a checkpoint's files into an empty folder: for each expert by name its tensors, in `file`, and `optimizer`.

    Raises OSError when the disk does not take them.
    """
    for expert, one in learnt.items():
        save_file(one.tensors, folder / f"{_named(file, expert)}.safetensors", {})
        _save({"optimizer": one.optimizer, "scaler": scaler}, folder / f"{_named('optimizer', expert)}.pt")
    (folder / "position.json").write_text(json.dumps({"format": FORMAT, **asdict(position)}, indent=2), "utf-8")


def _save(content: object, path: Path) -> None:
    try:
        torch.save(content, path)
    except RuntimeError as error:
        if "inline_container" not in str(error):
            raise
        free = shutil.disk_usage(path.parent).free / 2**20  # all that torch says is "unexpected pos 640 vs 534"
        raise OSError(f"{path.name} could not be written, its disk has {free:,.0f} MiB free") from error


def read_position(folder: Path) -> Position:
    """Where the run of a checkpoint stood. Raises RunError when another version wrote it."""
    values = json.loads((folder / "position.json").read_text("utf-8"))
    if (found := values.pop("format", None)) != FORMAT:
        raise RunError(f"{folder} has format {found}; this version reads {FORMAT}. Start a new run with start.initial_lora.")
    return Position(**values)


def read_tensors(folder: Path, file: str, expert: str = "") -> dict[str, torch.Tensor]:
    """The trained tensors of an expert in a checkpoint, from `file`, on the CPU."""
    tensors: dict[str, torch.Tensor] = load_file(folder / f"{_named(file, expert)}.safetensors")
    return tensors


def adapter_tensors(adapter: Adapter) -> dict[str, torch.Tensor]:
    """An adapter as a checkpoint holds it."""
    parts = (
        (f"{name}.{part}", tensor)
        for name, pair in adapter.modules.items()
        for part, tensor in (("A", pair.down_RI), ("B", pair.up_OR), ("magnitude", pair.magnitude))
    )
    return {key: tensor for key, tensor in parts if tensor is not None}


def adapter_of(tensors: Mapping[str, torch.Tensor], alpha: float) -> Adapter:
    """The adapter that `adapter_tensors` made these of."""
    names = sorted(name.removesuffix(".A") for name in tensors if name.endswith(".A"))
    return Adapter(
        {name: LoraPair(tensors[f"{name}.A"], tensors[f"{name}.B"], alpha, tensors.get(f"{name}.magnitude")) for name in names}, {}
    )


def read_optimizer(folder: Path, expert: str = "") -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The states of an expert's optimizer and of the loss scaler."""
    stored = torch.load(folder / f"{_named('optimizer', expert)}.pt", map_location="cpu", weights_only=True)
    return stored["optimizer"], stored["scaler"]


def _named(file: str, expert: str) -> str:
    return f"{file}-{expert}" if expert else file


def check_position(position: Position, encoded_identity: str, micro_per_step: int) -> None:
    """Raises ProblemsError when going on from `position` would not be the same run."""
    problems = []
    if position.encoded_identity != encoded_identity:
        problems.append(
            Problem(
                f"the data set is {encoded_identity[:12]}, the run began with {position.encoded_identity[:12]}",
                "a run goes on over the same clips and captions",
                "Encode the old data set again, or start a new run with start.initial_lora.",
            )
        )
    if position.micro_per_step != micro_per_step:
        problems.append(
            Problem(
                f"accumulation is {micro_per_step}, it was {position.micro_per_step}",
                "a step must show the same samples as before",
                f"Set accumulation to {position.micro_per_step}.",
            )
        )
    if problems:
        raise ProblemsError(problems, subject="The run cannot go on")
