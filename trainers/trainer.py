"""The training of one run: set up, then a loop that fits one screen. No model's name stands here."""

from __future__ import annotations

import math
import time
from collections import Counter
from contextlib import closing, suppress
from typing import Any

import torch

from .device import allocator
from .errors import RunError
from .evaluate import HeldOut
from .flow import derived_seed
from .job import due
from .optimizers import learning_rate_factor, set_learning_rate
from .pace import Pace
from .predict import batch_loss
from .previews import Previews
from .room import AskedToEnd, go_back, is_out_of_memory, probe, with_room
from .run import Run
from .run_status import OUTCOMES, Outcome, Request
from .trackers import end_trackers, track
from .training import Learner, Training, check_saved, open_training, save_checkpoint

MOST_SKIPPED_STEPS = 20
"""In a row: twenty halvings take any loss scale below 1, where finite gradients cannot overflow any more."""


def train(run: Run) -> Outcome:
    """Trains `run` from its latest checkpoint (or from the beginning) to its last step, or until it is asked to stop.

    Writes metrics, checkpoints, LoRA files and previews as it goes. Raises VideoTrainerError for what a user can fix.
    """
    training = open_training(run)
    with closing(training):
        return _train(training)


def _train(training: Training) -> Outcome:
    run = training.run
    found = {"allocator": name} if (name := allocator(training.device)) else {}
    run.event("training", step=training.step, total_steps=training.total_steps, **found)
    if training.step < training.total_steps:
        with suppress(AskedToEnd):
            probe(training)
    previews, held_out, pace = Previews.of(training), held_out_clips(training), Pace()
    previews.write_if_due(training.step, training.step == training.total_steps)
    while training.step < training.total_steps:
        if (asked := training.asked_to_end()) and may_end(training, asked):
            return OUTCOMES[asked]
        resident_before = training.resident
        try:
            metrics = next_step(training)
        except AskedToEnd:
            continue
        if training.resident is resident_before:  # or the step's time is that of loading weights, too
            watch_pace(training, pace, metrics["seconds"])
        last = training.step == training.total_steps
        if due(training.step, run.job.held_out.every_steps, last):
            with suppress(AskedToEnd):
                metrics |= with_room(training, lambda: held_out.loss(training.transformer_at, training.device, training.dtype))
        report(training, metrics)
        if due(training.step, run.job.checkpoints.every_steps, last):
            save_checkpoint(training)
        previews.write_if_due(training.step, last)
    end_trackers(training)
    check_saved(training)
    return "done"


def may_end(training: Training, asked: Request) -> bool:
    """Whether the run can end as it is asked to: what it learned so far is saved. If not, it trains on instead of pausing.

    Raises RunError when it should stop.
    """
    run, step = training.run, training.step
    if step:
        save_checkpoint(training)
    if not step or step in run.checkpoints():
        return True
    good = run.latest_checkpoint() or 0
    if asked == "stop":
        raise RunError(
            f"The run stopped at step {step}, but {training.unsaved}. Free disk space, or close the program that holds the file, then "
            "resume "
            f"the run: it starts from step {good}."
        )
    training.cannot_pause = True
    message = (
        f"The run cannot pause yet: {training.unsaved}. It goes on and tries again at the next checkpoint, so that the steps since step "
        f"{good} are not lost. Free disk space; to end it at once, stop it."
    )
    run.event("warning", step=step, message=message)
    return False


def next_step(training: Training) -> dict[str, Any]:
    """Trains one more step; what it measured. Raises AskedToEnd when the run is to end while it waits for GPU memory: then the
    step is not counted.
    """
    training.step += 1
    try:
        go_back(training)
        return optimize(training)
    except AskedToEnd:
        training.step -= 1
        raise


def held_out_clips(training: Training) -> HeldOut:
    experts = [learner.expert for learner in training.learners]
    return HeldOut.of(training.job, training.family, training.variant, training.encoded, experts)


def optimize(training: Training) -> dict[str, Any]:
    """One optimizer step of the expert whose turn it is; what it measured.

    The host waits for the device once, for the measurements, when the whole step is queued (prodigy waits twice more for each of its
    parameters: see `build_optimizer`). Raises RunError for a step that was not finite; then the LoRA in memory is spoilt and must not be
    saved.
    """
    started, job = time.perf_counter(), training.job
    learner, turn = with_room(training, training.take_turn)
    learning_rate = learner.learning_rate * learning_rate_factor(job.optimizer, turn.step, turn.total_steps)
    set_learning_rate(learner.optimizer, learning_rate)
    loss_sum, sigma_sum = with_room(training, lambda: gradients(training, learner))
    loss, sigma, norm = update(training, learner, loss_sum, sigma_sum).tolist()
    check_finite(training, norm, loss)
    return {
        "epoch": training.samples.order.step(training.step)[-1].epoch,
        "loss": loss,
        "grad_norm": norm,
        "lr": learning_rate,
        "sigma": sigma,
        "seconds": time.perf_counter() - started,
        **({"expert": learner.expert.name, "expert_step": turn.step} if learner.expert.name else {}),
    }


def gradients(training: Training, learner: Learner) -> tuple[torch.Tensor, torch.Tensor]:
    """Accumulates the gradients of a step; the mean loss and noise level, on the device. Nothing else changes."""
    job, micro_steps = training.job, training.batches.of_step(training.step)
    loss_sum, sigma_sum = torch.zeros((), device=training.device), torch.zeros((), device=training.device)
    for share in micro_steps:
        torch.manual_seed(derived_seed(job.seed, "step", training.step, share.index))
        batch = training.batches.take(share)
        loss = batch_loss(training.family, training.variant, learner.transformer, batch)
        training.accelerator.backward(loss / len(micro_steps))
        loss_sum += loss.detach() / len(micro_steps)
        sigma_sum += batch.sigma_B.mean() / len(micro_steps)
    return loss_sum, sigma_sum


def update(training: Training, learner: Learner, *measured: torch.Tensor) -> torch.Tensor:
    """Moves the learner's parameters by their gradients, which are dropped; `measured` and the gradients' norm, on the device.

    Raises RunError when the device is full: some parameters may have moved, so this cannot be done again. The probe sees to
    it that there is room.
    """
    try:
        grad_norm: torch.Tensor = training.accelerator.clip_grad_norm_(
            learner.parameters, training.job.optimizer.max_grad_norm or float("inf")
        )
        found = torch.stack([*measured, grad_norm.float()])
        learner.optimizer.step()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise RunError(
            f"Out of GPU memory for the optimizer in step {training.step}. {training.run.what_is_kept()} Close other programs that use "
            "the GPU and resume the run, or train with a smaller memory.vram_gib or optimizer.kind adamw8bit."
        ) from error
    learner.optimizer.zero_grad(set_to_none=True)
    return found


def check_finite(training: Training, grad_norm: float, loss: float) -> None:
    """Raises RunError for a step that is not finite, and for a loss scaler that skipped MOST_SKIPPED_STEPS of them in a row.

    A loss scaler leaves out the update of a step whose gradients overflow, and scales the next one by half as much: some do while
    the scale settles. A loss is not scaled: when it is not finite, the model's output is not.
    """
    scaled = training.accelerator.scaler is not None
    training.skipped_steps = training.skipped_steps + 1 if scaled and not math.isfinite(grad_norm) else 0
    if not math.isfinite(loss) or not (scaled or math.isfinite(grad_norm)):
        problem = f"loss is {loss:g} and the gradient's norm {grad_norm:g} in step {training.step}; both must be finite."
    elif training.skipped_steps >= MOST_SKIPPED_STEPS:
        problem = (
            f"The gradients of the last {training.skipped_steps} steps (up to step {training.step}) overflowed in fp16, at any loss scale; "
            "nothing was learned from them."
        )
    else:
        return
    other = "" if training.dtype == torch.float32 else f", or set precision to {'bf16 or fp32' if scaled else 'fp32'}"
    raise RunError(f"{problem} {training.run.what_is_kept()} Lower optimizer.learning_rate{other}, and train again.")


def watch_pace(training: Training, pace: Pace, seconds: float) -> None:
    """Warns when the GPU has become slow. A kind of steps is one expert, one mix of sizes and one way to keep the weights."""
    learner, order = training.resident, training.samples.order
    if learner is None or training.device.type != "cuda":
        return
    sizes = Counter((order.buckets[batch.clips[0]], len(batch.clips)) for batch in order.step(training.step))
    if warning := pace.add((learner.expert.name, frozenset(sizes.items()), learner.residency.arrangement), seconds):
        training.run.event("warning", step=training.step, message=warning)


def report(training: Training, metrics: dict[str, Any]) -> None:
    """Writes a step's measurements to the run's folder and to the trackers."""
    if training.device.type == "cuda":
        metrics["vram_gib"] = torch.cuda.max_memory_reserved(training.device) / 2**30
    training.run.metrics(step=training.step, **metrics)
    numbers = {name: value for name, value in metrics.items() if isinstance(value, int | float)}
    track(training, numbers)
