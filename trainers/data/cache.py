"""The store of encoded clips and captions, addressed by what they were made of.

    <folder>/latents/ab/<key>.safetensors    normalised latents of one window, float32
    <folder>/text/ab/<key>.safetensors       one encoded caption, unpadded, in the dtype the encoder gave
    <folder>/image/ab/<key>.safetensors      what an image encoder gave for one first frame, in its dtype
    <folder>/hashes.jsonl                    sha256 of files already read, by path, size and time of change

Files are written beside their place and renamed, and never changed or deleted afterwards, so any number of processes may
share a store and a crash leaves at most a `.partial` file. An 832 x 480 window of 81 frames takes 8.4 MB with Wan's VAE (16 x
21 x 60 x 104 numbers), a caption of 100 tokens 0.8 MB in bfloat16 (4096 numbers each).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .. import journal
from ..errors import DatasetError, Problem
from ..family import FIRST_FRAME, FIRST_FRAME_CLIP, IMAGE_EMBEDS, IMAGE_TEXT, LATENTS, TextRecord
from ..stable_file import save_file
from ..tensor_files import open_tensor_file

FORMAT_VERSION = 1
"""Part of every key. Raise it when the same file and window would give other pixels or another layout."""

_FOLDERS = {LATENTS: "latents", FIRST_FRAME: "latents", FIRST_FRAME_CLIP: "latents", IMAGE_EMBEDS: "image", IMAGE_TEXT: "text"}
"""Where each kind of `Family.required` is kept."""


class Cache:
    """A store in `folder`, which is made on the first write."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder).expanduser().absolute()
        self._journal = self.folder / "hashes.jsonl"
        self._hashes: dict[tuple[str, int, int], str] | None = None

    @staticmethod
    def latents_key(
        file_hash: str, start_seconds: float, num_frames: int, fps: float, height: int, width: int, encoder_identity: str
    ) -> str:
        """The key of a window: covers `height` x `width` pixels, cropped around the centre."""
        window = {"start_seconds": start_seconds, "num_frames": num_frames, "fps": fps, "height": height, "width": width}
        return _key({"kind": "latents", "file": file_hash, "crop": "cover-centre", "encoder": encoder_identity, **window})

    @staticmethod
    def first_frame_key(
        kind: str, file_hash: str, start_seconds: float, height: int, width: int, encoder_identity: str, **more: object
    ) -> str:
        """The key of what is made of a window's first frame alone; `more` is what else it depends on.

        FIRST_FRAME has none of its own: it is the latents of a window of one frame.
        """
        window = {"start_seconds": start_seconds, "height": height, "width": width, **more}
        return _key({"kind": kind, "file": file_hash, "crop": "cover-centre", "encoder": encoder_identity, **window})

    @staticmethod
    def text_key(prompt: str, encoder_identity: str) -> str:
        """The key of a prompt."""
        return _key({"kind": "text", "prompt": prompt, "encoder": encoder_identity})

    def has(self, kind: str, key: str) -> bool:
        """Whether something of a window is there; `kind` as in `Family.required`."""
        return self._path(_FOLDERS[kind], key).is_file()

    def write(self, kind: str, key: str, value: torch.Tensor | TextRecord) -> None:
        """Store something of a window."""
        if isinstance(value, TextRecord):
            self.write_text(key, value)
        elif _FOLDERS[kind] == "latents":
            self.write_latents(key, value)
        else:
            self._write("image", key, {"rows": value.cpu()})

    def read(self, kind: str, key: str) -> torch.Tensor:
        """The tensor of a window that is no text. Raises DatasetError when the file is missing or damaged."""
        return self.read_latents(key) if _FOLDERS[kind] == "latents" else self._read("image", key)["rows"]

    def has_latents(self, key: str) -> bool:
        return self.has(LATENTS, key)

    def has_text(self, key: str) -> bool:
        return self._path("text", key).is_file()

    def write_latents(self, key: str, latents_CFHW: torch.Tensor) -> None:
        """Store latents as float32."""
        self._write("latents", key, {"latents_CFHW": latents_CFHW.to("cpu", torch.float32)})

    def write_text(self, key: str, record: TextRecord) -> None:
        """Store a record in the dtype it has."""
        tensors = {"embeds_LD": record.embeds_LD.cpu()}
        if record.pooled_D is not None:
            tensors["pooled_D"] = record.pooled_D.cpu()
        self._write("text", key, tensors)

    def read_latents(self, key: str) -> torch.Tensor:
        """latents_CFHW, float32. Raises DatasetError when the file is missing or damaged."""
        return self._read("latents", key)["latents_CFHW"]

    def read_text(self, key: str) -> TextRecord:
        """The record of a prompt. Raises DatasetError when the file is missing or damaged."""
        tensors = self._read("text", key)
        return TextRecord(tensors["embeds_LD"], tensors.get("pooled_D"))

    def shapes(self, kind: str, key: str) -> dict[str, tuple[int, ...]]:
        """The shapes of the tensors of a window or text, by its header. Raises CheckpointError when the file is missing or damaged."""
        return {name: stored.shape for name, stored in open_tensor_file(self._path(_FOLDERS[kind], key)).tensors.items()}

    def text_width(self, key: str) -> int:
        """How wide the rows of an encoded prompt are, by its header. Raises CheckpointError when the file is missing or damaged."""
        return open_tensor_file(self._path("text", key)).tensors["embeds_LD"].shape[1]

    def file_hash(self, path: Path) -> str:
        """sha256 of a file's bytes, read once for every (path, size, time of change). Raises OSError."""
        path = path.absolute()
        status = path.stat()
        known = self._known_hashes()
        place = (ascii(str(path)), status.st_size, status.st_mtime_ns)
        if place not in known:
            with open(path, "rb") as file:
                known[place] = hashlib.file_digest(file, "sha256").hexdigest()
            self.folder.mkdir(parents=True, exist_ok=True)
            journal.append(self._journal, {"path": place[0], "size": place[1], "mtime_ns": place[2], "sha256": known[place]})
        return known[place]

    def _path(self, kind: str, key: str) -> Path:
        return self.folder / kind / key[:2] / f"{key}.safetensors"

    def _write(self, kind: str, key: str, tensors: Mapping[str, torch.Tensor]) -> None:
        path = self._path(kind, key)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path, overwrite=True)

    def _read(self, kind: str, key: str) -> dict[str, torch.Tensor]:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = self._path(kind, key)
        try:
            return dict(load_file(path))
        except FileNotFoundError:
            raise DatasetError(
                Problem(f"{path} is missing", "what was encoded must stay in its cache", "Run `encode` again: it makes what is missing.")
            ) from None
        except (SafetensorError, OSError) as error:
            raise DatasetError(
                Problem(f"{path} is damaged ({error})", "a cached file must be whole", "Delete it and run `encode` again.")
            ) from None

    def _known_hashes(self) -> dict[tuple[str, int, int], str]:
        if self._hashes is None:
            records, _ = journal.read(self._journal)
            self._hashes = {(record["path"], record["size"], record["mtime_ns"]): record["sha256"] for record in records}
        return self._hashes


def _key(content: Mapping[str, Any]) -> str:
    text = json.dumps({"format": FORMAT_VERSION, **content}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
