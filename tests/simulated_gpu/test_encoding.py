"""Clips, captions and images encoded on the GPU: what the CPU makes of them, and nothing left behind."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest
import torch
from encoder_files import whole
from tiny_families import write_native_vae

from simulated_gpu import gpu
from simulated_gpu.gpu_runs import in_use
from trainers.demo import demo
from trainers.family import IMAGE_EMBEDS, IMAGE_TEXT
from trainers.folder_encoder import EncoderFiles, FolderEncoder, needed_parts
from trainers.run import Run

CAPTIONS = ("a cat", "a dog walks")


@pytest.mark.parametrize("variant_id", ["wan2.1-i2v", "ltxv-2b-0.9.5", "hunyuan-i2v-v1", "mochi-1-preview"])
def test_each_family_encodes_as_on_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variant_id: str) -> None:
    """Text and images in bfloat16, as on every GPU; the VAE in float32. One kind of them is on the GPU at a time."""
    model = whole(variant_id)
    model.write(tmp_path)
    vae = next(vae for vae in model.family.vaes if vae.fits(model.variant))
    write_native_vae(tmp_path / "vae.safetensors", model.family, vae)
    files = EncoderFiles.find(tmp_path, needed_parts(model.family, model.variant), vae=tmp_path / "vae.safetensors")
    monkeypatch.setattr(FolderEncoder, "_dtype", lambda self: torch.bfloat16)
    before = in_use()

    def encoded(device: str) -> list[torch.Tensor]:
        encoder = FolderEncoder(model.family, model.variant, files, device)
        step, frames = encoder.latent.spatial_step, encoder.latent.temporal_stride + 1
        chance = torch.Generator().manual_seed(0)
        found = [encoder.encode_video(2 * torch.rand(1, 3, frames, 2 * step, 2 * step, generator=chance) - 1)]
        video_bytes = gpu.live_bytes(0)
        image = torch.rand(40, 56, 3, generator=chance)
        required = model.family.required(model.variant)
        for record in encoder.encode_text(CAPTIONS, image if IMAGE_TEXT in required else None):
            found += [record.embeds_LD, *([record.pooled_D] if record.pooled_D is not None else [])]
        if IMAGE_EMBEDS in required:
            found.append(encoder.encode_image(image))
        assert device == "cpu" or video_bytes > 0
        return [part.float() for part in found]

    on_gpu, on_cpu = encoded("cuda"), encoded("cpu")
    gc.collect()
    assert in_use() == before
    assert len(on_gpu) == len(on_cpu) >= 3
    for found, expected in zip(on_gpu, on_cpu, strict=True):
        assert float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


@pytest.mark.matrix
def test_the_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its whole way with few clips, steps and videos, and the worker as a process of its own."""
    tests = Path(__file__).parents[1]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tests / "simulated_gpu" / "site"), str(tests)]))
    for name in ("CONCEPT_CLIPS", "KNOWN_CLIPS", "CONCEPT_VIDEOS", "KNOWN_VIDEOS", "STEPS", "BATCH_SIZE"):
        monkeypatch.setattr(demo, name, 2)
    before = in_use()
    demo.run(tmp_path)
    assert in_use() == before
    (job_file,) = (tmp_path / "runs").glob("*/job.json")
    run = Run.open(job_file.parent)
    assert run.status().state == "done"
    assert all(step["vram_gib"] > 0 for step in run.read_metrics()), "the worker trained on the GPU"
    assert (tmp_path / "report.html").exists()
    assert len(list((tmp_path / "after").glob("*.mp4"))) == 4
