"""What the planner chooses for typical cards: every model at its usual shape, as a markdown table.

    python tests/benchmarks/plan_table.py                          # all of them
    python tests/benchmarks/plan_table.py wan2.1-t2v-14b ltxv-13b   # these variants

Planned, not measured: memory is traced on the meta device from the real headers' shapes, rates are assumptions (`trainers/machine.py`).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "trainers")]

from model_files import entries, fp8_entries, shapes_of, write_header_only
from tiny_families import TINY, Published

from trainers.checkpoint import Checkpoint
from trainers.family import FIRST_FRAME, FIRST_FRAME_CLIP, IMAGE_EMBEDS, Detection, detect
from trainers.job import Job, parse_job
from trainers.job_memory import JobTrace, tracer_of
from trainers.machine import CARDS, GIB, Card, Machine
from trainers.memory_plan import MemoryPlan, choose
from trainers.memory_report import seconds
from trainers.memory_trace import StepShape

HOST_GIB = {"RTX 4060": 32, "RTX 3060": 32, "T4": 30, "RTX 4080": 64, "RTX 4090": 64, "L40S": 128, "A100": 256}
TEXT_ROWS = 256


@dataclass(frozen=True)
class Row:
    """A model, how its file is stored, the clips (width, height, frames) and the rank; `t4`: the clips on a card without bf16."""

    variant: str
    stored: str
    clips: tuple[int, int, int]
    rank: int
    t4: tuple[int, int, int] | None = None


ROWS = (
    Row("wan2.1-t2v-1.3b", "bf16", (512, 512, 81), 32, t4=(640, 384, 49)),
    Row("wan2.2-ti2v-5b", "bf16", (832, 480, 81), 16, t4=(640, 384, 49)),
    Row("wan2.1-t2v-14b", "bf16", (512, 512, 81), 32),
    Row("wan2.1-i2v-14b", "fp8", (512, 512, 81), 32),
    Row("wan2.2-t2v-a14b", "fp8", (512, 512, 81), 32),
    Row("wan2.2-i2v-a14b", "fp8", (512, 512, 81), 32),
    Row("ltxv-2b-0.9.5", "bf16", (768, 448, 89), 32),
    Row("ltxv-13b", "bf16", (768, 448, 89), 32),
    Row("hunyuan-t2v", "bf16", (768, 512, 49), 32),
    Row("hunyuan-i2v-v1", "bf16", (768, 512, 49), 32),
    Row("hunyuan-i2v-v2", "bf16", (768, 512, 49), 32),
    Row("mochi-1-preview", "bf16", (848, 480, 37), 16),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="*", metavar="VARIANT", choices=[[], *(row.variant for row in ROWS)], help="rows of the table")
    wanted = parser.parse_args().variants
    names = " | ".join(f"{card.gib:.0f} GB<br>{card.name}" for card in CARDS)
    print(f"| planned | clips, rank | {names} |\n|---|---|{'---|' * len(CARDS)}")
    with tempfile.TemporaryDirectory() as folder:
        for row in (row for row in ROWS if not wanted or row.variant in wanted):
            print(line_of(row, Path(folder)), flush=True)


def line_of(row: Row, folder: Path) -> str:
    published = next(found for tiny in TINY.values() for found in tiny.published if found.variant == row.variant)
    path = folder / published.file_name
    checkpoint = Checkpoint.open(header(path, published, row.stored))
    detection = detect(checkpoint, row.variant)
    cells, traces = [], {}
    for card in CARDS:
        clips = row.clips if card.bf16 else row.t4
        rank = row.rank if card.bf16 else 16
        if clips is None:
            cells.append("")
            continue
        job = job_of(path, rank, two=detection.variant.boundary is not None)
        if card.bf16 not in traces:
            tracer = tracer_of(job, checkpoint, detection, card.machine(1), torch.bfloat16 if card.bf16 else torch.float16)
            trained = 2 if detection.variant.boundary is not None else 1
            traces[card.bf16] = JobTrace(tracer, replace(tracer.model, trained=trained), shape_of(detection, clips))
        cells.append(cell(choose(job, traces[card.bf16], machine_of(card))))
        if not card.bf16:
            cells[-1] += f"<br>({clips[0]}x{clips[1]}x{clips[2]}, rank {rank})"
    width, height, frames = row.clips
    title = f"{detection.variant.title}, {row.stored}"
    return f"| {title} | {width}x{height}x{frames}, {row.rank} | {' | '.join(cells)} |"


def machine_of(card: Card) -> Machine:
    return card.machine(0.85 * HOST_GIB[card.name])


def header(path: Path, published: Published, stored: str) -> Path:
    shapes = shapes_of(published.keys)
    tensors = fp8_entries(shapes, torch.float8_e4m3fn) if stored == "fp8" else entries(shapes, torch.bfloat16)
    return write_header_only(path, tensors, published.metadata)


def job_of(path: Path, rank: int, two: bool) -> Job:
    base = {"transformer": str(path), **({"transformer_low_noise": str(path)} if two else {})}
    optimizer = {"kind": "adamw8bit"}
    return parse_job({"name": "table", "base": base, "encoded": "encoded", "steps": 2000, "lora": {"rank": rank}, "optimizer": optimizer})


def shape_of(detection: Detection, clips: tuple[int, int, int]) -> StepShape:
    family, variant, config = detection.family, detection.variant, detection.config
    width, height, frames = clips
    latents = family.latent(variant).shape(frames, height, width)
    first_frame = (latents[0], 1, *latents[2:])
    known = {FIRST_FRAME: first_frame, FIRST_FRAME_CLIP: latents, IMAGE_EMBEDS: (257, 1280)}
    rule = family.first_frame(variant)
    extras = {kind: known[kind] for kind in {*family.required(variant), FIRST_FRAME} & known.keys()} if rule else {}
    pooled = config["pooled_projection_dim"] if family.id == "hunyuan" else None
    return StepShape(latents, 1, TEXT_ROWS, family.text_width(config), pooled, extras, first_frame=rule is not None)


def cell(plan: MemoryPlan) -> str:
    """Peak, seconds of a step, and what was done for it."""
    price, chosen = plan.price, plan.arrangement
    if not plan.fits:
        needed = price.device_bytes + price.reserve_bytes
        return f"- ({needed / GIB:.1f} GiB)" if needed > plan.machine.free_bytes else f"- ({price.host_bytes / GIB:.0f} GiB RAM)"
    done = []
    if price.placement.streamed:
        done.append(f"{len(price.placement.streamed)}/{len(plan.model.blocks)} {chosen.host}")
    if chosen.activations == "host":
        done.append("inputs")
    if chosen.chunks > 1:
        done.append(f"{chosen.chunks} parts")
    return f"{price.device_bytes / GIB:.1f} GiB, {seconds(price.step_seconds)}" + (f"<br>{', '.join(done)}" if done else "")


if __name__ == "__main__":
    main()
