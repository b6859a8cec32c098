"""The demo: clips, encoding, a LoRA in the background worker, videos before and after, and a page that shows it.

Everything is made here and now from the small world (`world.py`) and the tiny base beside this file; nothing is
downloaded. Running it again does only what is not done yet.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..data.buckets import Geometry
from ..data.scan import scan_folder
from ..errors import RunError
from ..job import Job, parse_job

BASE = Path(__file__).parent / "tiny_wan"
TRANSFORMER = BASE / "tiny_wan2.1_t2v_fp16.safetensors"
VAE = BASE / "tiny_wan_vae.safetensors"

CONCEPT_CLIPS, KNOWN_CLIPS = 32, 32
STEPS, BATCH_SIZE, RANK, LEARNING_RATE = 150, 12, 16, 1e-3
CONCEPT_SEED, KNOWN_SEED, ASKED_SEED, NOISE_SEED = 11, 12, 13, 1000
CONCEPT_VIDEOS, KNOWN_VIDEOS = 16, 24


@dataclass
class Timer:
    """Prints each step of the demo as it begins, and keeps how long it took."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        print(f"[{len(self.seconds) + 1}/6] {name}", flush=True)
        started = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - started


def run(out: Path) -> None:
    """Runs the whole demo into the folder `out` and prints what to look at."""
    out = out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    timer = Timer()
    with timer.step(f"Writing {CONCEPT_CLIPS + KNOWN_CLIPS} clips with captions"):
        write_data_set(out / "clips")
    with timer.step("Encoding clips and captions"):
        encode(out)
    with timer.step("Sampling before training"):
        sample(out, "before", None)
    with timer.step(f"Training a LoRA for {STEPS} steps in the background worker"):
        lora = train(out)
    with timer.step("Sampling with the LoRA"):
        sample(out, "after", lora)
    with timer.step("Writing the report"):
        write_report(out, lora, timer.seconds)


def write_data_set(folder: Path) -> None:
    """Half of the clips show the concept, half what the base knows, so that it is not forgotten."""
    from .world import CONCEPT, random_scenes, write_clips

    for name, scenes in (
        ("concept", random_scenes(CONCEPT_CLIPS, CONCEPT_SEED, (CONCEPT,))),
        ("known", random_scenes(KNOWN_CLIPS, KNOWN_SEED)),
    ):
        if len(list((folder / name).glob("*.mp4"))) < len(scenes):
            write_clips(folder / name, scenes)


def asked_captions() -> list[str]:
    """What is sampled before and after: captions with the concept first, then known ones."""
    from .world import CONCEPT, caption, random_scenes

    scenes = random_scenes(CONCEPT_VIDEOS, ASKED_SEED, (CONCEPT,)) + random_scenes(KNOWN_VIDEOS, ASKED_SEED + 1)
    return [caption(scene) for scene in scenes]
