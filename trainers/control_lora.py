"""What a control LoRA is, by its header alone: of which kind, for which family.

    channels    the control's latents are further input channels, so the patch embedding's weight has grown (Wan);
                made by https://github.com/spacepxl/WanTraining
    reference   the control's latents are further tokens, clean and at the places of the video's own (LTX-Video's IC-LoRA);
                made by https://github.com/Lightricks/LTX-Video-Trainer

Channels show in the tensors. An IC-LoRA has the tensors of any other LoRA, and Lightricks' own carry no metadata: there the
file's name tells, else the user.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .errors import LoraError, Problem
from .family import ControlLoras, Family, families
from .lora_format import LoraHeader, read_header
from .lora_keys import listed

CONTROL_KEY = "video_trainer.control"
"""The metadata entry in which a file says its kind."""
_SCALE_KEY = "reference_downscale_factor"
"""Written by Lightricks' trainers into IC-LoRAs: the reference is that many times smaller than the video."""

_NATIVE = "diffusion_model."
_PREFIXES = (_NATIVE, "model.diffusion_model.", "base_model.model.transformer.", "base_model.model.", "transformer.")
_EMBEDDING = re.compile(r"(lora_unet_)?patch_embedding\.(?P<part>.+)")
_PARTS = {
    **dict.fromkeys(("lora_A.weight", "lora_A.default.weight", "lora_down.weight"), "down"),
    **dict.fromkeys(("lora_B.weight", "lora_B.default.weight", "lora_up.weight"), "up"),
    **{"alpha": "alpha", "reshape_weight": "shape"},
}
_IC_LORA = re.compile(r"ic[-_ ]?lora", re.IGNORECASE)


@dataclass(frozen=True)
class GrownEmbedding:
    """The LoRA of a patch embedding: its keys in the file, and the input channels of the grown weight.

    `down` (rank, channels, *patch), `up` (out, rank, 1, 1, 1); `shape` holds the shape of the grown weight, if the file has it.
    """

    channels: int
    down: str
    up: str
    alpha: str | None = None
    shape: str | None = None

    @property
    def keys(self) -> set[str]:
        return {key for key in (self.down, self.up, self.alpha, self.shape) if key}


@dataclass(frozen=True)
class ControlLora:
    """What a control LoRA's file is. `reason` is what the kind was told by; `embedding` is there for kind "channels".

    `native` maps every key of the file to the name that ComfyUI knows.
    """

    family: str
    title: str
    kind: Literal["channels", "reference"]
    reason: str
    native: Mapping[str, str]
    embedding: GrownEmbedding | None = None


def recognise(path: Path, as_reference: bool = False) -> ControlLora:
    """What the control LoRA in `path` is; `as_reference`: the user says that it is an IC-LoRA.

    Raises LoraError for a file that is damaged, of another family than Wan or LTX-Video, or without a control.
    """
    header = read_header(path)
    names = {key: _without_prefix(key) for key in header.shapes}
    family, controls = _family(names.values(), path)
    title, kind = family.title, controls.kind
    native = {key: name if name.startswith("lora_unet_") else _NATIVE + name for key, name in names.items()}
    if kind == "channels":
        embedding = _embedding(header, names, path, title)
        reason = f"patch_embedding has {embedding.channels} input channels"
        return ControlLora(family.id, title, kind, reason, native, embedding)
    reason = "kind is set to IC-LoRA" if as_reference else _told_by(header, path, title)
    _check_scale(header, path)
    return ControlLora(family.id, title, kind, reason, native)


def _without_prefix(key: str) -> str:
    return next((key.removeprefix(prefix) for prefix in _PREFIXES if key.startswith(prefix)), key)


def _family(names: Iterable[str], path: Path) -> tuple[Family, ControlLoras]:
    names = list(names)
    for family in families().values():
        if family.control and any(re.match(family.control.modules, name) for name in names):
            return family, family.control
    problem = Problem(
        f"{path.name} holds {listed(names)}",
        "control LoRAs of Wan (more input channels) and of LTX-Video (IC-LoRA) are applied here",
        "Check which model it was made for; an ordinary LoRA goes into Apply LoRA.",
    )
    raise LoraError(str(problem))


def _embedding(header: LoraHeader, names: Mapping[str, str], path: Path, title: str) -> GrownEmbedding:
    found = {match["part"]: key for key, name in names.items() if (match := _EMBEDDING.fullmatch(name))}
    keys = {_PARTS[part]: key for part, key in found.items() if part in _PARTS}
    if not {"down", "up"} <= keys.keys():
        value = f"{path.name} is a LoRA for {title} without a control (its patch embedding has no further input channels)"
        raise LoraError(str(Problem(value, "a control LoRA says how the control enters the model", "Use Apply LoRA for this file.")))
    down, up = header.shapes[keys["down"]], header.shapes[keys["up"]]
    if len(down) != 5 or down[0] != up[1] or "dora_scale" in found:
        value = f"{path.name}: patch_embedding has A {down}, B {up}" + (" and a DoRA scale" if "dora_scale" in found else "")
        rule = "A must be rank x channels x patch and B out x rank, without DoRA"
        raise LoraError(str(Problem(value, rule, "Use another file.")))
    return GrownEmbedding(down[1], keys["down"], keys["up"], keys.get("alpha"), keys.get("shape"))


def _told_by(header: LoraHeader, path: Path, title: str) -> str:
    """What says that a LoRA of LTX-Video is an IC-LoRA. Raises LoraError when nothing does."""
    if header.metadata.get(CONTROL_KEY) == "reference":
        return f"metadata {CONTROL_KEY}"
    if _SCALE_KEY in header.metadata:
        return f"metadata {_SCALE_KEY}"
    titles = {key: value for key, value in header.metadata.items() if key in ("modelspec.title", "ss_output_name")}
    for where, name in {"its name": path.name, **titles}.items():
        if _IC_LORA.search(name):
            return where
    problem = Problem(
        f"neither the name of {path.name} nor its metadata say that it is an IC-LoRA",
        f"an ordinary LoRA of {title} has the same tensors",
        "Set kind to IC-LoRA if it is one; use Apply LoRA if it is not.",
    )
    raise LoraError(str(problem))


def _check_scale(header: LoraHeader, path: Path) -> None:
    scale = header.metadata.get(_SCALE_KEY, "1")
    if scale not in ("1", "1.0"):
        problem = Problem(
            f"{path.name} was trained with references {scale} times smaller than the video ({_SCALE_KEY})",
            "the control is given at the video's own size here",
            "Use Lightricks' nodes (ComfyUI-LTXVideo) for this file.",
        )
        raise LoraError(str(problem))
