"""Whether the blocks of a model are alike, by its header: a tensor that is missing or of another shape shows among its siblings."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping

from .checkpoint import Checkpoint
from .errors import Problem

_BLOCK = re.compile(r"(?P<list>\D+\.)(?P<index>\d+)\.(?P<rest>.+)")
_FEWEST = 4
"""Lists of fewer blocks are not judged: which of two is the odd one?"""

Shape = tuple[int, ...]


def block_problem(checkpoint: Checkpoint) -> Problem | None:
    """What is wrong with the blocks of a transformer; None when all are alike. The last block of a list may have less than the others."""
    odd = [told for blocks in _lists(checkpoint) for told in _odd_ones(blocks)]
    if not odd:
        return None
    shown = ", ".join(odd[:3]) + (f" and {len(odd) - 3} more" if len(odd) > 3 else "")
    return Problem(shown, "the blocks of a model are alike", "Download the file again.")


def _lists(checkpoint: Checkpoint) -> list[dict[int, dict[str, tuple[str, Shape]]]]:
    """The block lists: {index: {name within the block: (whole name, shape)}}."""
    lists: dict[str, dict[int, dict[str, tuple[str, Shape]]]] = defaultdict(lambda: defaultdict(dict))
    for name, stored in checkpoint.tensors.items():
        if match := _BLOCK.fullmatch(name):
            lists[match["list"]][int(match["index"])][match["rest"]] = name, stored.shape
    return [blocks for blocks in lists.values() if len(blocks) >= _FEWEST and max(blocks) == len(blocks) - 1]


def _odd_ones(blocks: Mapping[int, Mapping[str, tuple[str, Shape]]]) -> list[str]:
    last, found = max(blocks), []
    counts: dict[str, Counter[Shape]] = defaultdict(Counter)
    for block in blocks.values():
        for rest, (_, shape) in block.items():
            counts[rest][shape] += 1
    for rest, shapes in counts.items():
        usual, times = shapes.most_common(1)[0]
        if 2 * times <= len(blocks):
            continue  # a kind of tensor that few blocks have, as the last one may
        template = next(name for block in blocks.values() if rest in block for name in [block[rest][0]])
        for index, block in sorted(blocks.items()):
            if rest not in block and index != last:
                found.append(f"{_renumbered(template, index)} is missing")
            elif rest in block and block[rest][1] != usual and index != last:
                found.append(f"{block[rest][0]} is {list(block[rest][1])}, not {list(usual)} as in the other blocks")
    return found


def _renumbered(name: str, index: int) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", str(index), name, count=1)
