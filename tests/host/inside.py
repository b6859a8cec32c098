"""Runs under ComfyUI's Python, in its folder, and with the first entry of sys.path that main.py has: `inside.py REQUEST`.

A request without a file: the requests are lines of the input (see `warm_python.py`).

Test code for that side is a file with `main(**arguments)`; it may `from inside import load_pack`.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import logging
import os
import sys
import traceback
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


def _import_comfyui(root: str, flags: list[str]) -> None:
    here = str(Path(__file__).parent)
    sys.path[:] = [root, *(entry for entry in sys.path if entry != here), here]
    sys.argv[:] = ["main.py", *flags]
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    from comfy import options

    options.enable_args_parsing()
    # As main.py does, before `nodes` puts ComfyUI's comfy/ in front of sys.path, whose utils.py would hide this.
    import utils.extra_config  # noqa: F401


def _run(request: dict[str, Any]) -> None:
    answer = _load(request["file"]).main(**request["arguments"])
    Path(request["answer"]).write_text(json.dumps(answer), "utf-8")


def _serve() -> None:
    """Run each request that is a line of the input in a fork, and say "ended CODE"."""
    import nodes  # noqa: F401

    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if not child:
            _be_the_child(request)
        print(f"ended {os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}", flush=True)


def _be_the_child(request: dict[str, Any]) -> None:
    code = 1
    try:
        output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        _run(request)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    start = json.loads(sys.argv[1])
    _import_comfyui(start["root"], start["flags"])
    if "file" in start:
        _run(start)
    else:
        _serve()
