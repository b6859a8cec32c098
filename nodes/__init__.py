"""The nodes: thin adapters of `trainers`, and the only code that imports ComfyUI."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io


class VideoTrainerExtension(ComfyExtension):
    """What ComfyUI registers."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """Every node class, in the order of a user's graph. The panel's routes are added here too: there is no other moment."""
        from . import control, dataset, encode, lora, models, routes, train

        routes.register()
        return [
            *models.NODES,
            *dataset.NODES,
            *encode.NODES,
            *train.NODES,
            *lora.NODES,
            *control.NODES,
        ]
