"""Video Trainer for ComfyUI: train LoRAs for video models inside the graph, in the background, on the files you have.

ComfyUI imports this at its start: nothing heavy may be imported here, nor by `nodes` at its top.
"""

from __future__ import annotations

import logging
from typing import Any

WEB_DIRECTORY = "./web"

__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]


async def comfy_entrypoint() -> Any:
    """The nodes, for ComfyUI. Its own message about an error would leave out the traceback, so all that can fail is done here."""
    try:
        from .nodes import VideoTrainerExtension

        extension = VideoTrainerExtension()
        for node in await extension.get_node_list():
            node.GET_SCHEMA()
        return extension
    except Exception:
        logging.exception("Video Trainer could not be loaded")
        raise
