"""Under ComfyUI's Python: settings of Train LoRA whose default is another than the job's."""

from __future__ import annotations

import sys
from typing import Any

from inside import load_pack
from installation import PACK

NO_DEFAULT = {"name", "steps"}


def main() -> dict[str, Any]:
    pack = load_pack(str(PACK))
    settings, job = (sys.modules[f"{pack.__name__}.{module}"] for module in ("nodes.settings", "trainers.job"))
    values = settings.job_values({})
    plain = job.parse_job({"name": "x", "base": {"transformer": "x"}, "encoded": "x", "steps": values["steps"]}).model_dump(mode="json")
    wrong = {}
    for setting in settings.settings():
        ours, theirs = values, plain
        for table in setting.field.split("."):
            ours, theirs = ours[table], theirs[table]
        if setting.field not in NO_DEFAULT and ours != theirs:
            wrong[setting.field] = [ours, theirs]
    return wrong
