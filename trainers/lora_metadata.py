"""What a LoRA or model file says about itself, for programs that manage such files and for people.

Nothing here depends on when, where or by whom it was trained, so equal training is an equal file. The `modelspec.*` fields
follow https://github.com/Stability-AI/ModelSpec, the `ss_*` fields are those of kohya's trainers that LoRA managers read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from .family import Family, Variant

OURS = "video_trainer."


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
    base_name = _last_part(base)
    scale = str(float(rank if alpha is None else alpha))
    found = {
        f"{OURS}family": family.id,
        f"{OURS}variant": variant.id,
        f"{OURS}base": base_name,
        f"{OURS}rank": str(rank),
        f"{OURS}alpha": scale,
        f"{OURS}step": str(step),
        f"{OURS}job": job_hash,
        **({f"{OURS}expert": expert} if expert else {}),
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
        found[f"{OURS}trigger_words"] = json.dumps(list(trigger_words), ensure_ascii=False)
        found["modelspec.trigger_phrase"] = ", ".join(trigger_words)
        found["ss_tag_frequency"] = json.dumps({name: dict.fromkeys(trigger_words, 1)}, ensure_ascii=False)
    return found


def model_metadata(
    *, name: str, family: Family, variant: Variant, base: str, step: int, trigger_words: Sequence[str] = (), job_hash: str = ""
) -> dict[str, str]:
    """The metadata of a model all of whose weights were trained. `base` may be a path: only its last part is written."""
    found = {
        f"{OURS}family": family.id,
        f"{OURS}variant": variant.id,
        f"{OURS}base": _last_part(base),
        f"{OURS}step": str(step),
        f"{OURS}job": job_hash,
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": variant.id,
        "modelspec.implementation": "https://github.com/huggingface/diffusers",
        "modelspec.title": name,
    }
    if trigger_words:
        found[f"{OURS}trigger_words"] = json.dumps(list(trigger_words), ensure_ascii=False)
        found["modelspec.trigger_phrase"] = ", ".join(trigger_words)
    return found


def _last_part(path: str) -> str:
    return re.split(r"[\\/]", path.rstrip("\\/"))[-1]
