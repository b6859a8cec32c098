"""A plan of memory in words, and as plain values."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .machine import GIB, Machine, size_text
from .memory_plan import MemoryPlan


def report(plan: MemoryPlan, run_seconds: float) -> list[str]:
    """What the plan takes and how long the whole run is, then what was chosen and why."""
    price, machine = plan.price, plan.machine
    trained = "all weights" if plan.job.method == "full" else "LoRA"
    return [
        f"{size_text(price.device_bytes)} of {_where(plan)} at the most: weights {size_text(price.weights_bytes)}, "
        f"{trained} and optimizer {size_text(price.trained_bytes)}, the largest step {size_text(price.step_bytes)}; "
        f"{size_text(price.reserve_bytes)} more must be free, {size_text(machine.free_bytes)} may be taken",
        f"{size_text(price.host_bytes)} of the machine's memory; {size_text(machine.ram_bytes)} may be taken",
        f"{seconds(price.step_seconds)} a step of the largest clips, about {seconds(run_seconds)} for the whole run ({_rates(machine)})",
        *reasons(plan),
    ]


def _rates(machine: Machine) -> str:
    """The rates that the times rest on, the measured ones first."""
    words = {
        "flops": f"{machine.flops_rate / 1e12:.3g} TFLOPS",
        "copy": f"{machine.copy_rate / 1e9:.3g} GB/s to it",
        "disk": f"{machine.disk_rate / 1e9:.3g} GB/s from the drive",
        "host_copy": f"{machine.host_copy_rate / 1e9:.3g} GB/s from a file in memory",
    }
    measured = ", ".join(text for name, text in words.items() if name in machine.measured)
    assumed = ", ".join(text for name, text in words.items() if name not in machine.measured)
    return "; ".join(f"{how}: {which}" for how, which in (("measured", measured), ("assumed", assumed)) if which)


def summary(plan: MemoryPlan) -> str:
    """What the plan takes of the device, and what was chosen and why, to follow a colon."""
    return f"at the most {size_text(plan.price.device_bytes)} of {_where(plan)}. {' '.join(reasons(plan))}"


def _where(plan: MemoryPlan) -> str:
    return plan.machine.name if plan.machine.device == "cpu" else f"{plan.machine.name} ({plan.machine.total_bytes / GIB:.3g} GiB)"


def reasons(plan: MemoryPlan) -> list[str]:
    """What was chosen and why, a sentence for each; the last one is of previews."""
    price, chosen = plan.price, plan.arrangement
    placement, blocks = price.placement, len(plan.model.blocks)
    if placement.streamed:
        waiting = size_text(sum(plan.model.blocks[index] for index in placement.streamed))
        waits = "from pinned memory" if price.pinned_blocks else "from the mapped file"
        if 0 < price.pinned_blocks < len(placement.streamed):
            waits = f"from pinned memory ({price.pinned_blocks} blocks, no more may be pinned) and from the mapped file"
        text = f"{len(placement.streamed)} of {blocks} blocks ({waiting}) are streamed {waits}"
        found = [f"{text}, {_told(plan, 'stream', 'always') or 'because the step needs the rest of the GPU'}; {_hidden(plan)}."]
    else:
        found = [f"All weights stay on the device, {_told(plan, 'stream', 'never') or _whether_they_fit(plan)}."]
    if chosen.activations == "host":
        found.append(
            f"The inputs of blocks wait in pinned memory, {_told(plan, 'activations', 'host') or 'which leaves room on the card'}."
        )
    if chosen.chunks > 1:
        why = _told(plan, "chunks", chosen.chunks) or "which costs some time and leaves room"
        found.append(f"All of a block but attention is computed in {chosen.chunks} parts, {why}.")
    if not chosen.checkpointing:
        found.append("Nothing is computed twice, because the job says gradient_checkpointing = false.")
    return [*found, *_more_than_free(plan), *([str(plan.previews)] if plan.previews else [])]


def _whether_they_fit(plan: MemoryPlan) -> str:
    return "because they fit" if plan.fits else "although that does not fit"


def _told(plan: MemoryPlan, field: str, chosen: str | int) -> str | None:
    """That the job says so; None where it says nothing, or not what was chosen."""
    value = getattr(plan.job.memory, field)
    return f"because the job says memory.{field} = {value!r}" if value == chosen else None


def _more_than_free(plan: MemoryPlan) -> Iterator[str]:
    """Limits of the job that are above what is free, which counts then."""
    memory, machine = plan.job.memory, plan.machine
    limits = (("vram_gib", memory.vram_gib, machine.free_bytes), ("ram_gib", memory.ram_gib, machine.ram_bytes))
    for field, limit_gib, free_bytes in limits:
        if limit_gib is not None and limit_gib * GIB >= free_bytes + 1:
            yield f"The job says memory.{field} = {limit_gib:g}, but only {size_text(free_bytes)} are free, which counts."


def _hidden(plan: MemoryPlan) -> str:
    price = plan.price
    copies, computing = seconds(price.copy_seconds), seconds(price.compute_seconds)
    if price.step_seconds <= 1.02 * price.unhindered_seconds:
        return f"their copies ({copies}) hide behind the computing ({computing})"
    lost = price.step_seconds / price.unhindered_seconds - 1
    return f"copies ({copies}) are not hidden by the computing ({computing}), a step takes {lost:.0%} longer"


def seconds(value: float) -> str:
    """A time as people say it."""
    if value < 120:
        return f"{value:.2g} s" if value < 10 else f"{value:.0f} s"
    return f"{value / 60:.0f} minutes" if value < 7200 else f"{value / 3600:.1f} hours"


def as_values(plan: MemoryPlan, run_seconds: float) -> dict[str, Any]:
    """The same as plain values: bytes and seconds."""
    price, machine, chosen = plan.price, plan.machine, plan.arrangement
    return {
        "fits": plan.fits,
        "machine": {
            "name": machine.name,
            "measured": bool(machine.measured),
            "measured_rates": sorted(machine.measured),
            "free_bytes": machine.free_bytes,
            "ram_bytes": machine.ram_bytes,
            "flops_per_second": machine.flops_rate,
            "copy_bytes_per_second": machine.copy_rate,
            "host_copy_bytes_per_second": machine.host_copy_rate,
            "disk_bytes_per_second": machine.disk_rate,
        },
        "device_bytes": price.device_bytes,
        "reserve_bytes": price.reserve_bytes,
        "weights_bytes": price.weights_bytes,
        "trained_bytes": price.trained_bytes,
        "step_bytes": price.step_bytes,
        "host_bytes": price.host_bytes,
        "compute_seconds": price.compute_seconds,
        "copy_seconds": price.copy_seconds,
        "step_seconds": price.step_seconds,
        "run_seconds": run_seconds,
        "streamed_blocks": len(price.placement.streamed),
        "blocks": len(plan.model.blocks),
        "slots": price.placement.slots,
        "slot_bytes": price.placement.slot_bytes,
        "host": chosen.host,
        "pinned_blocks": price.pinned_blocks,
        "activations": chosen.activations,
        "checkpointing": chosen.checkpointing,
        "chunks": chosen.chunks,
        "previews": plan.previews.as_values() if plan.previews else None,
        "reasons": reasons(plan),
    }
