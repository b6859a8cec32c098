"""Training steps to compare: the trainer's own, and a plain loop around diffusers' class and peft, each a `Loop`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from full_size_files import FullSize
from gauges import synchronize

from trainers.batches import Samples
from trainers.checkpoint import Checkpoint
from trainers.data.encoded import Encoded
from trainers.device import Hardware, pick_device, pick_precision
from trainers.job import Job, parse_job
from trainers.load import load_transformer
from trainers.offload.arrangement import Arrangement
from trainers.predict import batch_loss
from trainers.room import probe
from trainers.run import Run
from trainers.trainer import optimize, report
from trainers.training import Training, open_training


@dataclass(frozen=True)
class Loop:
    """`step()` is one optimizer step. `training` is there when it is the trainer's."""

    step: Callable[[], object]
    device: torch.device
    training: Training | None = None

    def close(self) -> None:
        if self.training:
            self.training.close()

    def counters(self) -> dict[str, int]:
        """Bytes copied so far, and host memory that copying needs, as the trainer counts them."""
        residency = self.training.resident.residency if self.training and self.training.resident else None
        stream, arena = (residency.stream, residency.arena) if residency else (None, None)
        return {
            "weights_to_device": stream.bytes_to_device if stream else 0,
            "activations_to_device": arena.bytes_to_device if arena else 0,
            "activations_to_host": arena.bytes_to_host if arena else 0,
            "weights_host_bytes": stream.private_bytes if stream else 0,
            "activations_host_bytes": arena.private_bytes if arena else 0,
        }


def job_of(folder: Path, name: str, model: FullSize, path: Path, clips: Path, device: str, **fields: Any) -> Job:
    """A job of a LoRA of rank 32 on all Linears of the blocks, with nothing but training; `fields` are the job's own."""
    values: dict[str, Any] = {
        "name": name,
        "base": {"transformer": str(path), "variant": model.variant.id},
        "encoded": str(clips),
        "runs_folder": str(folder / "runs"),
        "loras_folder": str(folder / "loras"),
        "device": device,
        "steps": 1_000_000,
        "held_out": {"every_steps": 0},
        "tensorboard": False,
        "lora": {"rank": 2 if model.tiny else 32},
    }
    return parse_job(values | fields)


def trainer_loop(job: Job, arrangement: Mapping[str, Any] | None = None) -> Loop:
    """The trainer's loop without checkpoints and previews, the probe included. `arrangement`: not as the plan says, but so."""
    training = open_training(Run.create(job))
    if arrangement is None:
        probe(training)
    else:
        training.rearrange(arranged(arrangement, training.learners[0].residency.block_bytes))

    def step() -> None:
        training.step += 1
        report(training, optimize(training))

    return Loop(step, training.device, training)


def arranged(values: Mapping[str, Any], block_bytes: list[int]) -> Arrangement:
    """An arrangement of values as they stand in a case: `weights_share` is the part of the blocks' bytes that may lie on the device."""
    values = dict(values)
    if (share := values.pop("weights_share", None)) is not None:
        values["weights_bytes"] = int(share * sum(block_bytes))
    if (gib := values.pop("weights_gib", None)) is not None:
        values["weights_bytes"] = int(gib * 2**30)
    return Arrangement(**values)


def plain_loop(job: Job, model: FullSize, adapter: str = "bfloat16") -> Loop:
    """The model as diffusers has it, all on the device, peft's LoRA, diffusers' checkpointing: what one would write by hand.

    `adapter` "float32": LoRA weights in float32 under autocast, as diffusers' training scripts have them; else in that dtype
    without autocast, which is quicker and trains worse.
    """
    device = pick_device(job)
    steps = _plain_steps(job, model, device, pick_precision(job, model.family, Hardware.of(device)).dtype, adapter)
    return Loop(lambda: next(steps), device)


def _plain_steps(job: Job, model: FullSize, device: torch.device, dtype: torch.dtype, adapter: str) -> Iterator[None]:
    from peft import LoraConfig

    checkpoint = Checkpoint.open(job.base.transformer)
    transformer: Any = load_transformer(checkpoint, model.detection(checkpoint.path), device, dtype, keep_stored=False)
    targets = "|".join((*model.family.targets.attention, *model.family.targets.feed_forward))
    transformer.add_adapter(LoraConfig(r=job.lora.rank, lora_alpha=job.lora.rank, target_modules=targets))
    parameters = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.data = parameter.data.to(device, torch.float32 if dtype == torch.float32 else getattr(torch, adapter))
    transformer.enable_gradient_checkpointing()
    transformer.train()
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    samples = Samples.of(job, model.family, model.variant, Encoded.open(job.encoded), device, dtype)
    batch = samples.batch(1, samples.order.step(1)[0]).to(device)
    autocast = torch.autocast(device.type, dtype, enabled=adapter == "float32" and dtype != torch.float32)
    while True:
        with autocast:
            batch_loss(model.family, model.variant, transformer, batch).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        yield


def timed(loop: Loop, count: int, clock: Callable[[], float]) -> list[float]:
    """Seconds of each of `count` steps. On a card by its own events, without waiting between the steps."""
    if loop.device.type != "cuda":
        times = []
        for _ in range(count):
            started = clock()
            loop.step()
            times.append(clock() - started)
        return times
    synchronize(loop.device)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    events[0].record()
    for event in events[1:]:
        loop.step()
        event.record()
    synchronize(loop.device)
    return [before.elapsed_time(after) / 1000 for before, after in pairwise(events)]
