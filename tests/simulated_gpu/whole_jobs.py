"""Jobs in which everything runs that a run can do: both experts, held-out loss, previews before and after training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from tiny_families import write_native, write_native_vae

from simulated_gpu.gpu_runs import job_on
from trainers.checkpoint import Checkpoint
from trainers.data.encoded import Encoded, EncodedImage
from trainers.family import IMAGE_TEXT, Family, Variant, detect
from trainers.job import Job


def job_with_everything(device: str, folder: Path, family: Family, variant: Variant, **fields: Any) -> Job:
    """Two steps; of two experts one each. Previews start from an image where the variant knows nothing else."""
    job = job_on(device, folder, family, variant, **({"steps": 2, "batch_size": 1} | fields))
    base: dict[str, Any] = {"vae": str(write_native_vae(folder / "vae.safetensors", family, _vae_of(family, variant)))}
    if variant in detect(Checkpoint.open(job.base.transformer)).variants:
        base["variant"] = variant.id
    if variant.boundary is not None:
        base["transformer_low_noise"] = str(write_native(folder / "low_noise.safetensors", family, variant))
    encoded = Encoded.open(job.encoded)
    item, rule = encoded.items[0], family.first_frame(variant)
    texts = {"": item.text_without_caption or item.text} if IMAGE_TEXT in family.required(variant) else {}
    image = EncodedImage("start.png", item.num_frames, item.height, item.width, item.extras, texts)
    images = (image,) if rule is not None and rule.always else ()
    items = (*encoded.items[:-1], replace(encoded.items[-1], held_out=True))
    replace(encoded, items=items, images=images).save()
    size = {"num_frames": item.num_frames, "height": item.height, "width": item.width}
    previews = job.previews.model_copy(
        update={"every_steps": 2, "prompts": ("",), "negative": "", "sampling_steps": 2, "images": tuple(i.name for i in images), **size}
    )
    return job.model_copy(
        update={
            "base": job.base.model_copy(update=base),
            "experts": job.experts.model_copy(update={"train": "both", "turn_steps": 1}) if variant.boundary is not None else job.experts,
            "held_out": job.held_out.model_copy(update={"every_steps": 1, "sigmas": (0.95, 0.2)}),
            "previews": previews,
        }
    )


def _vae_of(family: Family, variant: Variant) -> Any:
    return next(vae for vae in family.vaes if vae.fits(variant))
