"""Models of two experts (Wan 2.2 A14B): which noise levels each learns, and whose turn a step is.

The high-noise expert works at and above the variant's boundary, the low-noise expert below. Each has a LoRA and an optimizer
of its own. They take turns of `experts.turn_steps` steps, because only one of them fits on a card. Every other model is one
expert without a name.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .family import Variant
from .job import Job


@dataclass(frozen=True)
class Expert:
    """One transformer of a model: its file, the noise levels it is trained at, and whether this job trains it."""

    name: str
    path: str
    lowest_sigma: float = 0.0
    highest_sigma: float = 1.0
    trained: bool = True

    def named(self, text: str) -> str:
        """`text`, and the expert's name if it has one."""
        return f"{text}-{self.name}" if self.name else text


def experts_of(job: Job, variant: Variant) -> tuple[Expert, ...]:
    """The experts whose files the job names, high noise first.

    With one file, `base.transformer` is the expert that `experts.train` names. Ranges overlap at the boundary, since
    samplers switch at a step, which lies a little beside it.
    """
    if variant.boundary is None:
        return (Expert("", job.base.transformer),)
    spec, boundary = job.experts, variant.boundary
    ranges = {"high": (max(boundary - spec.overlap, 0.0), 1.0), "low": (0.0, min(boundary + spec.overlap, 1.0))}
    both = {"high": job.base.transformer, "low": job.base.transformer_low_noise}
    paths = both if job.base.transformer_low_noise else {spec.train: job.base.transformer}
    return tuple(Expert(name, path, *ranges[name], spec.train in ("both", name)) for name, path in paths.items() if path)


@dataclass(frozen=True)
class Turn:
    """Whose step it is: `index` among the experts that are trained; `step` of its own `total_steps` is this one (from 1)."""

    index: int
    step: int
    total_steps: int


def turn_of(step: int, total_steps: int, turn_steps: int, experts: int) -> Turn:
    """Whose turn step `step` (from 1) of a run is, when `experts` take turns of `turn_steps`, the first one first."""
    index = (step - 1) // turn_steps % experts
    return Turn(index, _own_steps(step, turn_steps, experts, index), _own_steps(total_steps, turn_steps, experts, index))


def _own_steps(step: int, turn_steps: int, experts: int, index: int) -> int:
    """How many of the first `step` steps are those of expert `index`."""
    rounds, rest = divmod(step, turn_steps * experts)
    return rounds * turn_steps + min(max(rest - index * turn_steps, 0), turn_steps)


def expert_at(experts: Sequence[Expert], sigma: float, boundary: float | None) -> Expert:
    """The expert that a sampler asks at a noise level; where a job has one file only, that one."""
    if boundary is None or len(experts) == 1:
        return experts[0]
    return experts[0] if sigma >= boundary else experts[1]


_WORD = re.compile(r"(?<![a-z])(high|low)(?![a-z])", re.IGNORECASE)


def lora_of(path: Path, expert: str) -> Path:
    """The file of `expert` among the two LoRAs that `path` is one of.

    Their names differ in one word, high or low. `path` itself when there is no such pair.
    """
    found = _WORD.findall(path.name)
    if not expert or len(found) != 1 or found[0].lower() == expert:
        return path
    other = path.with_name(_WORD.sub(lambda match: _as_written(expert, match[0]), path.name))
    return other if other.is_file() else path


def _as_written(word: str, example: str) -> str:
    if example.isupper():
        return word.upper()
    return word.capitalize() if example[0].isupper() else word
