"""The batches of a run, each built in a thread while the device works on the one before it.

A batch is a function of (job, data, step), so it is the same whoever builds it and when. What is asked for out of turn (the
first step, one that is tried again) is built at once.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from .batches import Batch, Samples
from .data.order import MicroBatch
from .offload.copies import use_device


@dataclass(frozen=True)
class MicroStep:
    """One forward pass; `index` counts those of `step`."""

    step: int
    index: int
    micro: MicroBatch


class Batches:
    """The batches of a run, on its device. To be closed, which ends the thread."""

    def __init__(self, samples: Samples, sigmas_at: Callable[[int], tuple[float, float]]) -> None:
        """`sigmas_at` says between which noise levels a step trains."""
        self._samples, self._sigmas_at = samples, sigmas_at
        self._thread = ThreadPoolExecutor(1, "batches", initializer=use_device, initargs=(samples.device,))
        self._ahead: tuple[MicroStep, Future[Batch]] | None = None

    def of_step(self, step: int) -> list[MicroStep]:
        """The forward passes of a step, in order."""
        return [MicroStep(step, index, micro) for index, micro in enumerate(self._samples.order.step(step))]

    def take(self, wanted: MicroStep) -> Batch:
        """The batch, on the device; from now on the next one is built. Raises what its building raised."""
        ahead, self._ahead = self._ahead, None
        batch = ahead[1].result() if ahead and ahead[0] == wanted else self._build(wanted)
        if following := self._after(wanted):
            self._ahead = following, self._thread.submit(self._build, following)
        return batch.to(self._samples.device)

    def close(self) -> None:
        """Ends the thread; a batch that is being built is dropped."""
        self._ahead = None
        self._thread.shutdown(cancel_futures=True)

    def _build(self, wanted: MicroStep) -> Batch:
        return self._samples.batch(wanted.step, wanted.micro, self._sigmas_at(wanted.step))

    def _after(self, last: MicroStep) -> MicroStep | None:
        """The forward pass after `last`; None at the end of the run."""
        for following in self.of_step(last.step):
            if following.index > last.index:
                return following
        return self.of_step(last.step + 1)[0] if last.step < self._samples.total_steps else None
