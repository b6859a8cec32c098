"""The folder that `encode` writes and a training job names.

    <folder>/encoded.json    what there is to train on: clip windows and prompts, each with its key in the cache
    <folder>/versions/       each encoded.json there ever was, by its identity
    <folder>/cache/          the tensors, unless another cache was given

`encoded.json` is replaced as a whole; earlier versions and their tensors stay, so a run that began with one goes on with it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ..errors import DatasetError, Problem
from ..family import IMAGE_TEXT, LATENTS, TextRecord
from ..whole_files import written_beside
from .cache import Cache

SCHEMA_VERSION = 1
FILE_NAME = "encoded.json"


@dataclass(frozen=True)
class EncodedItem:
    """One window of one clip. `latents` and `text` are keys in the cache; sizes are pixels.

    `extras` are the keys of what else the variant requires of a window, by kind (see `Family.required`). Where captions are
    encoded together with first frames, `text_without_caption` is the key of "" with this one.
    """

    latents: str
    text: str
    caption: str
    source: str
    start_seconds: float
    num_frames: int
    height: int
    width: int
    fps: float
    repeats: int
    held_out: bool
    extras: Mapping[str, str] = field(default_factory=dict)
    text_without_caption: str | None = None


@dataclass(frozen=True)
class EncodedImage:
    """An image that previews start from, by its file's name, at the previews' size in pixels.

    `extras` are keys in the cache by kind (see `Family.required`), `texts` those of the texts that are encoded with it.
    """

    name: str
    num_frames: int
    height: int
    width: int
    extras: Mapping[str, str]
    texts: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Encoded:
    """An encoded data set. `prompts` are the texts that are no captions ("", the negative prompt, previews) -> text key."""

    folder: Path
    family: str
    variant: str
    items: tuple[EncodedItem, ...]
    prompts: Mapping[str, str]
    cache: Cache = field(compare=False)
    images: tuple[EncodedImage, ...] = ()

    @classmethod
    def open(cls, folder: Path | str, identity: str | None = None) -> Encoded:
        """What `save` wrote last, or the version of an `identity`; reads no tensor.

        Raises DatasetError when there is none, or when another version of this program wrote it.
        """
        folder = Path(folder).expanduser().absolute()
        values = _read_json(folder / FILE_NAME if identity is None else _version_path(folder, identity))
        try:
            items = tuple(_item(item) for item in values["items"])
            cache = Cache(folder / values["cache"])
            images = tuple(EncodedImage(**image) for image in values.get("images", ()))
            return cls(folder, values["family"], values["variant"], items, dict(values["prompts"]), cache, images)
        except (KeyError, TypeError, AttributeError) as error:
            raise _unusable(f"{folder / FILE_NAME} is damaged ({error!r})", "it must be as `encode` wrote it") from None

    @cached_property
    def identity(self) -> str:
        """Hash of what is in it, wherever it lies."""
        return hashlib.sha256(json.dumps(self._content(), sort_keys=True).encode()).hexdigest()

    def with_prompts(self, texts: Mapping[str, str], images: Sequence[EncodedImage] = ()) -> Encoded:
        """The same clips with more prompts (prompt -> text key) and images of previews, as another version.

        `keep_version` lets it be opened.
        """
        return replace(self, prompts={**self.prompts, **texts}, images=(*self.images, *images))

    def save(self) -> None:
        """Write `encoded.json`; an older one is replaced, and stays to be opened by its identity."""
        self.keep_version()
        _replace(self.folder / FILE_NAME, self._text())

    def keep_version(self) -> None:
        """Let this content be opened by its identity, whatever becomes of `encoded.json`."""
        version = _version_path(self.folder, self.identity)
        version.parent.mkdir(parents=True, exist_ok=True)
        if not version.exists():
            _replace(version, self._text())

    def _text(self) -> str:
        values = {"schema_version": SCHEMA_VERSION, "cache": self._cache_path(), **self._content()}
        return json.dumps(values, sort_keys=True, indent=1) + "\n"

    def latents_CFHW(self, item: EncodedItem) -> torch.Tensor:
        """Normalised latents of an item, float32. Raises DatasetError when its file is missing or damaged."""
        return self.cache.read_latents(item.latents)

    def text(self, key: str) -> TextRecord:
        """The encoded prompt of a key. Raises DatasetError when its file is missing or damaged."""
        return self.cache.read_text(key)

    def extra(self, kind: str, key: str) -> torch.Tensor:
        """What else is encoded of a window or an image. Raises DatasetError when its file is missing or damaged."""
        return self.cache.read(kind, key)

    def image(self, path: str, num_frames: int, height: int, width: int) -> EncodedImage | None:
        """The image of a path (its name counts) at a size, if it is encoded."""
        wanted = Path(path).name, num_frames, height, width
        return next((image for image in self.images if (image.name, image.num_frames, image.height, image.width) == wanted), None)

    def problems(self) -> list[Problem]:
        """What is missing in the cache; empty when a training can read everything. Looks at names only."""
        files = set(self._files())
        missing = sum(not self.cache.has(kind, key) for kind, key in files)
        if not missing:
            return []
        value = f"{missing} of {len(files)} encoded files are missing in {self.cache.folder}"
        return [Problem(value, "all of them are needed", "Run `encode` again: it makes what is missing.")]

    def _files(self) -> Iterator[tuple[str, str]]:
        """(kind, key) of everything that is in the cache."""
        yield from ((IMAGE_TEXT, key) for key in self.prompts.values())
        for item in self.items:
            yield LATENTS, item.latents
            yield IMAGE_TEXT, item.text
            if item.text_without_caption:
                yield IMAGE_TEXT, item.text_without_caption
            yield from item.extras.items()
        for image in self.images:
            yield from image.extras.items()
            yield from ((IMAGE_TEXT, key) for key in image.texts.values())

    def _content(self) -> dict[str, Any]:
        """As JSON; what is not there is left out, so that data without it keep their identity."""
        items = [{name: value for name, value in asdict(item).items() if name not in _OPTIONAL or value} for item in self.items]
        images = {"images": [asdict(image) for image in self.images]} if self.images else {}
        return {"family": self.family, "variant": self.variant, "items": items, "prompts": dict(self.prompts), **images}

    def _cache_path(self) -> str:
        """Relative when the cache lies inside the folder, so that the folder can be moved."""
        if self.cache.folder.is_relative_to(self.folder):
            return self.cache.folder.relative_to(self.folder).as_posix()
        return os.fspath(self.cache.folder)


def _replace(path: Path, text: str) -> None:
    """The file gets its new content as a whole or not at all."""
    with written_beside(path) as partial:
        partial.write_text(text, encoding="utf-8", newline="\n")


def _version_path(folder: Path, identity: str) -> Path:
    return folder / "versions" / f"{identity}.json"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise _unusable(f"{path} does not exist", "a job trains on a folder that `encode` wrote", "Run `encode` first.") from None
    except (OSError, ValueError) as error:
        raise _unusable(f"{path} cannot be read ({error})", "it must be as `encode` wrote it") from None
    version = values.get("schema_version") if isinstance(values, dict) else None
    if version != SCHEMA_VERSION:
        raise _unusable(f"{path} has schema_version {version}", f"this program reads {SCHEMA_VERSION}")
    return dict(values)


_OPTIONAL = ("extras", "text_without_caption")
_FIELDS = {item.name: item.type for item in fields(EncodedItem) if item.name not in _OPTIONAL}
_TYPES: Mapping[str, tuple[type, ...]] = {"str": (str,), "int": (int,), "float": (int, float), "bool": (bool,)}


def _item(values: Mapping[str, Any]) -> EncodedItem:
    """An item whose fields are all there and of the right kind."""
    for name, kind in _FIELDS.items():
        if not isinstance(values[name], _TYPES[str(kind)]):
            raise TypeError(f"{name} is {values[name]!r}")
    if not all(isinstance(key, str) for key in (values.get("extras") or {}).values()):
        raise TypeError(f"extras is {values['extras']!r}")
    return EncodedItem(**values)


def _unusable(value: str, rule: str, remedy: str = "Run `encode` again: what is cached is not made twice.") -> DatasetError:
    return DatasetError(Problem(value, rule, remedy))
