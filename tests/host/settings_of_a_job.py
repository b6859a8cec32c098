"""Under ComfyUI's Python: what Train LoRA's settings are to the fields of a job."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin

from inside import load_pack
from installation import PACK

NO_DEFAULT = {"name", "steps"}


def main(values: Mapping[str, Any]) -> dict[str, Any]:
    """Fields whose default is another than the job's; choices that only one of both has; the job that `values` make."""
    pack = load_pack(str(PACK))
    settings, job = (sys.modules[f"{pack.__name__}.{module}"] for module in ("nodes.settings", "trainers.job"))
    ours, theirs = settings.job_values({}), _parsed(job, {"steps": settings.job_values({})["steps"]})
    fields = {setting.field: setting.input for setting in settings.settings()}
    other = {field: (_at(ours, field), _at(theirs, field)) for field in fields.keys() - NO_DEFAULT}
    return {
        "defaults": {field: both for field, both in other.items() if both[0] != both[1]},
        "choices": {field: sorted(wrong) for field, of in fields.items() if (wrong := _choices(job.Job, field) ^ set(_offered(of)))},
        "job": _parsed(job, settings.job_values(values)),
    }


def _parsed(job: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    return job.parse_job({"base": {"transformer": "x"}, "encoded": "x", **values} | {"name": "x"}).model_dump(mode="json")


def _at(values: Any, field: str) -> Any:
    for name in field.split("."):
        values = values[name]
    return values


def _choices(spec: Any, field: str) -> set[str]:
    """What a field may be, if that is a choice."""
    for name in field.split("."):
        spec = spec.model_fields[name].annotation
    return set(get_args(spec)) if get_origin(spec) is Literal else set()


def _offered(of: Any) -> list[str]:
    return (of.options or []) if of.id != "device" and hasattr(of, "options") else []  # a device is no choice in a job
