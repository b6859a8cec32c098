"""The encoder of the command line: text encoders, an image encoder and a VAE from files, one kind of them in memory at a time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from .checkpoint import Checkpoint
from .device import find_device
from .errors import CheckpointError, Problem
from .family import IMAGE_EMBEDS, IMAGE_TEXT, Family, LatentSpec, TextRecord, Variant, detect_vae
from .offload.copies import on_device

_TOKENIZER_FILES = ("*.json", "*.model", "*.txt")
_LOCAL = {"local_files_only": True, "trust_remote_code": False}
_ALWAYS = ("vae", "text_encoder", "tokenizer")


def needed_parts(family: Family, variant: Variant) -> tuple[str, ...]:
    """The parts of a diffusers folder that a variant's clips and captions are encoded with, by their names there."""
    required = family.required(variant)
    second = ("text_encoder_2", "tokenizer_2") if family.comfyui(variant).text_encoders > 1 else ()
    encoder = ("image_encoder",) if IMAGE_EMBEDS in required else ()
    processor = ("image_processor",) if required & {IMAGE_EMBEDS, IMAGE_TEXT} else ()
    return (*_ALWAYS, *second, *encoder, *processor)


@dataclass(frozen=True)
class EncoderFiles:
    """Where the parts are: a VAE in any form (native file or folder), the others as folders. None: not needed."""

    vae: Path
    text_encoder: Path
    tokenizer: Path
    text_encoder_2: Path | None = None
    tokenizer_2: Path | None = None
    image_encoder: Path | None = None
    image_processor: Path | None = None

    @classmethod
    def find(cls, base: Path | str | None = None, needed: Sequence[str] = _ALWAYS, **given: Path | str | None) -> EncoderFiles:
        """The `needed` parts (`needed_parts`) of the diffusers folder `base`; each may be given by itself instead.

        Raises CheckpointError with every part that is missing.
        """
        places = {name: _place(name, given.get(name), base) for name in needed}
        problems = [problem for name, place in places.items() if (problem := _missing(name, place))]
        if problems:
            raise CheckpointError(problems, subject="The encoders")
        return cls(**{name: place for name, place in places.items() if place})


def _place(name: str, path: Path | str | None, base: Path | str | None) -> Path | None:
    if path is not None:
        return Path(path).expanduser().absolute()
    return Path(base).expanduser().absolute() / name if base is not None else None


def _missing(name: str, place: Path | None) -> Problem | None:
    flag = f"--{name.replace('_', '-')}"
    if place is None:
        return Problem(f"no {name} is given", "encoding needs it", f"Give {flag}, or --base with a diffusers folder.")
    if not place.exists():
        return Problem(f"{place} does not exist", f"it should be the {name}", f"Check the path, or give {flag}.")
    if name != "vae" and not place.is_dir():
        return Problem(f"{place} is a file", f"the {name} is a folder with its configuration", "Give the folder of a diffusers model.")
    return None


class FolderEncoder:
    """An `Encoder` of files. Opening it reads headers; a model is loaded when it is first asked to encode.

    The VAE runs in float32 on every device (its latents are what every step learns from; twice the memory of bfloat16), the
    others in bfloat16 on a CUDA GPU and as they are stored elsewhere. Nothing is looked for on the network.
    """

    def __init__(self, family: Family, variant: Variant, files: EncoderFiles, device: str | torch.device = "auto") -> None:
        self.family_id = family.id
        self.variant_id = variant.id
        self.latent: LatentSpec = family.latent(variant)
        self.negative = family.sampling(variant).negative
        self.required = family.required(variant)
        self._family, self._variant = family, variant
        self._files = files
        self._device = find_device(str(device))
        self._loaded: tuple[str, dict[str, Any]] = ("", {})

    @cached_property
    def identity_vae(self) -> str:
        checkpoint = Checkpoint.open(self._files.vae, "vae")
        return f"{self.family_id} {checkpoint.identity()} {json.dumps(checkpoint.config, sort_keys=True)}"

    @cached_property
    def identity_text(self) -> str:
        files = self._files
        identity = f"{self.family_id} {self._identity(files.text_encoder)} {_tokenizer_hash(files.tokenizer)} {self._dtype()}"
        if files.text_encoder_2 and files.tokenizer_2:
            identity += f" {self._identity(files.text_encoder_2)} {_tokenizer_hash(files.tokenizer_2)}"
        return identity

    @cached_property
    def identity_image(self) -> str:
        """Of the image encoder, where the variant has one by itself, and of how images are prepared."""
        files = self._files
        encoder = self._identity(files.image_encoder) if files.image_encoder else ""
        assert files.image_processor is not None
        return f"{self.family_id} {encoder} {_files_hash(sorted(files.image_processor.glob('*.json')))} {self._dtype()}"

    def _identity(self, folder: Path) -> str:
        return f"{Checkpoint.open(folder, 'text_encoder').identity()} {_files_hash([folder / 'config.json'])}"

    def encode_video(self, pixels_BCFHW: torch.Tensor) -> torch.Tensor:
        """See Encoder."""
        with on_device(self._device):
            vae = self._model("vae", "vae")
            return self._family.encode_video(vae, pixels_BCFHW.to(self._device)).float().cpu()

    def encode_text(self, prompts: Sequence[str], image_HWC: torch.Tensor | None = None) -> list[TextRecord]:
        """See Encoder."""
        with on_device(self._device):
            return self._family.encode_text(self._variant, self, prompts, image_HWC)

    def encode_image(self, image_HWC: torch.Tensor) -> torch.Tensor:
        """See Encoder."""
        with on_device(self._device):
            return self._family.encode_image(self, image_HWC).cpu()

    def tokenizer(self, number: int = 1) -> Any:
        """See TextFolder."""
        return self._model("text", _numbered("tokenizer", number))

    def text_encoder(self, number: int = 1) -> Any:
        """See TextFolder."""
        return self._model("text", _numbered("text_encoder", number))

    def image_processor(self) -> Any:
        """See TextFolder. It is no model, and stays."""
        return self._processor

    @cached_property
    def _processor(self) -> Any:
        return self._load("image_processor")

    def image_encoder(self) -> Any:
        """See TextFolder."""
        return self._model("image", "image_encoder")

    def _model(self, kind: str, name: str) -> Any:
        """A part; parts of another kind make room first."""
        if self._loaded[0] != kind:
            self._loaded = (kind, {})
        parts = self._loaded[1]
        if name not in parts:
            parts[name] = self._load(name)
        return parts[name]

    def _load(self, name: str) -> Any:
        if name == "vae":
            return self._load_vae()
        folder = getattr(self._files, name)
        assert folder is not None, f"{self._variant.id} was said to need no {name}"
        return _load_processor(folder, name) if "encoder" not in name else self._load_encoder(folder)

    def _load_vae(self) -> torch.nn.Module:
        from .load import load_vae

        checkpoint = Checkpoint.open(self._files.vae, "vae")
        detection = detect_vae(checkpoint, self._family, self._variant, to_encode=True)
        vae: torch.nn.Module = load_vae(checkpoint, detection, self._device, torch.float32)
        return vae

    def _dtype(self) -> torch.dtype | str:
        return torch.bfloat16 if self._device.type == "cuda" else "auto"

    def _load_encoder(self, folder: Path) -> torch.nn.Module:
        from transformers.utils import logging

        logging.disable_progress_bar()  # the encoding has its own
        model: torch.nn.Module = _model_class(folder).from_pretrained(folder, dtype=self._dtype(), **_LOCAL)
        return model.to(self._device).eval().requires_grad_(False)


def _numbered(name: str, number: int) -> str:
    return name if number == 1 else f"{name}_{number}"


def _load_processor(folder: Path, name: str) -> Any:
    from transformers import AutoImageProcessor, AutoTokenizer

    return (AutoImageProcessor if name == "image_processor" else AutoTokenizer).from_pretrained(folder, **_LOCAL)


def _model_class(folder: Path) -> Any:
    """The class of transformers for what a folder holds: the encoder alone where it knows one, else what config.json names.

    Raises CheckpointError for a folder of another library's.
    """
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_TEXT_ENCODING_MAPPING

    try:
        config = transformers.AutoConfig.from_pretrained(folder, **_LOCAL)
    except (OSError, ValueError) as error:
        value = f"{folder} is no model of transformers ({str(error).splitlines()[0]})"
        raise CheckpointError(
            Problem(value, "an encoder is a folder with its config.json", "Give the folder of a diffusers model.")
        ) from None
    if type(config) in MODEL_FOR_TEXT_ENCODING_MAPPING:
        return transformers.AutoModelForTextEncoding
    named = [getattr(transformers, name, None) for name in config.architectures or ()]
    return next((found for found in named if found is not None), transformers.AutoModel)


def _tokenizer_hash(folder: Path) -> str:
    """Hash of the tokenizer's own files, whatever else lies beside them."""
    return _files_hash(sorted({path for pattern in _TOKENIZER_FILES for path in folder.glob(pattern)}))


def _files_hash(paths: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(f"{path.name} ".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest() if path.is_file() else b"")
    return digest.hexdigest()
