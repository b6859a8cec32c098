"""The whole way of the models that start from an image, tiny: clips and an image by a diffusers folder, three steps, a preview."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from clip_files import write_caption, write_video
from encoder_files import Whole, whole
from tiny_families import filled, write_native_vae

from trainers import previews
from trainers.data.buckets import Geometry
from trainers.data.encoded import Encoded
from trainers.data.scan import scan_folder
from trainers.encoders import FirstFrames, encode_dataset
from trainers.family import FIRST_FRAME, Detection
from trainers.folder_encoder import EncoderFiles, FolderEncoder, needed_parts
from trainers.job import parse_job
from trainers.load import native_state
from trainers.run import Run
from trainers.stable_file import save_file
from trainers.trainer import train
from trainers.training import lora_path


def encode(model: Whole, folder: Path) -> Encoded:
    """Two clips, two prompts and an image, by the encoders in `folder`."""
    model.write(folder)
    vae = next(vae for vae in model.family.vaes if vae.fits(model.variant))
    write_native_vae(folder / "vae.safetensors", model.family, vae)
    step, frames = model.family.latent(model.variant).spatial_step, model.family.latent(model.variant).temporal_stride + 1
    (folder / "clips").mkdir()
    chance = np.random.default_rng(0)
    for index in range(2):
        pictures = chance.integers(0, 256, (2 * frames, 2 * step, 2 * step, 3), np.uint8)
        write_caption(write_video(folder / f"clips/{index}.mp4", list(pictures), 24), "a cat walks")
    cv2.imwrite(str(folder / "start.png"), chance.integers(0, 256, (50, 70, 3), np.uint8))
    files = EncoderFiles.find(folder, needed_parts(model.family, model.variant), vae=folder / "vae.safetensors")
    encoder = FolderEncoder(model.family, model.variant, files, "cpu")
    prompts, start = ("a cat", "a dog walks"), folder / "start.png"
    first_frames = FirstFrames(prompts, (start, start), encoder.negative, frames, 2 * step, 2 * step)
    report = encode_dataset(
        scan_folder(folder / "clips"),
        Geometry(2 * step, 2 * step, frames),
        encoder,
        folder / "encoded",
        prompts=prompts,
        first_frames=first_frames,
    )
    assert report.encoded is not None
    assert report.rejected == ()
    return report.encoded


@pytest.mark.parametrize(
    "variant_id", ["wan2.1-i2v", "wan2.2-ti2v", "ltxv-2b-0.9.5", "hunyuan-i2v-v1", pytest.param("hunyuan-i2v-v2", marks=pytest.mark.slow)]
)
def test_from_files_to_a_preview_of_an_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variant_id: str):
    model = whole(variant_id)
    monkeypatch.setattr(model.family, "detect", lambda _: Detection(model.family, (model.variant,), model.config), raising=True)
    encoded = encode(model, tmp_path)
    transformer = filled(model.family.build(model.config))
    save_file(native_state(transformer.state_dict(), model.family.keys), tmp_path / "base.safetensors")
    (image,) = encoded.images
    sampled: list[torch.Tensor] = []
    sample = previews.sample_latents
    monkeypatch.setattr(previews, "sample_latents", lambda *given, **more: sampled.append(sample(*given, **more)) or sampled[-1])
    values = {
        "name": "tiny",
        "base": {"transformer": str(tmp_path / "base.safetensors"), "vae": str(tmp_path / "vae.safetensors")},
        "encoded": str(tmp_path / "encoded"),
        "runs_folder": str(tmp_path / "runs"),
        "loras_folder": str(tmp_path / "loras"),
        "device": "cpu",
        "steps": 3,
        "lora": {"rank": 2},
        "gradient_checkpointing": False,
        "tensorboard": False,
        "held_out": {"every_steps": 0},
        "previews": {
            "every_steps": 3,
            "before_training": False,
            "prompts": ["a cat", "a dog walks"],
            "images": [str(tmp_path / "start.png")],
            "sampling_steps": 2,
            "cfg": 2.0,
            **{"width": image.width, "height": image.height, "num_frames": image.num_frames},
        },
    }
    run = Run.create(parse_job(values))
    assert train(run) == "done"
    assert lora_path(run, 3).exists()
    assert len(list(run.samples_folder.glob("step-000003-*.mp4"))) == 2
    first = encoded.extra(FIRST_FRAME, image.extras[FIRST_FRAME])
    for latents in sampled:
        assert latents.isfinite().all()
        assert torch.equal(latents[0, :, :1], first) == model.in_place, "what is in place stays as it was given"
