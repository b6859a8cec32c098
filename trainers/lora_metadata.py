"""What a LoRA file says about itself, for programs that manage LoRAs and for people.

Nothing here depends on when, where or by whom it was trained, so equal training is an equal file. The `modelspec.*` fields
follow https://github.com/Stability-AI/ModelSpec, the `ss_*` fields are those of kohya's trainers that LoRA managers read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .family import Family, Variant
from .lora_format import check_shapes, read_header, unfold_record
from .lora_keys import Form, family_of_lora, parse

_OURS = "video_trainer."
_BLOCK = re.compile(r"(?P<block>\w+\.\d+)\.(?P<part>.+)")


@dataclass(frozen=True)
class LoraDescription:
    """What `inspect` says of a LoRA file. `parts` are the names of adapted modules within a block."""

    family: str
    form: Form
    ranks: tuple[int, ...]
    alphas: tuple[float, ...]
    modules: int
    blocks: int
    parts: tuple[str, ...]
    trigger_words: tuple[str, ...]
    base: str | None
    variant: str | None
    step: int | None

    def __str__(self) -> str:
        lines = [
            f"LoRA for {self.family}, {self.form} form",
            f"rank {_either(self.ranks)}, alpha {_either(self.alphas)}",
            f"{self.modules} modules in {self.blocks} blocks: {', '.join(self.parts)}",
        ]
        known = {"variant": self.variant, "base": self.base, "step": self.step, "trigger words": ", ".join(self.trigger_words)}
        return "\n".join(lines + [f"{name}: {value}" for name, value in known.items() if value not in (None, "")])


def expert_of(path: Path) -> str:
    """Which of two experts a LoRA is for, by its metadata ("high" or "low"); else "". Raises LoraError when it cannot be read."""
    return read_header(path).metadata.get(f"{_OURS}expert", "")


def lora_metadata(
    *,
    name: str,
    family: Family,
    variant: Variant,
    base: str,
    rank: int,
    alpha: float | None,
    step: int,
    trigger_words: Sequence[str] = (),
    job_hash: str = "",
    expert: str = "",
) -> dict[str, str]:
    """The metadata of a LoRA file. `base` may be a path: only its last part is written; `alpha` None: `rank`."""
    base_name = re.split(r"[\\/]", base.rstrip("\\/"))[-1]
    scale = str(float(rank if alpha is None else alpha))
    found = {
        f"{_OURS}family": family.id,
        f"{_OURS}variant": variant.id,
        f"{_OURS}base": base_name,
        f"{_OURS}rank": str(rank),
        f"{_OURS}alpha": scale,
        f"{_OURS}step": str(step),
        f"{_OURS}job": job_hash,
        **({f"{_OURS}expert": expert} if expert else {}),
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{variant.id}/lora",
        "modelspec.implementation": "https://github.com/huggingface/diffusers",
        "modelspec.title": name,
        "ss_output_name": name,
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": scale,
        "ss_base_model_version": variant.title,
        "ss_sd_model_name": base_name,
        "ss_steps": str(step),
    }
    if trigger_words:
        found[f"{_OURS}trigger_words"] = json.dumps(list(trigger_words), ensure_ascii=False)
        found["modelspec.trigger_phrase"] = ", ".join(trigger_words)
        found["ss_tag_frequency"] = json.dumps({name: dict.fromkeys(trigger_words, 1)}, ensure_ascii=False)
    return found


def describe(path: Path) -> LoraDescription:
    """What a LoRA file is, by its header and alphas alone. Raises LoraError as `read_lora` does."""
    header = read_header(path)
    spelled = parse(header.shapes, path.name)
    family, members = family_of_lora(spelled, None, path.name)
    check_shapes(spelled, header.shapes, path.name)
    names = [place.name for places in members.values() for place in places]
    matches = [_BLOCK.match(name) for name in names]
    ranks = {module: header.shapes[keys["down"]][0] for module, keys in spelled.modules.items()}
    alphas = {header.alphas[keys["alpha"]] if "alpha" in keys else float(ranks[module]) for module, keys in spelled.modules.items()}
    step = header.metadata.get(f"{_OURS}step", "")
    return LoraDescription(
        family=family.title,
        form=spelled.form,
        ranks=tuple(sorted(set(ranks.values()))),
        alphas=tuple(sorted(_folded_alphas(header.metadata, path) or alphas)),
        modules=len(names),
        blocks=len({match["block"] for match in matches if match}),
        parts=tuple(sorted({match["part"] if match else name for name, match in zip(names, matches, strict=True)})),
        trigger_words=_trigger_words(header.metadata),
        base=header.metadata.get(f"{_OURS}base") or header.metadata.get("ss_sd_model_name"),
        variant=header.metadata.get(f"{_OURS}variant") or header.metadata.get("ss_base_model_version"),
        step=int(step) if step.isdigit() else None,
    )


def _folded_alphas(metadata: Mapping[str, str], path: Path) -> set[float]:
    """The alphas that were folded into B; none if nothing was."""
    alpha = unfold_record(metadata, path).get("alpha", {})
    return set(alpha.values()) if isinstance(alpha, dict) else {alpha}


def _trigger_words(metadata: Mapping[str, str]) -> tuple[str, ...]:
    """Our list, else the phrase of another trainer."""
    phrase = metadata.get("modelspec.trigger_phrase", "")
    try:
        return tuple(str(word) for word in json.loads(metadata[f"{_OURS}trigger_words"]))
    except (KeyError, TypeError, ValueError):
        return (phrase,) if phrase else ()


def _either(values: Sequence[float]) -> str:
    return " or ".join(f"{value:g}" for value in values)
