"""What travels on the wires between the nodes: small frozen records that JSON can hold, never tensors.

The names of the types are a promise: saved workflows hold them. A DATASET is `trainers.data.scan.Dataset`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from comfy_api.latest import io

from ..trainers.data.encoded import EncodedImage

BASE = io.Custom("VIDEO_TRAINER_BASE")
DATASET = io.Custom("VIDEO_TRAINER_DATASET")
ENCODED = io.Custom("VIDEO_TRAINER_ENCODED")
PREVIEWS = io.Custom("VIDEO_TRAINER_PREVIEWS")
RUN = io.Custom("VIDEO_TRAINER_RUN")


@dataclass(frozen=True)
class Base:
    """The files of one model, and what the transformer is by its header. Paths are absolute."""

    family: str
    variant: str
    transformer: str
    transformer_low_noise: str | None = None
    vae: str | None = None
    text_encoders: tuple[str, ...] = ()
    clip_vision: str | None = None


@dataclass(frozen=True)
class EncodedData:
    """One version of the encoded data in `folder` (see `trainers.data.encoded`)."""

    folder: str
    identity: str


@dataclass(frozen=True)
class PreviewSettings:
    """Prompts that are encoded (prompt -> key in the cache), first frames that are, and the fields of a job's `previews`."""

    family: str
    variant: str
    texts: Mapping[str, str]
    spec: Mapping[str, Any] = field(default_factory=dict)
    images: tuple[EncodedImage, ...] = ()


@dataclass(frozen=True)
class RunFolder:
    """A run, by its folder."""

    folder: str
