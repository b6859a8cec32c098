"""Videos of the job's prompts, sampled while training, always from the same noise."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .data.video_file import write_video
from .sample import Solver, decode_frames, preview_noise, sample_latents

if TYPE_CHECKING:
    from .training import Training


@dataclass
class Previews:
    """The previews of a training; the VAE is loaded for the first one and waits on the CPU in between."""

    training: Training
    vae: torch.nn.Module | None = None

    @classmethod
    def of(cls, training: Training) -> Previews:
        return cls(training)

    def write(self, step: int) -> None:
        """Samples every prompt and writes `samples/step-000500-0.mp4`; what is there already stays."""
        spec, training = self.training.job.previews, self.training
        if not (spec.every_steps and spec.prompts and training.accelerator.is_main_process):
            return
        paths = [training.run.folder / "samples" / f"step-{step:06d}-{i}.mp4" for i in range(len(spec.prompts))]
        paths[0].parent.mkdir(exist_ok=True)
        for i, (prompt, path) in enumerate(zip(spec.prompts, paths, strict=True)):
            if not path.exists():
                self._write_one(path, prompt, spec.seed + i)
        training.run.event("sample", step=step, files=[path.name for path in paths])

    def _write_one(self, path: Path, prompt: str, seed: int) -> None:
        training, spec = self.training, self.training.job.previews
        transformer = training.accelerator.unwrap_model(training.transformer)
        latent = training.family.latent(training.variant)
        solver = Solver.of(training.family, training.variant, spec.sampling_steps, spec.shift, spec.cfg)
        noise = preview_noise(seed, latent.shape(spec.num_frames, spec.height, spec.width))[None].to(training.device)
        text = training.encoded.text(training.encoded.prompts[prompt])
        negative = training.encoded.text(training.encoded.prompts[training.encoded.negative])
        was_training = transformer.training
        transformer.eval()
        latents = sample_latents(training.family, training.variant, transformer, noise, [text], negative, solver, training.dtype)
        transformer.train(was_training)
        write_video(path, self._decode(latents), latent.fps)

    def _decode(self, latents_BCFHW: torch.Tensor):  # type: ignore[no-untyped-def]
        from .checkpoint import Checkpoint
        from .load import load_vae

        training = self.training
        if self.vae is None:
            assert training.job.base.vae is not None, "preflight lets no previews without a VAE through"
            checkpoint = Checkpoint.open(training.job.base.vae, "vae")
            self.vae = load_vae(checkpoint, training.family, torch.device("cpu"), torch.float32)
        vae = self.vae.to(training.device)
        frames = decode_frames(training.family, vae, latents_BCFHW)[0].numpy()
        self.vae.to("cpu")
        return frames
