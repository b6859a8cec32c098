"""Videos of the small world, sampled with the base and with a LoRA, always from the same noise."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..checkpoint import Checkpoint
from ..data.encoded import Encoded
from ..data.video_file import write_video
from ..device import find_device
from ..family import detect, detect_vae
from ..job import LoraSpec
from ..load import load_transformer, load_vae
from ..lora import inject, load_adapter_state
from ..lora_format import read_lora
from ..sample import Solver, decode_frames, preview_noise, sample_latents
from .report import Video
from .score import Asked, score_clip
from .world import FPS, NUM_FRAMES, SIDE, read_clip

BATCH = 8
SAMPLING_STEPS, SHIFT, CFG = 8, 3.0, 3.0


@dataclass(frozen=True)
class Models:
    """The files that sampling needs."""

    transformer: Path
    vae: Path
    encoded: Path


def sample_videos(folder: Path, models: Models, captions: Sequence[str], first_seed: int, lora: Path | None = None) -> None:
    """Writes `000.mp4` ... and `asked.json` into `folder`: caption i from the noise of seed `first_seed + i`."""
    checkpoint = Checkpoint.open(models.transformer)
    detection = detect(checkpoint)
    family, variant = detection.family, detection.variant
    device = find_device("auto")
    transformer = load_transformer(checkpoint, detection, device, torch.float32)
    if lora:
        adapter = read_lora(lora, family)
        rank = next(iter(adapter.modules.values())).down_RI.shape[0]
        inject(transformer, family, LoraSpec(rank=rank), seed=0)
        load_adapter_state(transformer, adapter)
    vae_checkpoint = Checkpoint.open(models.vae, "vae")
    vae = load_vae(vae_checkpoint, detect_vae(vae_checkpoint, family, variant), device, torch.float32)
    encoded = Encoded.open(models.encoded)
    shape = family.latent(variant).shape(NUM_FRAMES, SIDE, SIDE)
    solver = Solver.of(family, variant, SAMPLING_STEPS, SHIFT, CFG, family.latent(variant).tokens(NUM_FRAMES, SIDE, SIDE))
    folder.mkdir(parents=True, exist_ok=True)
    for start in range(0, len(captions), BATCH):
        batch = captions[start : start + BATCH]
        noise = torch.stack([preview_noise(first_seed + start + i, shape) for i in range(len(batch))]).to(device)
        texts = [encoded.text(encoded.prompts[caption]) for caption in batch]
        latents = sample_latents(
            family, variant, lambda _: transformer, noise, texts, encoded.text(encoded.prompts[""]), solver, torch.float32
        )
        for i, frames in enumerate(decode_frames(family, vae, latents)):
            write_video(folder / f"{start + i:03d}.mp4", frames.numpy(), FPS, crf=8)
    asked = [{"file": f"{i:03d}.mp4", "caption": caption} for i, caption in enumerate(captions)]
    (folder / "asked.json").write_text(json.dumps(asked, indent=1), encoding="utf-8")


def read_videos(folder: Path) -> list[Video]:
    """The videos of a folder with their scores, recomputed from the files."""
    rows = json.loads((folder / "asked.json").read_text(encoding="utf-8"))
    clips = [(Asked.parse(row["caption"]), folder / row["file"]) for row in rows]
    return [Video(asked, score_clip(path), read_clip(path)) for asked, path in clips]
