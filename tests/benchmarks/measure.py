"""Measures one case in this process; what it finds is plain values for JSON."""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from cases import Case, Size
from full_size_files import FullSize, full_size, tiny_size, write_clips
from gauges import GIB, cap_card, card_memory, host_memory, profile, synchronize
from loops import Loop, job_of, plain_loop, timed, trainer_loop

from trainers.job import Job


def measure(case: Case, device: torch.device, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """What a case asks for. Raises what goes wrong."""
    model = full_size(case.model, options.tiny)
    started = time.perf_counter()
    path = model.write(folder, case.dtype)
    size = tiny_size(model.family, model.variant) if options.tiny else case.size
    found = {"size": list(size), "tokens": model.family.latent(model.variant).tokens(*size), "file_seconds": time.perf_counter() - started}
    if case.kind == "peer":
        from peers import run_peer

        return found | run_peer(case, path, size, folder, dict(peer.split("=", 1) for peer in options.peer))
    clips = write_clips(folder / "clips", model, path, [size, *_sizes(case, size, options)] if case.sizes else [size] * 4)
    job = job_of(folder, "case", model, path, clips, str(device), **_fields(case, options))
    cap_card(device, case.cap_gib)
    if case.kind == "sizes":
        return found | _sizes_in_turn(case, job, device, options)
    return found | (_trained(case, job, device, options) if case.kind == "train" else _compared(case, job, model, device, options))


def _fields(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """The job's fields: what is under a cap says so, and what has an arrangement of its own can stream."""
    memory: dict[str, Any] = {}
    if case.cap_gib is not None:
        memory["vram_gib"] = case.cap_gib
    if case.arrangement:
        memory["stream"] = "always"
    return {"memory": memory, **case.job}


def _sizes(case: Case, smallest: Size, options: argparse.Namespace) -> list[Size]:
    """Tiny: each one step wider than the one before, as the smallest is wider than high by one."""
    frames, height, width = smallest
    return (
        [(frames, height, width + (width - height) * more) for more in range(1, len(case.sizes) + 1)] if options.tiny else list(case.sizes)
    )


def _arrangement(case: Case, options: argparse.Namespace) -> dict[str, Any] | None:
    """None: what the plan says."""
    values = None if case.arrangement is None else dict(case.arrangement)
    if options.tiny and values and values.pop("weights_share", None) is not None:
        values["weights_share"] = 0.6
    return values


def _trained(case: Case, job: Job, device: torch.device, options: argparse.Namespace) -> dict[str, Any]:
    """The trainer alone."""
    before = host_memory()
    started = time.perf_counter()
    loop = trainer_loop(job, _arrangement(case, options))
    opened_seconds = time.perf_counter() - started
    warm_up = timed(loop, case.warm_up, time.perf_counter)
    counted, steps = loop.counters(), 1 if options.tiny else case.steps
    each = timed(loop, steps, time.perf_counter)
    copied = {
        name: (value - counted[name]) / steps for name, value in loop.counters().items() if name.endswith("device") or "to_host" in name
    }
    host = host_memory()
    found = {
        "step_seconds": statistics.median(each),
        "step_seconds_each": each,
        "opened_seconds": opened_seconds,
        "warm_up_seconds": warm_up,
        "card": card_memory(device),
        "bytes_of_a_step": copied,
        "host": {name: value - before.get(name, 0) for name, value in host.items()},
        "pinned_bytes": {name: value for name, value in loop.counters().items() if name.endswith("host_bytes")},
        **_kept(loop),
        "met": None if case.target is None or device.type == "cpu" else card_memory(device)["peak_reserved_gib"] <= case.target,
    }
    found["profile"] = _profiled(loop, device)
    loop.close()
    return found


def _profiled(loop: Loop, device: torch.device) -> dict[str, Any]:
    """One step under the profiler; weights copied back to the host are what the card sent and the trainer did not count as inputs."""
    before = loop.counters()
    try:
        seen = profile(loop.step, device)
    except Exception as error:  # a profiler that fails must not cost the measurement
        return {"error": f"{type(error).__name__}: {error}"[:300]}
    if seen:
        sent = loop.counters()["activations_to_host"] - before["activations_to_host"]
        seen["host_bytes_beside_activations"] = seen["copied_bytes"]["DtoH"] - sent
    return seen


def _kept(loop: Loop) -> dict[str, Any]:
    """How the trainer keeps the model, and what its plan foretold, if it made one."""
    assert loop.training is not None
    assert loop.training.resident is not None
    residency = loop.training.resident.residency
    placement = residency.placement
    streamed = sum(residency.block_bytes[index] for index in placement.streamed)
    found: dict[str, Any] = {
        "arrangement": asdict(residency.arrangement),
        "streamed_share": streamed / max(sum(residency.block_bytes), 1),
        "streamed_bytes": streamed,
        "slots": placement.slots,
    }
    if loop.training.plan is not None:
        price = loop.training.plan.price
        found["predicted"] = {
            "arrangement": asdict(price.arrangement),
            "allocated_gib": price.device_bytes / GIB,
            "reserved_gib": (price.device_bytes + price.reserve_bytes) / GIB,
            "host_gib": price.host_bytes / GIB,
            "step_seconds": price.step_seconds,
        }
    return found


def _sizes_in_turn(case: Case, job: Job, device: torch.device, options: argparse.Namespace) -> dict[str, Any]:
    """Two epochs, which show every size once each: what a kernel that plans for each new shape costs.

    The very first step does what is done once, for any size: its size is left out.
    """
    loop = trainer_loop(job, _arrangement(case, options))
    assert loop.training is not None
    samples = loop.training.samples
    count = len(samples.items)
    shown = [samples.items[samples.order.step(step)[0].clips[0]] for step in range(1, 2 * count + 1)]
    seconds: dict[Size, list[float]] = {}
    for item, taken in zip(shown, timed(loop, 2 * count, time.perf_counter), strict=True):
        seconds.setdefault((item.num_frames, item.height, item.width), []).append(taken)
    del seconds[next(iter(seconds))]
    first, second = ([each[index] for each in seconds.values()] for index in (0, 1))
    found = {
        "step_seconds": statistics.median(second),
        "first_step_seconds_each": first,
        "second_step_seconds_each": second,
        "sizes": [list(size) for size in seconds],
        "ratio_median": statistics.median(one / other for one, other in zip(first, second, strict=True)),
        "card": card_memory(device),
    }
    loop.close()
    return found


def _compared(case: Case, job: Job, model: FullSize, device: torch.device, options: argparse.Namespace) -> dict[str, Any]:
    """The trainer and the plain loop in turn, the first of each round changing; the ratio of each round."""
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    ours, plain = trainer_loop(job, _arrangement(case, options)), plain_loop(job, model, case.plain)
    for loop in (ours, plain):
        timed(loop, case.warm_up, clock)
    counted, rounds = ours.counters(), 1 if options.tiny else case.steps
    times: dict[str, list[float]] = {"ours": [], "plain": []}
    for index in range(rounds):
        order = (("ours", ours), ("plain", plain))
        for name, loop in order if index % 2 else reversed(order):
            gc.collect()
            times[name] += timed(loop, 2 if device.type == "cuda" else 1, clock)[-1:]
    synchronize(device)
    ratios = [mine / other for mine, other in zip(times["ours"], times["plain"], strict=True)]
    count = rounds * (2 if device.type == "cuda" else 1)
    ratio = statistics.median(ratios)
    found = {
        "step_seconds": statistics.median(times["ours"]),
        "plain_step_seconds": statistics.median(times["plain"]),
        "ratio_median": ratio,
        "ratio_each": ratios,
        "plain_adapter": case.plain,
        "weights_to_device_per_step": (ours.counters()["weights_to_device"] - counted["weights_to_device"]) / count,
        "card": card_memory(device),
        **_kept(ours),
        "profile": _profiled(ours, device),
        "met": None if case.target is None or device.type == "cpu" else ratio <= case.target,
    }
    ours.close()
    return found
