"""A model's file or files: what is in them by their headers, and their tensors, mapped when asked for.

A checkpoint is one component (a transformer, a VAE, a text encoder) in any of the forms people have: one file, shards
with or without an index, the folder of a diffusers component, or a whole diffusers folder.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from .errors import CheckpointError, Problem, ProblemsError
from .quantisation import FP8_DTYPES, Kind, Quantisation, split_off
from .tensor_files import PICKLE_SUFFIXES, SUFFIXES, StoredTensor, TensorFile, open_tensor_file

Component = Literal["transformer", "vae", "text_encoder"]

_PREFIXES: Mapping[str, tuple[str, ...]] = {
    "transformer": ("model.diffusion_model.", "model.model.", "net.", "diffusion_model.", "model."),
    "vae": ("vae.", "first_stage_model."),
    "text_encoder": (),
}
_OTHER_COMPONENTS = ("text_encoders.", "cond_stage_model.", "conditioner.")
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d+)-of-(?P<count>\d+)(?P<suffix>\.\w+)")
_SAMPLES = 4
_SAMPLE_BYTES = 4096


@dataclass(frozen=True)
class Checkpoint:
    """One component of a model.

    `path` is what was opened, `metadata` the header's strings, `config` the config.json beside the weights if there is
    one. `tensors` are the weights by name, without the prefix some files put before every name and without the scales of
    quantised weights: those are asked for by `scale`.
    """

    path: Path
    metadata: Mapping[str, str]
    config: Mapping[str, Any] | None
    tensors: Mapping[str, StoredTensor]
    _files: Mapping[Path, TensorFile] = field(repr=False)
    _quantisation: Quantisation = field(repr=False)

    @classmethod
    def open(cls, path: Path | str, component: Component = "transformer") -> Checkpoint:
        """Read the headers of a file, of all shards of a model, or of a diffusers folder.

        Raises CheckpointError when something is missing, damaged, of an unknown kind, holds code, or is quantised in a
        way that training cannot read.
        """
        path = Path(path).expanduser()
        paths = _locate(path, component)
        files = _open_all(paths, path.name)
        metadata = dict(next(iter(files.values())).metadata)
        stored = _without_prefix([tensor for file in files.values() for tensor in file.tensors.values()], component)
        weights, quantisation = split_off(stored, metadata, lambda tensor: files[tensor.file].load(tensor.key), path.name)
        return cls(path, metadata, _config(paths[0].parent), weights, files, quantisation)

    @property
    def quantisation(self) -> Kind | None:
        """How the weights are quantised: "fp8_scaled", "comfy_quant", or None (also for plain fp8 weights)."""
        return self._quantisation.kind

    @property
    def is_fp8(self) -> bool:
        """Whether any weight is stored in 8 bits, with scales or without."""
        return self.quantisation is not None or any(stored.dtype in FP8_DTYPES for stored in self.tensors.values())

    @property
    def parameters(self) -> int:
        """How many numbers all weights are."""
        return sum(stored.numel for stored in self.tensors.values())

    @property
    def nbytes(self) -> int:
        """Bytes of all weights."""
        return sum(stored.nbytes for stored in self.tensors.values())

    def config_fields(self, class_name: str, fields: Iterable[str]) -> dict[str, Any]:
        """The named fields of the config.json; none unless it is the one of that diffusers class."""
        config = self.config or {}
        if config.get("_class_name") != class_name:
            return {}
        return {name: config[name] for name in fields if name in config}

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor as it is stored, mapped from the file without a copy: never write to it."""
        return self._load(self.tensors[name])

    def scale(self, module_name: str) -> torch.Tensor | None:
        """What the module's stored weight is to be multiplied with: float32, () or (rows, 1); None: nothing."""
        stored = self._quantisation.scales.get(module_name)
        if stored is None:
            return None
        scale = self._load(stored).float()
        return scale.reshape(()) if scale.numel() == 1 else scale.reshape(-1, 1)

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that hold the tensors."""
        return tuple(self._files)

    def identity(self) -> str:
        """A hash of the content, in milliseconds: names, dtypes, shapes, and bytes sampled from every tensor.

        Independent of path, time, prefix and the cut into shards. Tensors up to 16 KiB count whole; of a larger one,
        four pages of 4 KiB spread over it: a change of fewer bytes than that may be missed.
        """
        digest = hashlib.sha256()
        scales = {f"{module} scale": stored for module, stored in self._quantisation.scales.items()}
        for name, stored in sorted({**self.tensors, **scales}.items()):
            digest.update(f"{name} {stored.dtype} {stored.shape}\n".encode())
            starts, length = sampled(stored.nbytes)
            for sample in self._files[stored.file].read(stored.key, starts, length):
                digest.update(sample)
        return digest.hexdigest()

    def _load(self, stored: StoredTensor) -> torch.Tensor:
        return self._files[stored.file].load(stored.key)


def sampled(nbytes: int) -> tuple[list[int], int]:
    """Starts and length of the bytes that stand for a tensor: all when few, else pages at both ends and between."""
    if nbytes <= _SAMPLES * _SAMPLE_BYTES:
        return [0], nbytes
    return [(nbytes - _SAMPLE_BYTES) * index // (_SAMPLES - 1) for index in range(_SAMPLES)], _SAMPLE_BYTES


def _open_all(paths: Iterable[Path], subject: str) -> dict[Path, TensorFile]:
    """Every file, opened; the problems of all of them at once."""
    files: dict[Path, TensorFile] = {}
    problems: list[Problem] = []
    for path in paths:
        try:
            files[path] = open_tensor_file(path)
        except ProblemsError as error:
            problems.extend(error.problems)
    if problems:
        raise CheckpointError(problems, subject=subject if len(problems) > 1 else "")  # each names its file
    return files


def _config(folder: Path) -> Mapping[str, Any] | None:
    """The config.json beside the weights, if there is a readable one."""
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return config if isinstance(config, dict) else None


def _without_prefix(tensors: Iterable[StoredTensor], component: Component) -> dict[str, StoredTensor]:
    """The component's tensors by name: those with its prefix, without it; of a bare file all."""
    foreign = (*_OTHER_COMPONENTS, *(p for other, prefixes in _PREFIXES.items() if other != component for p in prefixes))
    named = {tensor.key: tensor for tensor in tensors}
    own = [key for key in named if not key.startswith(foreign)]
    for prefix in _PREFIXES[component]:
        inside = [key for key in own if key.startswith(prefix)]
        if len(inside) >= max(0.9 * len(own), 1):
            return {key.removeprefix(prefix): named[key] for key in own}
    return named


def _locate(path: Path, component: Component) -> list[Path]:
    """The files that make up the component."""
    if not path.exists():
        raise _error(f"{path} does not exist", "a model's file or folder is needed", "Check the path.")
    if path.is_dir():
        return _locate_in_folder(path / component if (path / component).is_dir() else path)
    if path.name.endswith(".index.json"):
        return _files_of_index(path)
    if match := _SHARD.fullmatch(path.name):
        return _shards(path, match)
    return [path]


def _locate_in_folder(folder: Path) -> list[Path]:
    """The weights in a folder: by an index, as shards, or the only file; safetensors before pickles."""
    if indices := sorted(folder.glob("*.safetensors.index.json"), key=lambda index: (len(index.name), index.name)):
        return _files_of_index(indices[0])
    for suffixes in ((".safetensors",), PICKLE_SUFFIXES):
        found = sorted(path for path in folder.iterdir() if path.suffix in suffixes)
        models = {_stem(path): path for path in found}
        if len(models) == 1:
            return _locate(found[0], "transformer")
        if models:
            names = ", ".join(path.name for path in models.values())
            raise _error(f"{folder.name} holds {len(models)} models ({names})", "one is needed", "Give the path of one of them.")
    raise _error(
        f"{folder} holds no weights", f"a model's folder holds files that end in {', '.join(SUFFIXES)}", "Give the model's file or folder."
    )


def _stem(path: Path) -> str:
    match = _SHARD.fullmatch(path.name)
    return match["stem"] if match else path.name


def _shards(path: Path, match: re.Match[str]) -> list[Path]:
    """All shards of the model that one shard belongs to."""
    count, width = int(match["count"]), len(match["number"])
    names = [f"{match['stem']}-{number:0{width}}-of-{match['count']}{match['suffix']}" for number in range(1, count + 1)]
    return _existing([path.parent / name for name in names], path.name)


def _files_of_index(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise _error(f"{index.name} has no weight_map", "an index names the file of every tensor", "Download it again.") from None
    return _existing([index.parent / Path(name).name for name in names], index.name)


def _existing(paths: list[Path], subject: str) -> list[Path]:
    missing = [path.name for path in paths if not path.is_file()]
    if missing or not paths:
        raise _error(
            f"{len(paths) - len(missing)} of {len(paths)} files are there (missing: {', '.join(missing)})",
            f"{subject} is one part of a model in {len(paths)} files",
            "Download the missing files into the same folder.",
        )
    return paths


def _error(value: str, rule: str, remedy: str) -> CheckpointError:
    return CheckpointError(Problem(value, rule, remedy))
