"""Schemas that every supported ComfyUI accepts, and inputs that fill a field of a job.

One keyword that a ComfyUI does not know would keep the whole pack from loading: unknown ones are left out.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from comfy_api.latest import io

PREFIX = "VideoTrainer_"
CATEGORY = "Video Trainer"

ADVANCED: dict[str, Any] = {"advanced": True}
"""`extra_dict` of an input that most people leave alone (`advanced=` itself came with ComfyUI 0.10)."""

_KNOWN = {field.name for field in fields(io.Schema)}


def schema(name: str, display_name: str, description: str, inputs: list[Any], outputs: list[Any], **more: Any) -> io.Schema:
    """The schema of the node `VideoTrainer_<name>`; what this ComfyUI does not know is left out."""
    values = {
        "node_id": PREFIX + name,
        "display_name": display_name,
        "category": CATEGORY,
        "description": description,
        "inputs": inputs,
        "outputs": outputs,
        **more,
    }
    return io.Schema(**{key: value for key, value in values.items() if key in _KNOWN})


@dataclass(frozen=True)
class Setting:
    """An input and the job's field ("lora.rank") of its value. The value `unset` stands for None."""

    field: str
    input: Any
    unset: Any = None


def folded(field: str, kind: Any, id: str, unset: Any = None, **more: Any) -> Setting:
    """A setting that most people leave alone."""
    return Setting(field, kind.Input(id, optional=True, extra_dict=ADVANCED, **more), unset)
