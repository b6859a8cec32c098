"""What a file is, by its header alone: the answer of `inspect`."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from .checkpoint import Checkpoint, Component
from .errors import CheckpointError, LoraError, Problem
from .even_blocks import block_problem
from .family import Detection, families

Kind = Literal["transformer", "VAE", "text encoder", "image encoder", "LoRA", "unknown"]

_LORA_KEY = re.compile(
    r"[._]lora[._](A|B|up|down|mid)\b|\.lora_linear_layer\.|\.(lokr|hada|oft)_|\.(diff|diff_b|reshape_weight|set_weight|dora_scale)$"
)
# A key of each encoder that goes with a video model, in the spellings of transformers and of the original repositories.
_ENCODERS: Mapping[str, tuple[Kind, str]] = {
    "encoder.block.0.layer.0.SelfAttention.q.weight": ("text encoder", "T5 or UMT5"),
    "blocks.0.attn.q.weight": ("text encoder", "UMT5 in Wan's own layout"),
    "model.layers.0.self_attn.q_proj.weight": ("text encoder", "a language model (Llama and its like)"),
    "text_model.encoder.layers.0.self_attn.q_proj.weight": ("text encoder", "CLIP"),
    "vision_model.encoder.layers.0.self_attn.q_proj.weight": ("image encoder", "CLIP vision"),
}


@dataclass(frozen=True)
class Report:
    """What was found. `str()` of it is a table for people.

    `variants` are the ids of what a transformer may be, the likeliest first, `reason` what they were told by;
    `parameters_by_dtype` counts stored values; `problems` say why this file cannot be used here.
    """

    path: Path
    kind: Kind
    title: str
    family: str | None = None
    variants: tuple[str, ...] = ()
    reason: str = ""
    tensors: int = 0
    nbytes: int = 0
    parameters_by_dtype: Mapping[str, int] = field(default_factory=dict)
    quantisation: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()

    @property
    def parameters(self) -> int:
        return sum(self.parameters_by_dtype.values())

    def __str__(self) -> str:
        rows = [("what", f"{self.kind}: {self.title}" if self.title else self.kind)]
        rows += [("family", self.family or ""), ("variant", " or ".join(self.variants)), ("told by", self.reason)]
        rows += [("parameters", _in_billions(self.parameters)), ("size", f"{_size(self.nbytes)} in {self.tensors} tensors")]
        dtypes = [f"{name} {100 * count / self.parameters:.4g} %" for name, count in self.parameters_by_dtype.items()]
        rows += [("stored as", ", ".join(dtypes)), ("quantised", self.quantisation or "")]
        rows += [("config", ", ".join(f"{name} {value}" for name, value in self.config.items() if value is not None))]
        rows += [*(("note", note) for note in self.notes), *(("problem", problem) for problem in self.problems)]
        return "\n".join([self.path.name, *(_row(name, value) for name, value in rows if value)])


def _size(nbytes: int) -> str:
    return f"{nbytes / 2**30:.2f} GiB" if nbytes >= 2**30 else f"{nbytes / 2**20:.1f} MiB"


def inspect_file(path: Path | str) -> Report:
    """What a file, shard, or diffusers folder is; only headers are read.

    Raises CheckpointError when it is missing, damaged or of a form that is not read here.
    """
    path = Path(path).expanduser()
    component: Component = next((name for name in ("transformer", "vae", "text_encoder") if (path / name).is_dir()), "transformer")
    checkpoint = Checkpoint.open(path, component)
    if any(_LORA_KEY.search(name) for name in checkpoint.tensors):
        return _lora(checkpoint)
    return _transformer(checkpoint) or _vae(Checkpoint.open(path, "vae")) or _encoder(Checkpoint.open(path, "text_encoder"))


def _lora(checkpoint: Checkpoint) -> Report:
    from .lora_description import describe

    file = next(iter(checkpoint.tensors.values())).file  # of a folder with one LoRA, that one
    try:
        return _report(checkpoint, "LoRA", notes=str(describe(file)).split("\n"))
    except LoraError as error:
        return _report(checkpoint, "LoRA", problems=[str(error)])


def _transformer(checkpoint: Checkpoint) -> Report | None:
    for family in families().values():
        try:
            detection = family.detect(checkpoint)
        except CheckpointError as error:
            return _report(checkpoint, "transformer", family=family.id, problems=map(str, error.problems))
        if detection is not None:
            return _report(
                checkpoint,
                "transformer",
                detection.variant.title,
                family=family.id,
                variants=tuple(variant.id for variant in detection.variants),
                reason=detection.reason,
                config=detection.config,
                notes=_notes(detection),
                problems=[str(problem)] if (problem := block_problem(checkpoint)) else [],
            )
    return None


def _notes(detection: Detection) -> list[str]:
    notes = [*detection.notes, *([str(detection.doubt)] if detection.doubt else [])]
    if detection.expert:
        notes.append(f"it is the {detection.expert}-noise expert, by its name")
    if others := detection.variants[1:]:
        notes.append(f"its tensors are also those of {' and '.join(variant.title for variant in others)}; give the variant if it is one")
    return notes


def _vae(checkpoint: Checkpoint) -> Report | None:
    for family in families().values():
        try:
            found = family.detect_vae(checkpoint)
        except CheckpointError as error:
            return _report(checkpoint, "VAE", family=family.id, problems=map(str, error.problems))
        if found is not None:
            notes = () if found.encodes else ("it holds the decoder only: previews can be decoded, clips cannot be encoded",)
            return _report(checkpoint, "VAE", found.vae.title, family=family.id, config=found.config, notes=notes)
    return None


def _encoder(checkpoint: Checkpoint) -> Report:
    for key, (kind, title) in _ENCODERS.items():
        if any(name.endswith(key) for name in checkpoint.tensors):
            return _report(checkpoint, kind, title)
    seen = ", ".join(list(checkpoint.tensors)[:5])
    value = f"it begins with {seen}" if seen else "it holds no tensors"
    rule = f"known are transformers, VAEs and LoRAs of {', '.join(family.title for family in families().values())}, and their encoders"
    return _report(checkpoint, "unknown", value, problems=[str(Problem(value, rule, "Check that it is the file you mean."))])


def _report(
    checkpoint: Checkpoint,
    kind: Kind,
    title: str = "",
    notes: Iterable[str] = (),
    problems: Iterable[str] = (),
    **found: Any,
) -> Report:
    by_dtype: Counter[str] = Counter()
    for stored in checkpoint.tensors.values():
        by_dtype[str(stored.dtype).removeprefix("torch.")] += stored.numel
    return Report(
        checkpoint.path,
        kind,
        title,
        tensors=len(checkpoint.tensors),
        nbytes=checkpoint.nbytes,
        parameters_by_dtype=dict(by_dtype.most_common()),
        quantisation=checkpoint.quantisation,
        notes=tuple(notes),
        problems=tuple(problems),
        **found,
    )


def _in_billions(parameters: int) -> str:
    return f"{parameters / 1e9:.2f} billion" if parameters >= 1e7 else f"{parameters:,}"


def _row(name: str, value: str) -> str:
    return f"  {name:<11} {value}"
