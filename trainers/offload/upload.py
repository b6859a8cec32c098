"""What stays on the device gets there in few large copies out of pinned memory.

Tensor by tensor, from the mapped file, CUDA copies through a small buffer of its own while Python waits: at a third of the speed,
and each of hundreds of small tensors takes a launch and an allocation.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch

from .copies import Copies
from .host import HostWeights, Staging
from .layout import Flat, aligned


def upload(runs: Sequence[Flat], copies: Copies, weights: HostWeights, block_bytes: int) -> list[list[torch.Tensor]]:
    """The tensors of each run on the device. On a GPU a run is one allocation and one copy; elsewhere tensors are copied as they are.

    Returns when the host's part is done. The staging buffers have room for a block of `block_bytes`, so that streamed blocks can take
    them over. Raises torch.OutOfMemoryError before anything is copied.
    """
    device = weights.memory.device
    if not runs or device.type != "cuda":
        return [[host.to(device) for host in run.hosts] for run in runs]
    targets = [torch.empty(run.nbytes, dtype=torch.uint8, device=device) for run in runs]
    free, staging = copies.mark(), Staging(dict(enumerate(runs)), copies, weights, block_bytes)
    try:
        for arrival in [staging.send(index, target, free) for index, target in enumerate(targets)]:
            copies.wait(arrival())
    finally:
        staging.close()
    return [run.parts(target) for run, target in zip(runs, targets, strict=True)]


def in_runs(tensors: Iterable[torch.Tensor], most_bytes: int) -> Iterator[Flat]:
    """The tensors in their order, as few runs of at most so many bytes; a larger tensor is a run of its own."""
    together, nbytes = list[torch.Tensor](), 0
    for tensor in tensors:
        if together and nbytes + aligned(tensor.nbytes) > most_bytes:
            yield Flat.packed(together)
            together, nbytes = [], 0
        together.append(tensor)
        nbytes += aligned(tensor.nbytes)
    if together:
        yield Flat.packed(together)
