"""Videos of the job's prompts, sampled while training, always from the same noise."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from .conditions import preview_conditions, preview_image, preview_text
from .data.video_file import write_video
from .family import Family, Variant, detect_vae
from .job import PreviewSpec, due
from .preview_measures import PreviewMeasures
from .sample import Solver, decode_frames, preview_noise, sample_latents

if TYPE_CHECKING:
    from .training import Training


def negative_prompt(spec: PreviewSpec, family: Family, variant: Variant) -> str:
    """What the previews' guidance steers away from."""
    return family.sampling(variant).negative if spec.negative is None else spec.negative


@dataclass
class Previews:
    """The previews of a training; the VAE is loaded for the first one and waits on the CPU in between."""

    training: Training
    vae: torch.nn.Module | None = None

    @classmethod
    def of(cls, training: Training) -> Previews:
        return cls(training)

    def write_if_due(self, step: int, last: bool = False) -> None:
        """Samples every prompt into `samples/step-000500-0.mp4` when it is time; what is there already stays."""
        spec, training = self.training.job.previews, self.training
        wanted = spec.before_training if step == 0 else due(step, spec.every_steps, last)
        if not (wanted and spec.every_steps and spec.prompts):
            return
        paths = [training.run.samples_folder / f"step-{step:06d}-{i}.mp4" for i in range(len(spec.prompts))]
        missing = [i for i, path in enumerate(paths) if not path.exists()]
        if missing:
            training.run.event("sample", step=step, files=[], message=f"sampling {len(missing)} previews at step {step} ...")
        measures = PreviewMeasures(training.run, step, spec.clip_folder)
        try:
            for i in missing:
                measures.add(paths[i].name, spec.prompts[i], self._write_one(paths[i], spec.prompts[i], spec.seed + i, i))
        except torch.OutOfMemoryError:
            told = f"no memory for a preview of {spec.num_frames} frames of {spec.width}x{spec.height}; training goes on without it"
            training.run.event("sample", step=step, files=[], message=told)
            missing = []
        finally:
            self._make_room()
        if missing:
            training.run.event("sample", step=step, files=[path.name for path in paths], measures=measures.finish())
            training.accelerator.log({f"preview/{name}": value for name, value in measures.means.items()}, step=step)

    def _make_room(self) -> None:
        """Gives the memory back to the training."""
        if self.vae is not None:
            self.vae.to("cpu")
        if self.training.device.type == "cuda":
            torch.cuda.empty_cache()

    def _write_one(self, path: Path, prompt: str, seed: int, index: int) -> npt.NDArray[np.uint8]:
        training, spec = self.training, self.training.job.previews
        latent = training.family.latent(training.variant)
        tokens = latent.tokens(spec.num_frames, spec.height, spec.width)
        solver = Solver.of(training.family, training.variant, spec.sampling_steps, spec.shift, spec.cfg, tokens)
        noise = preview_noise(seed, latent.shape(spec.num_frames, spec.height, spec.width))[None].to(training.device)
        image = preview_image(spec, training.encoded, index)
        text = preview_text(training.encoded, image, prompt)
        negative = preview_text(training.encoded, image, negative_prompt(spec, training.family, training.variant))
        conditions = preview_conditions(training.family, training.variant, training.encoded, image, training.device)
        both = (training.family, training.variant)
        latents = sample_latents(*both, training.transformer_at, noise, [text], negative, solver, training.dtype, conditions=conditions)
        frames_FHWC = self._decode(latents)
        write_video(path, frames_FHWC, latent.fps)
        return frames_FHWC

    def _decode(self, latents_BCFHW: torch.Tensor) -> npt.NDArray[np.uint8]:
        from .checkpoint import Checkpoint
        from .load import load_vae

        training = self.training
        if self.vae is None:
            assert training.job.base.vae is not None, "preflight lets no previews without a VAE through"
            checkpoint = Checkpoint.open(training.job.base.vae, "vae")
            detection = detect_vae(checkpoint, training.family, training.variant)
            self.vae = load_vae(checkpoint, detection, torch.device("cpu"), torch.float32)
        vae = self.vae.to(training.device)
        frames: npt.NDArray[np.uint8] = decode_frames(training.family, vae, latents_BCFHW)[0].numpy()
        return frames
