"""The settings of a training as inputs of a node, each with the field of the job that it fills.

The order is a promise: saved workflows hold values by their place. New settings come last.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from comfy_api.latest import io

from .machine_settings import machine, memory, speed
from .schema import Setting, folded


def settings() -> tuple[Setting, ...]:
    """Every setting, the main ones first."""
    groups = (_main, _length, _adapter, _optimizer, _noise, _keeping, machine, _start, _experts, _later, _conditions, memory, speed)
    return tuple(setting for group in groups for setting in group())


def job_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a job, as `trainers.job.parse_job` reads them, of the node's values."""
    job: dict[str, Any] = {}
    for setting in settings():
        value = values.get(setting.input.id, setting.input.default)
        *tables, name = setting.field.split(".")
        place = job
        for table in tables:
            place = place.setdefault(table, {})
        place[name] = None if value == setting.unset else value
    if (probability := job["conditions"]) is not None:
        job["conditions"] = [{"kind": "first_frame", "probability": probability}]
    if job["epochs"]:
        job["steps"] = None
    job["name"] = job["name"].strip()
    job["trigger_words"] = [word.strip() for word in job["trigger_words"].split(",") if word.strip()]
    return job


def _main() -> tuple[Setting, ...]:
    return (
        Setting(
            "name",
            io.String.Input(
                "name",
                default="my_lora",
                tooltip="Name of the run and of its files: output/loras/<name>/<name>-000500.safetensors. "
                "A name that another run has used gets a number: nothing is overwritten.",
            ),
        ),
        Setting(
            "trigger_words",
            io.String.Input(
                "trigger_words", default="", tooltip="Words that call the LoRA, with commas between. They are written into its file."
            ),
        ),
        Setting(
            "steps",
            io.Int.Input("steps", default=2000, min=1, max=1_000_000, tooltip="Optimizer steps. 1000 to 3000 is usual for 10 to 50 clips."),
        ),
        Setting(
            "lora.rank",
            io.Int.Input("rank", default=32, min=1, max=1024, tooltip="Size of the LoRA. 16 to 32 for a concept, 64 for a style."),
        ),
        Setting(
            "optimizer.learning_rate",
            io.Float.Input(
                "learning_rate",
                default=1e-4,
                min=1e-8,
                max=10.0,
                step=1e-5,
                round=1e-8,
                tooltip="Peak learning rate. 1e-4 suits AdamW; with Prodigy use 1.",
            ),
        ),
        Setting(
            "batch_size",
            io.Int.Input("batch_size", default=1, min=1, max=256, tooltip="Clips per forward pass. More need more memory on the card."),
        ),
        Setting(
            "checkpoints.every_steps",
            io.Int.Input(
                "save_every",
                default=250,
                min=1,
                max=1_000_000,
                tooltip="Steps between two LoRA files. Each is also a point from which an interrupted run goes on.",
            ),
        ),
        Setting(
            "seed",
            io.Int.Input("seed", default=0, min=0, max=2**53, control_after_generate=False, tooltip="The same seed, the same LoRA."),
        ),
    )


def _length() -> tuple[Setting, ...]:
    """How long, and in which portions."""
    return (
        folded(
            "epochs",
            io.Int,
            "epochs",
            default=0,
            min=0,
            max=100_000,
            tooltip="Passes over the data set instead of `steps`. 0: train `steps` steps.",
            unset=0,
        ),
        folded(
            "accumulation",
            io.Int,
            "accumulation",
            default=1,
            min=1,
            max=1024,
            tooltip="Forward passes per step: a larger batch without more memory, in more time.",
        ),
    )


def _adapter() -> tuple[Setting, ...]:
    """The shape of the LoRA."""
    return (
        folded(
            "lora.alpha",
            io.Float,
            "alpha",
            default=0.0,
            min=0.0,
            max=4096.0,
            step=1.0,
            tooltip="Strength of the LoRA is alpha / rank. 0: as the rank, strength 1.",
            unset=0,
        ),
        folded(
            "lora.targets",
            io.Combo,
            "targets",
            options=["attention+feed_forward", "attention"],
            default="attention+feed_forward",
            tooltip="Which layers learn. Attention alone gives smaller files that change less.",
        ),
        folded(
            "lora.dropout",
            io.Float,
            "lora_dropout",
            default=0.0,
            min=0.0,
            max=0.95,
            step=0.05,
            tooltip="Share of a layer's inputs that the LoRA does not see in a step. 0.1 can help with very few clips.",
        ),
    )


def _optimizer() -> tuple[Setting, ...]:
    """How its weights move."""
    return (
        folded(
            "optimizer.kind",
            io.Combo,
            "optimizer",
            options=["adamw", "adamw8bit", "prodigy"],
            default="adamw",
            tooltip="adamw8bit needs the package bitsandbytes and less memory; prodigy needs prodigyopt and finds the rate itself.",
        ),
        folded(
            "optimizer.schedule",
            io.Combo,
            "schedule",
            options=["constant", "linear", "cosine"],
            default="constant",
            tooltip="The learning rate after the warm-up: constant, or down to zero at the last step.",
        ),
        folded(
            "optimizer.warmup_steps",
            io.Int,
            "warmup_steps",
            default=0,
            min=0,
            max=100_000,
            tooltip="Steps in which the learning rate rises from zero.",
        ),
        folded(
            "optimizer.weight_decay",
            io.Float,
            "weight_decay",
            default=0.01,
            min=0.0,
            max=1.0,
            step=0.01,
            tooltip="Pull of the LoRA's weights towards zero.",
        ),
    )


def _noise() -> tuple[Setting, ...]:
    """What is drawn for each sample."""
    return (
        folded(
            "noise.distribution",
            io.Combo,
            "noise",
            options=["logit_normal", "uniform", "shift"],
            default="logit_normal",
            tooltip="Which noise levels are trained: the middle ones most, all alike, or moved by `noise_shift`. "
            "High levels decide motion and layout, low ones detail.",
        ),
        folded(
            "noise.shift",
            io.Float,
            "noise_shift",
            default=3.0,
            min=0.01,
            max=100.0,
            step=0.5,
            tooltip="For the noise `shift`: above 1 trains the high levels more.",
        ),
        folded(
            "caption_dropout",
            io.Float,
            "caption_dropout",
            default=0.1,
            min=0.0,
            max=1.0,
            step=0.05,
            tooltip="How often a clip is trained without its caption, which keeps guidance working.",
        ),
    )


def _keeping() -> tuple[Setting, ...]:
    """What is measured and kept on the way."""
    return (
        folded(
            "held_out.every_steps",
            io.Int,
            "held_out_every",
            default=100,
            min=0,
            max=1_000_000,
            tooltip="Steps between two measurements of the loss on the clips that the data set holds out. 0: never.",
        ),
        folded(
            "checkpoints.keep_last",
            io.Int,
            "keep_last",
            default=3,
            min=1,
            max=10_000,
            tooltip="How many checkpoints stay for going on. LoRA files are never deleted.",
        ),
    )


def _start() -> tuple[Setting, ...]:
    """Where it starts when not from nothing."""
    return (
        folded(
            "start.initial_lora",
            io.String,
            "initial_lora",
            default="",
            tooltip="A LoRA file to start from, as a LoRA loader lists it or as a full path. Its rank must be the same.",
            unset="",
        ),
        folded(
            "start.extends",
            io.String,
            "extends",
            default="",
            tooltip='Go on exactly where another run was, with its optimizer: "kitten@2000" for step 2000 of the run kitten. '
            "`steps` counts from the beginning of that run.",
            unset="",
        ),
    )


def _experts() -> tuple[Setting, ...]:
    """Models of two experts (Wan 2.2 A14B)."""
    return (
        folded(
            "experts.train",
            io.Combo,
            "experts",
            options=["both", "high", "low"],
            default="both",
            tooltip="Wan 2.2 A14B: which of its two experts learns. Both take turns and get a LoRA each. "
            "With one file in Base Model, choose the expert that it is.",
        ),
        folded(
            "experts.turn_steps",
            io.Int,
            "expert_turn_steps",
            default=20,
            min=1,
            max=100_000,
            tooltip="Wan 2.2 A14B: steps of one expert before the other has its turn. Changing over takes some seconds.",
        ),
        folded(
            "experts.overlap",
            io.Float,
            "expert_overlap",
            default=0.03,
            min=0.0,
            max=0.2,
            step=0.01,
            tooltip="Wan 2.2 A14B: how far each expert learns beyond the noise level where samplers switch.",
        ),
        folded(
            "experts.learning_rate_low",
            io.Float,
            "learning_rate_low_noise",
            default=0.0,
            min=0.0,
            max=10.0,
            step=1e-5,
            round=1e-8,
            unset=0.0,
            tooltip="Wan 2.2 A14B: peak learning rate of the low-noise expert. 0: that of the other.",
        ),
    )


def _later() -> tuple[Setting, ...]:
    """What came after the first release."""
    return (
        folded(
            "lora.dora",
            io.Boolean,
            "dora",
            default=False,
            tooltip="Also learn the length of each row of the weights (DoRA): closer to full training at the same rank, slower, and "
            "only over bf16 or fp16 models, not fp8.",
        ),
    )


def _conditions() -> tuple[Setting, ...]:
    """What is given besides text."""
    return (
        folded(
            "conditions",
            io.Float,
            "first_frame_probability",
            default=-1.0,
            min=-1.0,
            max=1.0,
            step=0.05,
            tooltip="How often a clip keeps its first frame, so that the LoRA learns to go on from an image. "
            "-1: as the model was trained. Text-to-video models cannot; image-to-video models always do.",
            unset=-1.0,
        ),
        folded(
            "guidance",
            io.Float,
            "guidance",
            default=0.0,
            min=0.0,
            max=100.0,
            step=0.5,
            tooltip="What a guidance-distilled model (Hunyuan) is told while training. 0: the model's own.",
            unset=0,
        ),
    )
