"""Graphs that tests send, in the form of the API: {node id: {"class_type", "inputs"}}."""

from __future__ import annotations

from typing import Any

from trainers.demo import demo
from trainers.demo.world import NUM_FRAMES, SIDE

TINY, SHAPES = "tiny Wan (built in)", "moving shapes (built in)"

Graph = dict[str, dict[str, Any]]


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def base_graph() -> Graph:
    """The tiny base and its encoders."""
    return {
        "base": node("VideoTrainer_BaseModel", transformer=TINY, variant="read from the file", vae=TINY, text_encoder=TINY),
        "encoders": node("VideoTrainer_LoadEncoders", base=["base", 0]),
    }


def training_graph(path: str = "", size: int = SIDE, **settings: Any) -> Graph:
    """The demo's training of its own clips, or of those in the folder `path`."""
    geometry = {"width": size, "height": size, "num_frames": NUM_FRAMES, "fps": 0.0, "bucketing": True}
    settings = {
        "name": "diagonally",
        "trigger_words": "diagonally",
        "steps": demo.STEPS,
        "rank": demo.RANK,
        "learning_rate": demo.LEARNING_RATE,
        "batch_size": demo.BATCH_SIZE,
        "save_every": 50,
        "seed": 0,
        "warmup_steps": 10,
        "noise": "shift",
        "held_out_every": 50,
        "gradient_checkpointing": False,
        **settings,
    }
    return base_graph() | {
        "clips": node("VideoTrainer_DatasetFromFolder", folder=SHAPES, path=path, repeats=1, held_out=0.1),
        "encoded": node(
            "VideoTrainer_EncodeDataset",
            dataset=["clips", 0],
            base=["base", 0],
            clip=["encoders", 0],
            vae=["encoders", 1],
            clip_mode="first",
            clips_per_video=0,
            **geometry,
        ),
        "train": node("VideoTrainer_TrainLoRA", base=["base", 0], encoded=["encoded", 0], **settings),
    }
