"""The settings of Train LoRA that are about the machine: on what it runs, what it may take of it, and how fast."""

from __future__ import annotations

from comfy_api.latest import io

from .schema import Setting, folded


def machine() -> tuple[Setting, ...]:
    """What it runs on."""
    return (
        folded(
            "gradient_checkpointing",
            io.Boolean,
            "gradient_checkpointing",
            default=True,
            tooltip="Compute each block twice to need a fraction of the memory. About a third slower.",
        ),
        folded(
            "precision",
            io.Combo,
            "precision",
            options=["auto", "bf16", "fp16", "fp32"],
            default="auto",
            tooltip="What the model computes in. auto: bf16 on RTX 30 and newer; on older GPUs fp16 for Wan, and fp32, which is slow, for "
            "other models.",
        ),
        folded(
            "device",
            io.Combo,
            "device",
            options=["auto", "cpu", "cuda:0", "cuda:1", "cuda:2", "cuda:3", "mps"],
            default="auto",
            tooltip="Where to train. auto: the first CUDA GPU; if none is found, small models train on the CPU; for large ones the "
            "error says what to check. Runs on one GPU wait for each other.",
        ),
        folded(
            "deterministic",
            io.Boolean,
            "deterministic",
            default=False,
            tooltip="The same bits every time on a GPU too, where PyTorch can; slower.",
        ),
    )


def memory() -> tuple[Setting, ...]:
    """What training may take, and how a model that is larger is made to fit."""
    return (
        folded(
            "memory.vram_gib",
            io.Float,
            "vram_gib",
            default=0.0,
            min=0.0,
            max=1024.0,
            step=0.5,
            tooltip="What training may take of the card, in GiB. 0: what is free when it starts. Set it to leave room for other "
            "programs; what does not fit is streamed.",
            unset=0,
        ),
        folded(
            "memory.ram_gib",
            io.Float,
            "ram_gib",
            default=0.0,
            min=0.0,
            max=16_384.0,
            step=1.0,
            tooltip="What training may take of the machine's memory, in GiB. 0: what is free when it starts. With little of it streamed "
            "weights are read from the model's file, slower.",
            unset=0,
        ),
        folded(
            "memory.quantise",
            io.Combo,
            "quantise",
            options=["none", "fp8", "nf4"],
            default="none",
            tooltip="How a 16-bit model is kept while it trains, if it is too large for the card. fp8: half the memory, close to the "
            "original. nf4: about a quarter, less close; needs the package bitsandbytes. Not with dora. fp8 files stay as they are.",
        ),
        folded(
            "memory.stream",
            io.Combo,
            "stream",
            options=["auto", "never", "always"],
            default="auto",
            tooltip="Whether parts of the model wait in the machine's memory until they are used. auto: as much as the card cannot hold. "
            "never: all of it is on the card, or the training does not start. always: all blocks wait there, for the least of the card.",
        ),
    )


def speed() -> tuple[Setting, ...]:
    """How fast it is computed."""
    return (
        folded(
            "speed.attention",
            io.Combo,
            "attention",
            options=["auto", "native", "flash", "flash_3", "xformers"],
            default="auto",
            tooltip="Which library computes attention. auto and native: PyTorch's own, which is flash attention too on most cards. "
            "The others must be installed: flash (flash-attn, from RTX 30 on), flash_3 (H100), xformers.",
        ),
        folded(
            "speed.compile",
            io.Boolean,
            "compile",
            default=False,
            tooltip="Let PyTorch compile the model's blocks: the first steps take up to minutes longer, every later one is faster. "
            "Worth it for hundreds of steps. On Windows it needs the package triton-windows.",
        ),
    )
