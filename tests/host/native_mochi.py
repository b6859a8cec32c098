"""Under ComfyUI's Python: native_answers for Mochi models of few blocks and VAEs of few channels, whose sizes ComfyUI hard-codes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.ldm.genmo.vae.model as mochi_vae
import comfy.model_detection
import native_answers
import torch
from safetensors.torch import load_file, save_file


def main(pack: str, depth: int, base_channels: int, tasks: list[dict[str, Any]]) -> list[Any]:
    """What `native_answers` gives for the tasks; it has one more kind here, "vae"."""
    comfy.model_detection.detect_unet_config = _with_depth(comfy.model_detection.detect_unet_config, depth)
    for name in ("Encoder", "Decoder"):
        setattr(mochi_vae, name, _with_channels(getattr(mochi_vae, name), base_channels))
    native_answers._TASKS |= {"vae": _vae, "sigmas": _sigmas, "decoder_only": _decoder_only, "text": _text}
    return native_answers.main(pack, tasks)


def _with_depth(detect: Callable[..., Any], depth: int) -> Callable[..., Any]:
    def detect_unet_config(*given: Any, **named: Any) -> Any:
        config = detect(*given, **named)
        return config and {**config, "depth": depth}

    return detect_unet_config


def _with_channels(kind: type, base_channels: int) -> Callable[..., Any]:
    return lambda **named: kind(**{**named, "base_channels": base_channels})


def _load_vae(modules: Any, base: dict[str, Any]) -> Any:
    return native_answers._run(modules, "LoadEncoders", base)[1]


def _vae(modules: Any, base: dict[str, Any], inputs: str, output: str) -> Any:
    """Latents of pixels_BCFHW and pixels of latents_BCFHW, both normalised as the trainer's are."""
    vae, given = _load_vae(modules, base), load_file(inputs)
    latent_format = modules("nodes.native").latent_format(modules("trainers.family").families()["mochi"].comfyui(None))
    pixels_BFHWC = vae.decode(latent_format.process_out(given["latents_BCFHW"]))
    encoder = modules("nodes.graph_encoder").GraphEncoder(native_answers._base(modules, base), vae)
    save_file(
        {
            "pixels": pixels_BFHWC.mul(2).sub(1).permute(0, 4, 1, 2, 3).contiguous(),
            "latents": encoder.encode_video(given["pixels_BCFHW"]).contiguous(),
            "first": encoder.encode_video(given["pixels_BCFHW"][:, :, :1]).contiguous(),
        },
        output,
    )
    return {"class": type(vae.first_stage_model).__name__, "dtype": str(vae.vae_dtype)}


def _sigmas(modules: Any, shift: float, steps: list[int]) -> Any:
    """Mochi's noise levels by core's scheduler "simple"."""
    import comfy.model_sampling
    import comfy.samplers
    from comfy.supported_models import GenmoMochi

    sampling = comfy.model_sampling.ModelSamplingDiscreteFlow()
    settings = GenmoMochi.sampling_settings
    sampling.set_parameters(shift=shift, multiplier=settings["multiplier"])
    levels = [comfy.samplers.calculate_sigmas(sampling, "simple", count).tolist() for count in steps]
    return {"levels": levels, "shift": settings["shift"]}


def _decoder_only(modules: Any, base: dict[str, Any]) -> Any:
    """What is said when such a VAE is to encode, and the shape of what it decodes."""
    vae = _load_vae(modules, base)
    shape = list(vae.decode(torch.zeros(1, 12, 1, 2, 2)).shape)
    try:
        modules("nodes.graph_encoder").GraphEncoder(native_answers._base(modules, base), vae)
    except modules("trainers.errors").CheckpointError as error:
        return {"error": str(error), "shape": shape}
    return {"error": "", "shape": shape}


def _text(modules: Any, base: dict[str, Any], prompts: list[str], output: str) -> Any:
    """The records of the graph's encoder, and what core's node gives for the same prompts."""
    import nodes

    clip = native_answers._run(modules, "LoadEncoders", base)[0]
    encoder = modules("nodes.graph_encoder").GraphEncoder(native_answers._base(modules, base), clip=clip)
    found = {f"text{index}": record.embeds_LD for index, record in enumerate(encoder.encode_text(prompts))}
    for index, prompt in enumerate(prompts):
        ((rows_BLD, options),) = nodes.CLIPTextEncode().encode(clip, prompt)[0]
        found |= {f"rows{index}": rows_BLD.clone(), f"mask{index}": options["attention_mask"].clone()}
    save_file(found, output)
    return type(clip.tokenizer).__name__
