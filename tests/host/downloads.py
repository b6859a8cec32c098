"""Where the files come from that the shipped workflows name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

Download = Mapping[str, str]
"""What the page needs to offer a download: name, url, and the directory below `models`."""


def download(repository: str, directory: str, name: str, inside: str = "") -> Download:
    """A file of a repository on Hugging Face, in its folder `inside`."""
    folder = f"https://huggingface.co/{repository}/resolve/main/{f'{inside}/' if inside else ''}"
    return {"name": name, "url": f"{folder}{name}?download=true", "directory": directory}


def links(*files: Download) -> str:
    """A list of downloads, in Markdown."""
    return "\n".join(f"- [{file['name']}]({file['url']}) in `models/{file['directory']}`" for file in files)


def _split(repository: str, directory: str, name: str) -> Download:
    """A file of a model that Comfy-Org has taken apart."""
    return download(f"Comfy-Org/{repository}", directory, name, f"split_files/{directory}")


_wan21 = partial(_split, "Wan_2.1_ComfyUI_repackaged")
_wan22 = partial(_split, "Wan_2.2_ComfyUI_Repackaged")
_hunyuan = partial(_split, "HunyuanVideo_repackaged")
_mochi = partial(_split, "mochi_preview_repackaged")

_UMT5 = _wan21("text_encoders", "umt5_xxl_fp8_e4m3fn_scaled.safetensors")
_WAN21_VAE = _wan21("vae", "wan_2.1_vae.safetensors")
_T5_XXL = download("comfyanonymous/flux_text_encoders", "text_encoders", "t5xxl_fp16.safetensors")
_HUNYUAN_VAE = _hunyuan("vae", "hunyuan_video_vae_bf16.safetensors")
_CLIP_L_AND_LLAVA = (
    _hunyuan("text_encoders", "clip_l.safetensors"),
    _hunyuan("text_encoders", "llava_llama3_fp8_scaled.safetensors"),
)


@dataclass(frozen=True)
class Models:
    """The files of a model. `transformers`: one, or the high-noise and the low-noise expert; `vae` None: the transformer's file."""

    transformers: tuple[Download, ...]
    text_encoders: tuple[Download, ...]
    clip_type: str
    vae: Download | None = None
    clip_vision: Download | None = None

    @property
    def files(self) -> tuple[Download, ...]:
        """All of them, in the order in which they are loaded."""
        others = tuple(file for file in (self.vae, self.clip_vision) if file)
        return (*self.transformers, *self.text_encoders, *others)


def _wan(*transformers: Download, vae: Download = _WAN21_VAE, clip_vision: Download | None = None) -> Models:
    return Models(transformers, (_UMT5,), "wan", vae, clip_vision)


WAN21_T2V = _wan(_wan21("diffusion_models", "wan2.1_t2v_1.3B_fp16.safetensors"))
WAN21_I2V = _wan(
    _wan21("diffusion_models", "wan2.1_i2v_480p_14B_fp8_scaled.safetensors"),
    clip_vision=_wan21("clip_vision", "clip_vision_h.safetensors"),
)
WAN22_5B = _wan(
    _wan22("diffusion_models", "wan2.2_ti2v_5B_fp16.safetensors"),
    vae=_wan22("vae", "wan2.2_vae.safetensors"),
)
WAN22_T2V = _wan(
    _wan22("diffusion_models", "wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors"),
    _wan22("diffusion_models", "wan2.2_t2v_low_noise_14B_fp8_scaled.safetensors"),
)
WAN22_I2V = _wan(
    _wan22("diffusion_models", "wan2.2_i2v_high_noise_14B_fp8_scaled.safetensors"),
    _wan22("diffusion_models", "wan2.2_i2v_low_noise_14B_fp8_scaled.safetensors"),
)
LTX = Models((download("Lightricks/LTX-Video", "checkpoints", "ltx-video-2b-v0.9.5.safetensors"),), (_T5_XXL,), "ltxv")
HUNYUAN_T2V = Models(
    (_hunyuan("diffusion_models", "hunyuan_video_t2v_720p_bf16.safetensors"),), _CLIP_L_AND_LLAVA, "hunyuan_video", _HUNYUAN_VAE
)
HUNYUAN_I2V = Models(
    (_hunyuan("diffusion_models", "hunyuan_video_v2_replace_image_to_video_720p_bf16.safetensors"),),
    _CLIP_L_AND_LLAVA,
    "hunyuan_video",
    _HUNYUAN_VAE,
    _hunyuan("clip_vision", "llava_llama3_vision.safetensors"),
)
MOCHI = Models((_mochi("diffusion_models", "mochi_preview_bf16.safetensors"),), (_T5_XXL,), "mochi", _mochi("vae", "mochi_vae.safetensors"))
