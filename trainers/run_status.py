"""What a run is doing, inferred from its files: a run that crashed cannot say so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

State = Literal["new", "queued", "training", "paused", "stopped", "failed", "interrupted", "done"]
Request = Literal["stop", "pause"]
Outcome = Literal["done", "stopped", "paused"]
OUTCOMES: Mapping[Request, Outcome] = {"stop": "stopped", "pause": "paused"}
"""How a worker ends that was asked to: a paused run frees the card, and goes on from its checkpoint."""

_STATE_OF_EVENT: Mapping[str, State] = {
    "queued": "queued",
    "training": "training",
    "resumed": "training",
    "paused": "paused",
    "stopped": "stopped",
    "failed": "failed",
    "done": "done",
}
_ENDED = frozenset[State]({"new", "paused", "stopped", "failed", "done"})
_STARTS = ("queued", "training", "resumed")
_AVERAGED_STEPS = 20
_ODD_STEP = 10.0
_CLOCK_SECONDS = 0.1  # times of files are coarser than those of events


@dataclass(frozen=True)
class RunStatus:
    """One look at a run.

    `live`: a worker holds the run. `loss` and `seconds_per_step` are means of the last 20 steps, None before the
    first; a live run's pace is None too until it has taken a step since it was last started, and steps of ten times
    the usual (in which blocks are compiled) do not count in it. `message` is what the last event of a state said
    (the error of a failed run), `memory` what the last event about memory said: what was chosen, or what ran out.
    `warning` is the last one since the run was started or saved a checkpoint: what a user should look at while it trains.
    `request` is what the run was asked to do and has not done yet.
    """

    name: str
    state: State
    live: bool
    step: int
    total_steps: int | None
    loss: float | None
    seconds_per_step: float | None
    message: str
    memory: str
    warning: str
    request: Request | None

    @property
    def eta_seconds(self) -> float | None:
        """Seconds of training left, pauses not counted; None when that is not known yet."""
        if self.total_steps is None or self.seconds_per_step is None:
            return None
        return max(self.total_steps - self.step, 0) * self.seconds_per_step

    @property
    def ended(self) -> bool:
        """Whether nothing more will happen unless someone starts the run again."""
        return not self.live and self.state != "new"


def last_state(events: Sequence[Mapping[str, Any]]) -> tuple[State, Mapping[str, Any]]:
    """The state that the last telling event left the run in, and that event ("new" and {} when there is none)."""
    for event in reversed(events):
        state = _STATE_OF_EVENT.get(str(event.get("event")))
        if state:
            return state, event
    return "new", {}


def infer_state(events: Sequence[Mapping[str, Any]], live: bool) -> State:
    """The state, given whether a worker lives: without one, a run that had not ended was interrupted."""
    state, _ = last_state(events)
    return state if live or state in _ENDED else "interrupted"


def make_status(
    name: str,
    events: Sequence[Mapping[str, Any]],
    recent_metrics: Sequence[Mapping[str, Any]],
    live: bool,
    request: Request | None,
    planned_steps: int | None,
    measured: float | None = None,
) -> RunStatus:
    """A status from the run's events and the last lines of its metrics, in the order they were written.

    `measured` is when the last step was written, in seconds since 1970; None when that is not known.
    """
    _, event = last_state(events)
    starting = live and measured is not None and measured < _started(events) - _CLOCK_SECONDS
    totals = [event["total_steps"] for event in events if event.get("total_steps") is not None]
    steps = [line["step"] for line in recent_metrics if "step" in line]
    return RunStatus(
        name=name,
        state=infer_state(events, live),
        live=live,
        step=int(steps[-1]) if steps else 0,
        total_steps=int(totals[-1]) if totals else planned_steps,
        loss=_mean_of(recent_metrics, "loss"),
        seconds_per_step=None if starting else _pace(recent_metrics),
        message=str(event.get("message", "")),
        memory=_last_message(events, "memory"),
        warning=_last_message(_since(events, ("queued", "checkpoint")), "warning"),
        request=request,
    )


def mean_measures(by_file: Mapping[str, Mapping[str, float | None]]) -> dict[str, float]:
    """Each measure, mean over the files that have it."""
    names = dict.fromkeys(name for measures in by_file.values() for name in measures)
    found = {name: [value for measures in by_file.values() if (value := measures.get(name)) is not None] for name in names}
    return {name: sum(values) / len(values) for name, values in found.items() if values}


def last_measures(events: Sequence[Mapping[str, Any]]) -> dict[str, float] | None:
    """What the newest measured previews measure (see `video_measures`), mean over them, with their "step"; None without any."""
    for event in reversed(events):
        if event.get("event") == "sample" and event.get("measures"):
            return {"step": event["step"], **mean_measures(event["measures"])}
    return None


def _started(events: Sequence[Mapping[str, Any]]) -> float:
    """When the run was last started, in seconds since 1970; 0 when no event tells."""
    return max((float(event.get("time", 0)) for event in events if event.get("event") in _STARTS), default=0.0)


def _since(events: Sequence[Mapping[str, Any]], names: tuple[str, ...]) -> Sequence[Mapping[str, Any]]:
    """The events after the last one of these names; all when there is none."""
    last = next((index for index in range(len(events) - 1, -1, -1) if events[index].get("event") in names), -1)
    return events[last + 1 :]


def _last_message(events: Sequence[Mapping[str, Any]], name: str) -> str:
    """What the last event of that name said; "" when there is none."""
    return next((str(event.get("message", "")) for event in reversed(events) if event.get("event") == name), "")


def _pace(lines: Sequence[Mapping[str, Any]]) -> float | None:
    values = _last_values(lines, "seconds")
    usual = [value for value in values if value <= _ODD_STEP * median(values)]
    return sum(usual) / len(usual) if usual else None


def _mean_of(lines: Sequence[Mapping[str, Any]], field: str) -> float | None:
    values = _last_values(lines, field)
    return sum(values) / len(values) if values else None


def _last_values(lines: Sequence[Mapping[str, Any]], field: str) -> list[float]:
    return [float(line[field]) for line in lines if line.get(field) is not None][-_AVERAGED_STEPS:]
