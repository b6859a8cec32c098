"""The demo: clips, encoding, a LoRA in the background worker, videos before and after, and a page that shows it.

Everything is made here and now from the small world (`world.py`) and the tiny base beside this file; nothing is
downloaded. Running it again does only what is not done yet.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ..job import Job, parse_job

if TYPE_CHECKING:
    from ..run import Run

BASE = Path(__file__).parent / "tiny_wan"
TRANSFORMER = BASE / "tiny_wan2.1_t2v_fp16.safetensors"
VAE = BASE / "tiny_wan_vae.safetensors"

CONCEPT_CLIPS, KNOWN_CLIPS = 32, 32
CONCEPT_SEED, KNOWN_SEED, ASKED_SEED, NOISE_SEED = 11, 12, 13, 1000
CONCEPT_VIDEOS, KNOWN_VIDEOS = 16, 24
STEPS, BATCH_SIZE, RANK, LEARNING_RATE = 150, 12, 16, 1e-3
PREVIEWS = ("a red circle moving diagonally", "a blue square moving diagonally")


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
    """Runs the whole demo into the folder `out` and prints what to look at. What is there already is not made again."""
    out = out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    timer = Timer()
    with timer.step(f"Writing {CONCEPT_CLIPS + KNOWN_CLIPS} clips with captions"):
        write_clips(out / "clips")
    with timer.step("Encoding clips and captions"):
        print(f"      {encode(out)}")
    with timer.step("Sampling before training"):
        sample(out, "before", None)
    with timer.step(f"Training a LoRA for {STEPS} steps in the background worker"):
        trained = train(demo_job(out))
    lora = newest_lora(trained)
    with timer.step("Sampling with the LoRA"):
        sample(out, "after", lora)
    with timer.step("Measuring, and writing the report"):
        told = write_report(out, trained, lora, timer.seconds)
    print(f"\n{told}\n\nOpen {out / 'report.html'} ({sum(timer.seconds.values()):.0f} s in all)")


def write_clips(folder: Path) -> None:
    """Half of the clips show the concept, half what the base knows, so that it is not forgotten."""
    from . import world

    for name, scenes in (
        ("concept", world.random_scenes(CONCEPT_CLIPS, CONCEPT_SEED, (world.CONCEPT,))),
        ("known", world.random_scenes(KNOWN_CLIPS, KNOWN_SEED)),
    ):
        if len(list((folder / name).glob("*.txt"))) < len(scenes):
            world.write_clips(folder / name, scenes)


def asked_captions() -> list[str]:
    """What is sampled before and after: captions with the concept first, then known ones."""
    from . import world

    scenes = world.random_scenes(CONCEPT_VIDEOS, ASKED_SEED, (world.CONCEPT,))
    scenes += world.random_scenes(KNOWN_VIDEOS, ASKED_SEED + 1)
    return [world.caption(scene) for scene in scenes]


def encode(out: Path) -> str:
    """Encodes the clips, their captions and the prompts of the samples; what was encoded, in a sentence."""
    from ..checkpoint import Checkpoint
    from ..data.buckets import Geometry
    from ..data.scan import scan_folder
    from ..encoders import encode_dataset
    from ..family import detect
    from ..folder_encoder import EncoderFiles, FolderEncoder
    from .world import NUM_FRAMES, SIDE

    detection = detect(Checkpoint.open(TRANSFORMER))
    encoder = FolderEncoder(detection.family, detection.variant, EncoderFiles.find(BASE, vae=VAE))
    geometry = Geometry(width=SIDE, height=SIDE, num_frames=NUM_FRAMES)
    dataset = scan_folder(out / "clips", held_out=0.1)
    return str(encode_dataset(dataset, geometry, encoder, out / "encoded", prompts=(*asked_captions(), *PREVIEWS)))


def demo_job(out: Path) -> Job:
    """The job of the demo."""
    from ..data.encoded import Encoded
    from .world import NUM_FRAMES, SIDE

    return parse_job(
        {
            "name": "diagonally",
            "base": {"transformer": str(TRANSFORMER), "vae": str(VAE)},
            "encoded": str(out / "encoded"),
            "encoded_identity": Encoded.open(out / "encoded").identity,
            "runs_folder": str(out / "runs"),
            "loras_folder": str(out / "loras"),
            "trigger_words": ["diagonally"],
            "steps": STEPS,
            "batch_size": BATCH_SIZE,
            "gradient_checkpointing": False,
            "lora": {"rank": RANK},
            "optimizer": {"learning_rate": LEARNING_RATE, "schedule": "cosine", "warmup_steps": 10},
            "noise": {"distribution": "uniform"},
            "held_out": {"every_steps": 50, "sigmas": [0.3, 0.6, 0.9]},
            "checkpoints": {"every_steps": 50},
            "previews": {
                "every_steps": 50,
                "prompts": PREVIEWS,
                "width": SIDE,
                "height": SIDE,
                "num_frames": NUM_FRAMES,
                "sampling_steps": 8,
                "cfg": 3.0,
                "shift": 3.0,
                "negative": "",
            },
        }
    )


def train(job: Job) -> Run:
    """Hands the job to a background worker, as `train` does, and follows it to its end."""
    from ..cli.follow import follow
    from ..errors import RunError
    from ..launch import launch
    from ..run import attach_or_create

    run, how = attach_or_create(job)
    if how in ("created", "resumed"):
        launch(run)
    follow(run, sys.stdout)
    if (status := run.status()).state != "done":
        raise RunError(f"The demo's run is {status.state}. {status.message}\nRun the demo again to go on.")
    return run


def newest_lora(run: Run) -> Path:
    """The LoRA file of the run's last step."""
    return max((Path(run.job.loras_folder) / run.name).glob("*.safetensors"))


def sample(out: Path, name: str, lora: Path | None) -> None:
    """Samples every asked caption into `out/name`, unless that was done with this LoRA."""
    from .videos import Models, sample_videos

    folder, made_with = out / name, out / name / "made_with.txt"
    wanted = lora.name if lora else "base"
    if made_with.exists() and made_with.read_text() == wanted:
        return
    sample_videos(folder, Models(TRANSFORMER, VAE, out / "encoded"), asked_captions(), NOISE_SEED, lora)
    made_with.write_text(wanted)


def write_report(out: Path, run: Run, lora: Path, timings_seconds: dict[str, float]) -> str:
    """Scores the videos from their files, writes pictures and the page; the scores in a few lines."""
    import cv2

    from ..plot import loss_plot
    from .report import Result, contact_sheet, told, write_before_after, write_page
    from .score import summarise
    from .videos import read_videos

    before, after = read_videos(out / "before"), read_videos(out / "after")
    metrics = run.read_metrics()
    files = {
        "LoRA": lora,
        "before and after": out / "before_after.mp4",
        "loss": out / "loss.png",
        "contact sheet": out / "contact_sheet.jpg",
        "run": run.folder,
        "clips": out / "clips",
    }
    cv2.imwrite(str(files["loss"]), loss_plot(metrics, f"{run.name}: loss")[:, :, ::-1])
    cv2.imwrite(str(files["contact sheet"]), contact_sheet(before, after)[:, :, ::-1])
    write_before_after(files["before and after"], before, after)
    step_seconds = sorted(line["seconds"] for line in metrics)[len(metrics) // 2]
    training = f"{len(metrics)} steps of {BATCH_SIZE} clips, {step_seconds:.2f} s a step, rank {RANK}."
    summaries = [summarise([(video.asked, video.score) for video in videos]) for videos in (before, after)]
    result = Result(before, after, summaries[0], summaries[1], timings_seconds, training, files)
    write_page(out / "report.html", result)
    return told(result)
