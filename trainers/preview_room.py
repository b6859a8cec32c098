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
from .residency import Residency, tighter
from .room import give_back, kept_by, until_it_fits
from .shortage import Shortages

if TYPE_CHECKING:
    from .training import Training

Result = TypeVar("Result")


class NoRoomError(Exception):
    """The least that there is does not fit; the message says what that was."""


@dataclass(frozen=True)
class _Way:
    """How previews are made: how blocks are kept while one is sampled (None: as in training), and which way to decode."""

    arrangement: Arrangement | None = None
    decoding: int = 0


@dataclass
class PreviewRoom:
    """How the previews of a training get room. `tiles` are the sides of the tiles that decoding may come to, in pixels."""

    training: Training
    tiles: tuple[int, ...]
    _way: _Way = _Way()
    _shortages: Shortages[_Way] = field(default_factory=Shortages)

    @property
    def _decodings(self) -> list[tuple[bool, int | None]]:
        """Ways to decode, the one that takes most first: whether the transformer's weights stay, and the side of the tiles."""
        return [(True, None), (False, None), *((False, side) for side in self.tiles)]

    @property
    def tile_pixels(self) -> int | None:
        """The side of the tiles that videos are decoded in; None: whole."""
        return self._decodings[self._way.decoding][1]

    def sampled(self, sample: Callable[[], Result]) -> Result:
        """What `sample` returns, with less of the transformer on the device as long as that is full.

        Raises NoRoomError when the least does not fit.
        """
        self._go_back()
        usual, known = self._residency.arrangement, self._way.arrangement
        try:
            if known:
                self._keep(known)
            found = until_it_fits(sample, lambda: self._sample_with_less(usual))
            if self._way.arrangement not in (known, None):
                self._tell()
            return found
        finally:
            if self._residency.arrangement != usual:
                self._keep(usual)

    def decoded(self, decode: Callable[[int | None], Result]) -> Result:
        """What `decode` returns for the side of the tiles (None: whole), with the transformer or without it on the device.

        Raises NoRoomError when the least does not fit.
        """
        return until_it_fits(lambda: self._decode(decode), self._decode_with_less)

    @property
    def _residency(self) -> Residency:
        return self.training.learners[0].residency

    def _go_back(self) -> None:
        """Tries again what previews used before the GPU was full, once, after enough steps."""
        if before := self._shortages.again(self._way, self.training.step):
            self._way = before
            message = "Previews use as much GPU memory again as before it ran out."
            self.training.run.event("sample", step=self.training.step, files=[], message=message)

    def _keep(self, arrangement: Arrangement) -> None:
        """Blocks come as `arrangement` says when they are asked for; until then they take nothing of the device."""
        self.training.make_way()
        self.training.rearrange(arrangement)
        give_back(self.training.device)

    def _sample_with_less(self, usual: Arrangement) -> None:
        less = self._shortages.less(self._way, self._tighter, self.training.step)
        if less is None:
            raise NoRoomError("not even with as few blocks on the device as there can be")
        self._way = less
        self._keep(less.arrangement or usual)

    def _tighter(self, now: _Way) -> _Way | None:
        """Fewer weights, or parts. Inputs of blocks do not count: sampling keeps none."""
        residency = self._residency
        kept = replace(residency.arrangement, checkpointing=True, activations="host")
        less = tighter(kept, residency.block_bytes, self.training.method.can_stream, kept_by(self.training.job))
        return _Way(less, max(now.decoding, 1)) if less else None

    def _tell(self) -> None:
        training, residency = self.training, self._residency
        blocks = f"{len(residency.placement.resident)} of {len(residency.block_bytes)} blocks stay on the device"
        parts = f", all but attention runs in {residency.arrangement.chunks} parts" if residency.arrangement.chunks > 1 else ""
        message = f"the device was full: while previews are sampled {blocks}{parts}; training keeps them as before"
        training.run.event("sample", step=training.step, files=[], message=message)

    def _decode(self, decode: Callable[[int | None], Result]) -> Result:
        beside, side = self._decodings[self._way.decoding]
        if not beside:
            self.training.make_way()
            give_back(self.training.device)
        return decode(side)

    def _decode_with_less(self) -> None:
        less = self._shortages.less(self._way, self._next_decoding, self.training.step)
        if less is None:
            side = self.tile_pixels
            raise NoRoomError(
                f"not even without the transformer and in tiles of {side} pixels" if side else "not even without the transformer"
            )
        self._way = less
        give_back(self.training.device)

    def _next_decoding(self, now: _Way) -> _Way | None:
        following = now.decoding + 1
        return replace(now, decoding=following) if following < len(self._decodings) else None
