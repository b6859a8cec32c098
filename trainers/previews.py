"""Videos of the job's prompts, sampled while training, always from the same noise."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from .checkpoint import Checkpoint
from .conditions import negative_prompt, preview_conditions, preview_image, preview_text
from .data.video_file import write_video
from .family import VaeDetection, detect_vae
from .job import due
from .load import load_vae
from .preview_measures import PreviewMeasures
from .preview_room import NoRoomError, PreviewRoom
from .room import give_back
from .sample import Solver, decode_frames, preview_noise, sample_latents
from .tiles import sides_below
from .trackers import track

if TYPE_CHECKING:
    from .training import Training


@dataclass
class Previews:
    """The previews of a training. The VAE is mapped from its file anew for each: nothing of it stays, on the device or off it."""

    training: Training
    _room: PreviewRoom | None = None

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
        if missing := [i for i, path in enumerate(paths) if not path.exists()]:
            training.run.event("sample", step=step, files=[], message=f"sampling {len(missing)} previews at step {step} ...")
            self._write(step, paths, missing)

    def _write(self, step: int, paths: list[Path], missing: list[int]) -> None:
        """Writes the previews of the prompts that are `missing`, and tells of those of all prompts."""
        spec, training = self.training.job.previews, self.training
        measures, room = PreviewMeasures(training.run, step, spec.clip_folder), self._with_room()
        try:
            for i in missing:
                measures.add(paths[i].name, spec.prompts[i], self._write_one(room, paths[i], i))
        except NoRoomError as error:
            told = (
                f"no memory for a preview of {spec.num_frames} frames of {spec.width}x{spec.height}, {error}; training goes on without it"
            )
            training.run.event("sample", step=step, files=[], message=told)
        finally:
            give_back(training.device)
        if files := [path.name for path in paths if path.exists()]:
            tiled = {"tile_pixels": room.tile_pixels} if room.tile_pixels else {}
            training.run.event("sample", step=step, files=files, measures=measures.finish(), **tiled)
            track(training, {f"preview/{name}": value for name, value in measures.means.items()})

    def _with_room(self) -> PreviewRoom:
        """How there is room for previews, as far as it was found."""
        if self._room is None:
            spec, (_, detection) = self.training.job.previews, self._vae()
            self._room = PreviewRoom(self.training, sides_below(spec.height, spec.width, detection.vae.tile_pixels))
        return self._room

    def _write_one(self, room: PreviewRoom, path: Path, index: int) -> npt.NDArray[np.uint8]:
        latents_BCFHW = room.sampled(lambda: self._sample(index).cpu())
        frames_FHWC = room.decoded(lambda tile_pixels: self._decode(latents_BCFHW, tile_pixels))
        try:
            write_video(path, frames_FHWC, self.training.family.latent(self.training.variant).fps)
        except OSError as error:  # a full disk
            step, run = self.training.step, self.training.run
            run.event("warning", step=step, message=f"the preview {path.name} could not be saved: {error}; training goes on without it")
        return frames_FHWC

    def _sample(self, index: int) -> torch.Tensor:
        """Latents of one preview, on the device."""
        training, spec = self.training, self.training.job.previews
        latent, prompt = training.family.latent(training.variant), spec.prompts[index]
        tokens = latent.tokens(spec.num_frames, spec.height, spec.width)
        solver = Solver.of(training.family, training.variant, spec.sampling_steps, spec.shift, spec.cfg, tokens)
        noise = preview_noise(spec.seed + index, latent.shape(spec.num_frames, spec.height, spec.width))[None].to(training.device)
        image = preview_image(spec, training.encoded, index)
        text = preview_text(training.encoded, image, prompt)
        negative = preview_text(training.encoded, image, negative_prompt(spec, training.family, training.variant))
        conditions = preview_conditions(training.family, training.variant, training.encoded, image, training.device)
        both = (training.family, training.variant)
        return sample_latents(*both, training.transformer_at, noise, [text], negative, solver, training.dtype, conditions=conditions)

    def _decode(self, latents_BCFHW: torch.Tensor, tile_pixels: int | None) -> npt.NDArray[np.uint8]:
        """Frames of one preview; nothing of it is on the device afterwards, not even of an attempt that was broken off."""
        training = self.training
        vae = load_vae(*self._vae(), training.device, torch.float32)
        stride = training.family.latent(training.variant).spatial_stride
        frames = decode_frames(training.family, vae, latents_BCFHW, max(tile_pixels // stride, 1) if tile_pixels else None)
        found: npt.NDArray[np.uint8] = frames[0].numpy()
        return found

    def _vae(self) -> tuple[Checkpoint, VaeDetection]:
        training = self.training
        assert training.job.base.vae is not None, "preflight lets no previews without a VAE through"
        checkpoint = Checkpoint.open(training.job.base.vae, "vae")
        return checkpoint, detect_vae(checkpoint, training.family, training.variant)
