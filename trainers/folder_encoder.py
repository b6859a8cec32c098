"""The encoder of the command line: a text encoder and a VAE from files, one of them in memory at a time."""

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
from .errors import CheckpointError, Problem
from .family import Family, LatentSpec, TextRecord, Variant, detect_vae

_TOKENIZER_FILES = ("*.json", "*.model", "*.txt")


@dataclass(frozen=True)
class EncoderFiles:
    """Where the parts are: a VAE in any form (native file or folder), a text encoder and its tokenizer as folders."""

    vae: Path
    text_encoder: Path
    tokenizer: Path

    @classmethod
    def find(
        cls,
        base: Path | str | None = None,
        vae: Path | str | None = None,
        text_encoder: Path | str | None = None,
        tokenizer: Path | str | None = None,
    ) -> EncoderFiles:
        """The parts of the diffusers folder `base`; each may be given by itself instead.

        Raises CheckpointError with every part that is missing.
        """
        given = {"vae": vae, "text_encoder": text_encoder, "tokenizer": tokenizer}
        places = {name: _place(name, path, base) for name, path in given.items()}
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

    The VAE runs in float32 on every device (its latents are what every step learns from; twice the memory of bfloat16),
    the text encoder in bfloat16 on a CUDA card and as it is stored elsewhere. Nothing is looked for on the network.
    """

    def __init__(self, family: Family, variant: Variant, files: EncoderFiles, device: str | torch.device = "auto") -> None:
        self.family_id = family.id
        self.variant_id = variant.id
        self.latent: LatentSpec = family.latent(variant)
        self.negative = family.sampling(variant).negative
        self._family, self._variant = family, variant
        self._files = files
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self._device = torch.device(device)
        self._loaded: tuple[str, Any] = ("", None)

    @cached_property
    def identity_vae(self) -> str:
        checkpoint = Checkpoint.open(self._files.vae, "vae")
        return f"{self.family_id} {checkpoint.identity()} {json.dumps(checkpoint.config, sort_keys=True)}"

    @cached_property
    def identity_text(self) -> str:
        checkpoint = Checkpoint.open(self._files.text_encoder, "text_encoder")
        config = self._files.text_encoder / "config.json"
        dtype = self._text_dtype()
        return f"{self.family_id} {checkpoint.identity()} {_files_hash([config])} {_tokenizer_hash(self._files.tokenizer)} {dtype}"

    def encode_video(self, pixels_BCFHW: torch.Tensor) -> torch.Tensor:
        """See Encoder."""
        vae = self._model("vae")
        return self._family.encode_video(vae, pixels_BCFHW.to(self._device)).float().cpu()

    def encode_text(self, prompts: Sequence[str]) -> list[TextRecord]:
        """See Encoder."""
        return self._family.encode_text(self._variant, self, prompts)

    def tokenizer(self, number: int = 1) -> Any:
        """See TextFolder."""
        return self._model("text_encoder")[0]

    def text_encoder(self, number: int = 1) -> Any:
        """See TextFolder."""
        return self._model("text_encoder")[1]

    def image_processor(self) -> Any:
        raise NotImplementedError

    def image_encoder(self) -> Any:
        raise NotImplementedError

    def _model(self, name: str) -> Any:
        """The VAE, or (tokenizer, text encoder); whichever was loaded before makes room."""
        if self._loaded[0] != name:
            self._loaded = ("", None)
            self._loaded = (name, self._load_vae() if name == "vae" else self._load_text_encoder())
        return self._loaded[1]

    def _load_vae(self) -> torch.nn.Module:
        from .load import load_vae

        checkpoint = Checkpoint.open(self._files.vae, "vae")
        detection = detect_vae(checkpoint, self._family, self._variant, to_encode=True)
        vae: torch.nn.Module = load_vae(checkpoint, detection, self._device, torch.float32)
        return vae

    def _text_dtype(self) -> torch.dtype | str:
        return torch.bfloat16 if self._device.type == "cuda" else "auto"

    def _load_text_encoder(self) -> tuple[Any, torch.nn.Module]:
        from transformers import AutoModelForTextEncoding, AutoTokenizer
        from transformers.utils import logging

        logging.disable_progress_bar()  # the encoding has its own
        local = {"local_files_only": True, "trust_remote_code": False}
        tokenizer = AutoTokenizer.from_pretrained(self._files.tokenizer, **local)
        model = AutoModelForTextEncoding.from_pretrained(self._files.text_encoder, dtype=self._text_dtype(), **local)
        model = model.to(self._device).eval().requires_grad_(False)
        return tokenizer, model


def _tokenizer_hash(folder: Path) -> str:
    """Hash of the tokenizer's own files, whatever else lies beside them."""
    return _files_hash(sorted({path for pattern in _TOKENIZER_FILES for path in folder.glob(pattern)}))


def _files_hash(paths: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(f"{path.name} ".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest() if path.is_file() else b"")
    return digest.hexdigest()
