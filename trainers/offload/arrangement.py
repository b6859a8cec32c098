"""How the blocks of a transformer are kept and run: what the plan chooses, and what the rest of this package carries out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Arrangement:
    """Where the frozen weights of the blocks and their inputs are while a step runs.

    `weights_bytes` is what the streamable weights of all blocks may take of the device, the ring of slots included; None:
    they all stay there. `host` is where streamed weights wait: in the mapped file ("mapped", they go through pinned staging
    buffers of bounded size) or in a pinned copy ("pinned"), as many blocks as `most_pinned_bytes` (None: any number) and the
    system allow, the others in the file. `checkpointing`: each block is computed again in the backward
    pass, from its input, which waits on the device or in pinned host memory (`activations`). Streaming and "host" need it.
    `chunks`: parts of the sequence in which all of a block but attention is computed (and computed again), 1: whole.
    `compile`: the blocks are compiled.
    """

    weights_bytes: int | None = None
    host: Literal["mapped", "pinned"] = "mapped"
    most_pinned_bytes: int | None = None
    checkpointing: bool = True
    activations: Literal["device", "host"] = "device"
    chunks: int = 1
    compile: bool = False

    def __post_init__(self) -> None:
        needs_it = self.weights_bytes is not None or self.activations == "host" or self.chunks > 1
        assert self.checkpointing or not needs_it, "streaming, host activations and chunks need checkpointing"
