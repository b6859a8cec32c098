"""Which library computes attention: what a job may choose here, and how a transformer is told.

diffusers' transformers ask its dispatcher, which knows the libraries. auto is PyTorch's own: on the cards it has flash
attention for, it is the same kernels, and it is the only one that takes a mask rightly. flash-attn takes none, and xformers is
given a mask of truths by diffusers as if it were numbers to add.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from .device import Hardware, pick_device, pick_precision
from .errors import JobError, MissingPackage, Problem
from .family import Family, TextRecord
from .job import Job


@dataclass(frozen=True)
class Backend:
    """A library besides PyTorch: its name in diffusers' dispatcher, how it is installed, and what it computes on."""

    diffusers_name: str
    install: str
    capability: tuple[int, int]
    half_only: bool


BACKENDS = {
    "flash": Backend("flash", "pip install flash-attn --no-build-isolation", (8, 0), half_only=True),
    "flash_3": Backend("_flash_3", "build the folder hopper of flash-attention's source", (9, 0), half_only=True),
    "xformers": Backend("xformers", "pip install xformers, in the release for your PyTorch", (7, 0), half_only=False),
}


def check_attention(job: Job, family: Family | None) -> None:
    """Raises JobError with all that keeps the job from the library it names, MissingPackage when only the library is missing."""
    name = job.speed.attention
    if (backend := BACKENDS.get(name)) is None:
        return
    if problems := list(_problems(job, name, backend, family)):
        raise JobError(problems)
    if (missing := missing_library(backend)) is not None:
        install = backend.install[0].upper() + backend.install[1:]
        raise MissingPackage(f'speed.attention is {name!r}; its package must work here ({missing}). {install}, or use "auto".')


def use_attention(transformer: torch.nn.Module, name: str) -> None:
    """Lets the transformer compute attention by the library of `speed.attention`."""
    told: Any = getattr(transformer, "set_attention_backend", None)
    backend = BACKENDS[name].diffusers_name if name in BACKENDS else "native"
    assert told or backend == "native", f"{type(transformer).__name__} does not ask diffusers' dispatcher"
    if told:
        with _without_the_notice():
            told(backend)


def _problems(job: Job, name: str, backend: Backend, family: Family | None) -> Iterator[Problem]:
    device, value = pick_device(job), f"speed.attention is {name!r}"
    if device.type != "cuda":
        yield Problem(f"{value} on {device}", "it computes on a CUDA card only", 'Use "auto".')
        return
    found = torch.cuda.get_device_capability(device)
    if found < backend.capability:
        card, needed = torch.cuda.get_device_name(device), ".".join(map(str, backend.capability))
        yield Problem(f"{value} on {card} (compute capability {found[0]}.{found[1]})", f"it needs {needed}", 'Use "auto".')
    auto = family and job.precision == "auto" and pick_precision(job, family, Hardware.of(device)).name
    if backend.half_only and "fp32" in (job.precision, auto):
        yield Problem(f"{value}, precision is fp32", "it computes in bf16 and fp16 only", 'Use "auto", or precision bf16.')
    if job.batch_size > 1 and family is not None and masks_captions(family):
        rule = f"captions of {family.title} need a mask where lengths differ, which it does not take"
        yield Problem(f"{value}, batch_size is {job.batch_size}", rule, 'Use "auto", or batch_size 1 with more accumulation.')


def masks_captions(family: Family) -> bool:
    """Whether captions of different lengths in one batch are told apart by a mask."""
    records = [TextRecord(torch.zeros(rows, 1), torch.zeros(1)) for rows in (1, 2)]
    return family.collate_text(records, torch.device("cpu"), torch.float32).mask_BL is not None


def missing_library(backend: Backend) -> str | None:
    """What diffusers says of a library that it cannot use; None when it can."""
    from diffusers.models.attention_dispatch import AttentionBackendName, _check_attention_backend_requirements

    try:
        _check_attention_backend_requirements(AttentionBackendName(backend.diffusers_name))
    except (RuntimeError, ImportError) as error:
        return str(error).rstrip(".")
    return None


@contextmanager
def _without_the_notice() -> Iterator[None]:
    """Keeps diffusers from calling this experimental in every log."""
    logger = logging.getLogger("diffusers.models.modeling_utils")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
