"""Runs under ComfyUI's Python, in its folder, and with the first entry of sys.path that main.py has: `inside.py REQUEST`.

Test code for that side is a file with `main(**arguments)`; it may `from inside import load_pack`.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import logging
import sys
from pathlib import Path
from types import ModuleType
from typing import Any


def load_pack(folder: str) -> ModuleType:
    """The pack, loaded and registered by ComfyUI's own function. Its modules: `sys.modules[pack.__name__ + ".nodes.host"]`."""
    import nodes

    assert asyncio.run(nodes.load_custom_node(folder)), f"ComfyUI could not load {folder}"
    return sys.modules[folder.replace(".", "_x_")]


def _load(file: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"host_test_{Path(file).stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _run(request: dict[str, Any]) -> None:
    here = str(Path(__file__).parent)
    sys.path[:] = [request["root"], *(entry for entry in sys.path if entry != here), here]
    sys.argv[:] = ["main.py", *request["flags"]]
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    from comfy import options

    options.enable_args_parsing()
    # As main.py does, before `nodes` puts ComfyUI's comfy/ in front of sys.path, whose utils.py would hide this.
    import utils.extra_config  # noqa: F401

    answer = _load(request["file"]).main(**request["arguments"])
    Path(request["answer"]).write_text(json.dumps(answer), "utf-8")


if __name__ == "__main__":
    _run(json.loads(sys.argv[1]))
