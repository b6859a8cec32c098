"""What is measured on a card, as data: one row for each number of the targets table, and one for each model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Size = tuple[int, int, int]
"""Frames, height, width in pixels."""


@dataclass(frozen=True)
class Case:
    """One measurement, in a process of its own.

    kind      "train": the trainer alone, with its memory; "compare": the trainer beside the plain loop, in turn;
              "sizes": the first step of each of `sizes` beside its second; "peer": another trainer
    dtype     what the file holds: "bfloat16" or "fp8_scaled"
    cap_gib   what PyTorch may reserve of the card; None: all of it
    job       fields of the job
    arrangement   how blocks are kept (see `loops.arranged`); None: as the plan chooses
    plain     dtype of the plain loop's LoRA (see `loops.plain_loop`)
    steps     steps that are timed (of "compare": rounds of one step each)
    target    the largest value that counts as met: GiB reserved ("train" with a cap: that it trains), or the ratio
    """

    name: str
    kind: Literal["train", "compare", "sizes", "peer"]
    model: str
    dtype: str
    size: Size
    cap_gib: float | None = None
    job: Mapping[str, Any] = field(default_factory=dict)
    arrangement: Mapping[str, Any] | None = None
    plain: str = "bfloat16"
    steps: int = 5
    warm_up: int = 2
    target: float | None = None
    limit_seconds: int = 300
    settings: tuple[Mapping[str, Any], ...] = ()
    """Of a peer: what is tried, the best first, until one does not run out of memory."""
    sizes: tuple[Size, ...] = ()
    """Of "sizes": one clip of each, beside one of `size`."""


LARGE, MIDDLE, SMALL = (81, 512, 512), (33, 512, 512), (33, 256, 256)
"""Of Wan: 21,504 tokens, 9,216 and 2,304."""
EIGHT = tuple((frames, height, width) for frames in (17, 33) for height, width in ((256, 448), (320, 320), (384, 256), (448, 384)))
"""As a data set of mixed clips has them in its buckets."""

_RESIDENT: dict[str, Any] = {}
_FIFTH = {"weights_share": 0.2, "host": "pinned"}
_CHUNKED: dict[str, Any] = {"weights_share": 0.2, "host": "pinned", "activations": "host"}
_FIFTH_MAPPED = {"weights_share": 0.2, "host": "mapped"}


def _musubi(*swaps: int) -> tuple[Mapping[str, Any], ...]:
    return tuple({"blocks_to_swap": swap, "h2d_only": True, "fp8": True, "offload_inputs": True} for swap in swaps)


CASES: tuple[Case, ...] = (
    Case("wan-14b 512x512x81 in 12 GiB", "train", "wan-14b", "fp8_scaled", LARGE, 12, steps=4, target=12),
    *(
        Case(
            f"wan-14b 512x512x81 in {count} chunks",
            "train",
            "wan-14b",
            "fp8_scaled",
            LARGE,
            arrangement=_CHUNKED | {"chunks": count},
            steps=2,
        )
        for count in (1, 2, 4)
    ),
    Case("wan-14b 256x256x33 in 8 GiB", "train", "wan-14b", "fp8_scaled", SMALL, 8, target=8),
    Case("wan-14b 512x512x33 streamed, fp8", "train", "wan-14b", "fp8_scaled", MIDDLE, arrangement=_FIFTH, steps=4),
    Case("wan-14b streamed beside resident", "compare", "wan-14b", "bfloat16", MIDDLE, arrangement=_FIFTH, target=1.05),
    Case("wan-14b resident beside the bare loop", "compare", "wan-14b", "bfloat16", MIDDLE, arrangement=_RESIDENT, target=1.03),
    Case("wan-14b mapped beside resident", "compare", "wan-14b", "bfloat16", MIDDLE, arrangement=_FIFTH_MAPPED, steps=3),
    Case("wan-14b bf16 512x512x81 in 12 GiB", "train", "wan-14b", "bfloat16", LARGE, 12, steps=3, target=12),
    Case("musubi 512x512x81 in 12 GiB", "peer", "wan-14b", "bfloat16", LARGE, 12, settings=_musubi(38, 39), steps=4),
    Case("musubi 512x512x81 in 24 GiB", "peer", "wan-14b", "bfloat16", LARGE, 24, settings=_musubi(8, 24), steps=4),
    Case("wan-14b 512x512x81 in 24 GiB", "train", "wan-14b", "fp8_scaled", LARGE, 24, steps=3),
    Case("musubi 512x512x81 in 16 GiB", "peer", "wan-14b", "bfloat16", LARGE, 16, settings=_musubi(28, 36), steps=4),
    Case("wan-14b 512x512x81 in 16 GiB", "train", "wan-14b", "fp8_scaled", LARGE, 16, steps=3),
    Case("musubi resident 512x512x33", "peer", "wan-14b", "bfloat16", MIDDLE, settings=({"blocks_to_swap": 0},)),
    Case("wan-14b beside diffusers' script", "compare", "wan-14b", "bfloat16", MIDDLE, arrangement=_RESIDENT, plain="float32", steps=3),
    Case(
        "wan-14b compiled, streamed",
        "train",
        "wan-14b",
        "bfloat16",
        MIDDLE,
        job={"speed": {"compile": True}},
        arrangement=_FIFTH | {"compile": True},
    ),
    Case("wan-14b deterministic, streamed", "train", "wan-14b", "bfloat16", MIDDLE, job={"deterministic": True}, arrangement=_FIFTH),
    Case("wan-1.3b 480x832x33 in 16 GiB", "train", "wan-1.3b", "bfloat16", (33, 480, 832), 16),
    Case("wan-1.3b eight sizes in turn", "sizes", "wan-1.3b", "bfloat16", (17, 256, 256), arrangement=_RESIDENT, sizes=EIGHT),
    Case("wan-1.3b beside the bare loop", "compare", "wan-1.3b", "bfloat16", MIDDLE, arrangement=_RESIDENT, target=1.03),
    Case("wan-5b 704x1280x49 in 16 GiB", "train", "wan-5b", "bfloat16", (49, 704, 1280), 16),
    Case("ltx-2b 512x768x89 in 8 GiB", "train", "ltx-2b", "bfloat16", (89, 512, 768), 8),
    Case("ltx-13b 512x768x89 in 16 GiB", "train", "ltx-13b", "bfloat16", (89, 512, 768), 16),
    Case("hunyuan-13b 544x544x33 in 16 GiB", "train", "hunyuan-13b", "bfloat16", (33, 544, 544), 16),
    Case("mochi-10b 480x848x37 in 24 GiB", "train", "mochi-10b", "bfloat16", (37, 480, 848), 24),
)
"""The most telling first: time is short on a lent card. Cases of one file stand together, it is made once and then deleted."""


def case_of(name: str) -> Case:
    return next(case for case in CASES if case.name == name)
