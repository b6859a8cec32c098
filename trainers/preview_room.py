"""Room for a preview on a card that training fills: found by trying, and known from then on.

Sampling needs no gradients, but its videos may be larger than the clips: then fewer blocks stay on the device while it goes on.
Decoding needs no transformer: when the VAE has no room beside it, its frozen weights leave the device, and when that is not
enough the video is decoded in tiles. Training afterwards finds everything kept as it was.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypeVar

from .offload.arrangement import Arrangement
from .residency import tighter
from .room import give_back, until_it_fits

if TYPE_CHECKING:
    from .training import Training

Result = TypeVar("Result")


class NoRoomError(Exception):
    """The least that there is does not fit; the message says what that was."""


@dataclass
class PreviewRoom:
    """How the previews of a training get room. `tiles` are the sides of the tiles that decoding may come to, in pixels."""

    training: Training
    tiles: tuple[int, ...]
    _ways: list[tuple[bool, int | None]] = field(init=False)
    """What is left to decode with, the present way first: whether the transformer's weights stay, and the side of the tiles."""
    _arrangement: Arrangement | None = None
    """How blocks are kept while a preview is sampled; None: as in training."""

    def __post_init__(self) -> None:
        self._ways = [(True, None), (False, None), *((False, side) for side in self.tiles)]

    @property
    def tile_pixels(self) -> int | None:
        """The side of the tiles that videos are decoded in; None: whole."""
        return self._ways[0][1]

    def sampled(self, sample: Callable[[], Result]) -> Result:
        """What `sample` returns, with less of the transformer on the device as long as that is full.

        Raises NoRoomError when the least does not fit.
        """
        usual, known = self.training.learners[0].residency.arrangement, self._arrangement
        if known:
            self._keep(known)
        try:
            found = until_it_fits(sample, self._sample_with_less)
            if self._arrangement is not known:
                self._tell()
            return found
        finally:
            if self._arrangement:
                self._keep(usual)
                self._ways = [way for way in self._ways if not way[0]]

    def decoded(self, decode: Callable[[int | None], Result]) -> Result:
        """What `decode` returns for the side of the tiles (None: whole), with the transformer or without it on the device.

        Raises NoRoomError when the least does not fit.
        """
        return until_it_fits(lambda: self._decode(decode), self._decode_with_less)

    def _keep(self, arrangement: Arrangement) -> None:
        """Blocks come as `arrangement` says when they are asked for; until then they take nothing of the device."""
        self.training.make_way()
        self.training.rearrange(arrangement)
        give_back(self.training.device)

    def _sample_with_less(self) -> None:
        training = self.training
        residency = training.learners[0].residency
        kept = replace(residency.arrangement, checkpointing=True, activations="host")  # inputs of blocks: sampling keeps none
        less = tighter(kept, residency.block_bytes, training.method.can_stream)
        if less is None:
            raise NoRoomError("not even with as few blocks on the device as there can be")
        self._arrangement = less
        self._keep(less)

    def _tell(self) -> None:
        training = self.training
        residency = training.learners[0].residency
        blocks = f"{len(residency.placement.resident)} of {len(residency.block_bytes)} blocks stay on the device"
        parts = f", all but attention runs in {residency.arrangement.chunks} parts" if residency.arrangement.chunks > 1 else ""
        message = f"the device was full: while previews are sampled {blocks}{parts}; training keeps them as before"
        training.run.event("sample", step=training.step, files=[], message=message)

    def _decode(self, decode: Callable[[int | None], Result]) -> Result:
        beside, side = self._ways[0]
        if not beside:
            self.training.make_way()
            give_back(self.training.device)
        return decode(side)

    def _decode_with_less(self) -> None:
        if not self._ways[1:]:
            side = self.tile_pixels
            raise NoRoomError(
                f"not even without the transformer and in tiles of {side} pixels" if side else "not even without the transformer"
            )
        del self._ways[0]
        give_back(self.training.device)
