"""Under ComfyUI's Python: a pack is loaded as at ComfyUI's start, after everything that ComfyUI itself loads before it."""

from __future__ import annotations

import asyncio
import io
import logging
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any


def main(folders: list[str]) -> list[dict[str, Any]]:
    """For each pack: whether it was loaded, seconds (by the clock, and of the processor), modules that it brought, the log.

    The first has the times that a user sees: the next ones find their libraries loaded.
    """
    import server

    import nodes

    async def load_all() -> list[dict[str, Any]]:
        server.PromptServer(asyncio.get_running_loop())  # nodes register routes with it
        await nodes.init_public_apis()
        await nodes.init_builtin_extra_nodes()
        return [await _load(nodes.load_custom_node, folder) for folder in folders]

    return asyncio.run(load_all())


async def _load(load_custom_node: Callable[[str], Awaitable[bool]], folder: str) -> dict[str, Any]:
    log = io.StringIO()
    handler = logging.StreamHandler(log)
    logging.getLogger().addHandler(handler)
    before = set(sys.modules)
    clock, processor = time.perf_counter(), time.process_time()
    loaded = await load_custom_node(folder)
    seconds = {"seconds": time.perf_counter() - clock, "processor_seconds": time.process_time() - processor}
    logging.getLogger().removeHandler(handler)
    return {"loaded": loaded, **seconds, "modules": sorted(set(sys.modules) - before), "log": log.getvalue()}
