"""The settings of a training as inputs of a node, each with the field of the job that it fills.

The order is a promise: saved workflows hold values by their place. New settings come last.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from comfy_api.latest import io

from .schema import ADVANCED


@dataclass(frozen=True)
class Setting:
    """An input and the job's field ("lora.rank") of its value. The value `unset` stands for None."""

    field: str
    input: Any
    unset: Any = None


def settings() -> tuple[Setting, ...]:
    """Every setting, the main ones first."""
    return (*_main(), *_advanced())


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


def _advanced() -> tuple[Setting, ...]:
    return (
        Setting(
            "epochs",
            io.Int.Input(
                "epochs",
                default=0,
                min=0,
                max=100_000,
                optional=True,
                extra_dict=ADVANCED,
                tooltip="Passes over the data set instead of `steps`. 0: train `steps` steps.",
            ),
            unset=0,
        ),
        Setting(
            "accumulation",
            io.Int.Input(
                "accumulation",
                default=1,
                min=1,
                max=1024,
                optional=True,
                extra_dict=ADVANCED,
                tooltip="Forward passes per step: a larger batch without more memory, in more time.",
            ),
        ),
        Setting(
            "lora.alpha",
            io.Float.Input(
                "alpha",
                default=0.0,
                min=0.0,
                max=4096.0,
                step=1.0,
                optional=True,
                extra_dict=ADVANCED,
                tooltip="Strength of the LoRA is alpha / rank. 0: as the rank, strength 1.",
            ),
            unset=0,
        ),
        Setting(
            "lora.targets",
            io.Combo.Input(
                "targets",
                ["attention+feed_forward", "attention"],
                default="attention+feed_forward",
                optional=True,
                extra_dict=ADVANCED,
                tooltip="Which layers learn. Attention alone gives smaller files that change less.",
            ),
        ),
        Setting(
            "lora.dropout",
            io.Float.Input(
                "lora_dropout",
                default=0.0,
                min=0.0,
                max=0.95,
                step=0.05,
                optional=True,
                extra_dict=ADVANCED,
                tooltip="Share of a layer's inputs that the LoRA does not see in a step. 0.1 can help with very few clips.",
            ),
        ),
        Setting(
            "optimizer.kind",
            io.Combo.Input(
                "optimizer",
                ["adamw", "adamw8bit", "prodigy"],
                default="adamw",
                optional=True,
                extra_dict=ADVANCED,
                tooltip="adamw8bit needs the package bitsandbytes and less memory; prodigy needs prodigyopt and finds the rate itself.",
            ),
        ),
        Setting(
            "optimizer.schedule",
            io.Combo.Input(
                "schedule",
                ["constant", "linear", "cosine"],
                default="constant",
                optional=True,
                extra_dict=ADVANCED,
                tooltip="The learning rate after the warm-up: constant, or down to zero at the last step.",
            ),
        ),
        Setting(
            "optimizer.warmup_steps",
            io.Int.Input(
                "warmup_steps",
                default=0,
                min=0,
                max=100_000,
                optional=True,
                extra_dict=ADVANCED,
                tooltip="Steps in which the learning rate rises from zero.",
            ),
        ),
        Setting(
            "optimizer.weight_decay",
            io.Float.Input(
                "weight_decay",
                default=0.01,
                min=0.0,
                max=1.0,
                step=0.01,
                optional=True,
                extra_dict=ADVANCED,
                tooltip="Pull of the LoRA's weights towards zero.",
            ),
        ),
        Setting(
            "noise.distribution",
            io.Combo.Input(
                "noise",
                ["logit_normal", "uniform", "shift"],
                default="logit_normal",
                optional=True,
                extra_dict=ADVANCED,
                tooltip="Which noise levels are trained: the middle ones most, all alike, or moved by `noise_shift`. "
                "High levels decide motion and layout, low ones detail.",
            ),
        ),
        Setting(
            "noise.shift",
            io.Float.Input(
                "noise_shift",
                default=3.0,
                min=0.01,
                max=100.0,
                step=0.5,
                optional=True,
                extra_dict=ADVANCED,
                tooltip="For the noise `shift`: above 1 trains the high levels more.",
            ),
        ),
        Setting(
            "caption_dropout",
            io.Float.Input(
                "caption_dropout",
                default=0.1,
                min=0.0,
                max=1.0,
                step=0.05,
                optional=True,
                extra_dict=ADVANCED,
                tooltip="How often a clip is trained without its caption, which keeps guidance working.",
            ),
        ),
        Setting(
            "held_out.every_steps",
            io.Int.Input(
                "held_out_every",
                default=100,
                min=0,
                max=1_000_000,
                optional=True,
                extra_dict=ADVANCED,
                tooltip="Steps between two measurements of the loss on the clips that the data set holds out. 0: never.",
            ),
        ),
        Setting(
            "checkpoints.keep_last",
            io.Int.Input(
                "keep_last",
                default=3,
                min=1,
                max=10_000,
                optional=True,
                extra_dict=ADVANCED,
                tooltip="How many checkpoints stay for going on. LoRA files are never deleted.",
            ),
        ),
        Setting(
            "gradient_checkpointing",
            io.Boolean.Input(
                "gradient_checkpointing",
                default=True,
                optional=True,
                extra_dict=ADVANCED,
                tooltip="Compute each block twice to need a fraction of the memory. About a third slower.",
            ),
        ),
        Setting(
            "precision",
            io.Combo.Input(
                "precision",
                ["auto", "bf16", "fp16", "fp32"],
                default="auto",
                optional=True,
                extra_dict=ADVANCED,
                tooltip="What the model computes in. auto: bf16 where the card has it.",
            ),
        ),
        Setting(
            "device",
            io.Combo.Input(
                "device",
                ["auto", "cpu", "cuda:0", "cuda:1", "cuda:2", "cuda:3"],
                default="auto",
                optional=True,
                extra_dict=ADVANCED,
                tooltip="Where to train. auto: the first CUDA card. Runs on one card wait for each other.",
            ),
        ),
        Setting(
            "deterministic",
            io.Boolean.Input(
                "deterministic",
                default=False,
                optional=True,
                extra_dict=ADVANCED,
                tooltip="The same bits every time on a CUDA card too, where PyTorch can; slower.",
            ),
        ),
        Setting(
            "start.initial_lora",
            io.String.Input(
                "initial_lora",
                default="",
                optional=True,
                extra_dict=ADVANCED,
                tooltip="A LoRA file to start from, as a LoRA loader lists it or as a full path. Its rank must be the same.",
            ),
            unset="",
        ),
        Setting(
            "start.extends",
            io.String.Input(
                "extends",
                default="",
                optional=True,
                extra_dict=ADVANCED,
                tooltip='Go on exactly where another run was, with its optimizer: "kitten@2000" for step 2000 of the run kitten. '
                "`steps` counts from the beginning of that run.",
            ),
            unset="",
        ),
    )
