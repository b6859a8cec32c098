"""Runs in the folder of a server, made with the pack's own writer: ended ones, and live ones whose steps a test decides."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from comfy_server import Server

from trainers.job import parse_job
from trainers.run import Run


def runs_folder(server: Server) -> Path:
    return server.base_directory / "user" / "__video_trainer" / "runs"


def new_run(server: Server, name: str, total_steps: int = 100) -> Run:
    """A run that nothing has happened to yet; its LoRAs lie where ComfyUI lists them."""
    values = {"name": name, "base": {"transformer": "wan.safetensors"}, "encoded": "encoded", "steps": total_steps}
    values |= {"runs_folder": str(runs_folder(server)), "loras_folder": str(server.base_directory / "output" / "loras")}
    return Run.create(parse_job(values))


def ended_run(server: Server, name: str, event: str | None, steps: int = 40, **fields: Any) -> Run:
    """A run that ended with `event` after `steps` of 100 steps; None: without a word, as a killed one."""
    run = new_run(server, name)
    run.event("queued")
    run.event("training", step=0, total_steps=100)
    add_steps(run, 1, steps)
    if event:
        run.event(event, **fields)
    return run


@contextmanager
def live_run(server: Server, name: str, steps: int = 0) -> Iterator[Run]:
    """A run that this process holds as its worker would."""
    run = new_run(server, name)
    with run.lock():
        run.event("queued")
        run.event("training", step=0, total_steps=100)
        add_steps(run, 1, steps)
        yield run


def add_steps(run: Run, first: int, last: int) -> None:
    for step in range(first, last + 1):
        run.metrics(step=step, epoch=0, loss=1.0 / step, lr=1e-4, seconds=2.0)


def write_lora(run: Run, step: int) -> str:
    """A LoRA file as a checkpoint leaves it, and its event. Returns its name in ComfyUI's lists."""
    name = f"{run.name}-{step:06d}.safetensors"
    path = Path(run.job.loras_folder) / run.name / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\2\0\0\0\0\0\0\0{}")
    run.event("checkpoint", step=step, lora=name)
    return f"{run.name}/{name}"
