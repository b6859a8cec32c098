"""Models of full size with random weights as real files in the layout people have, and encoded clips of any size for them.

Names and shapes are those of the published files (`tests/assets/keys`), values are random and of a size with which the model
answers with finite numbers: every byte is written, none is a hole, so that mapping, copying and computing cost what they do.
"""

from __future__ import annotations

import json
import os
import re
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from model_files import NAMES, Entries, shapes_of
from tiny_families import TINY, Published, tiny_config

from trainers.checkpoint import Checkpoint
from trainers.data.cache import Cache
from trainers.data.encoded import Encoded, EncodedItem
from trainers.family import Detection, Family, TextRecord, Variant, detect, families, family_of
from trainers.load import native_state

BLOCK_MATRIX = re.compile(r"(model\.diffusion_model\.)?(transformer_|double_|single_)?blocks\.\d+\..*\.weight")
FP8_STANDARD_DEVIATION = 80.0
"""Of stored fp8 values, whose largest is 448."""
TEXT_ROWS = 120
"""Tokens of a caption: a paragraph."""
_POOL_NUMBERS = 1 << 22


@dataclass(frozen=True)
class FullSize:
    """A published model. `tiny`: a few narrow blocks of the same kind instead."""

    name: str
    family: Family
    variant: Variant
    published: Published
    tiny: bool = False

    def entries(self, dtype: str) -> Entries:
        """(dtype, shape) of every tensor of its file; `dtype` is a torch name, or "fp8_scaled" as published: matrices of blocks only."""
        dense = torch.bfloat16 if dtype == "fp8_scaled" else getattr(torch, dtype)
        found: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        for name, shape in self._shapes().items():
            scaled = dtype == "fp8_scaled" and len(shape) == 2 and BLOCK_MATRIX.fullmatch(name) is not None
            found[name] = (torch.float8_e4m3fn if scaled else dense, shape)
            if scaled:
                found[name.removesuffix("weight") + "scale_weight"] = (torch.float32, ())
        return found

    def _shapes(self) -> Mapping[str, tuple[int, ...]]:
        if not self.tiny:
            return shapes_of(self.published.keys)
        module = self.family.build(tiny_config(self.family, self.variant) | {"num_layers": 4})
        state = {name: torch.empty_like(tensor, device="meta") for name, tensor in module.state_dict().items()}
        return {name: tuple(tensor.shape) for name, tensor in native_state(state, self.family.keys).items()}

    def write(self, folder: Path, dtype: str) -> Path:
        """Its file in `folder`; one that is there is taken as it is."""
        path = folder / f"{'tiny' if self.tiny else 'full'}_{dtype}" / self.published.file_name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_random(path, self.entries(dtype), self.published.metadata)
        return path

    def detection(self, path: Path) -> Detection:
        return detect(Checkpoint.open(path), self.variant.id)


_NAMES = {
    "wan-1.3b": "wan2.1-t2v-1.3b",
    "wan-14b": "wan2.1-t2v-14b",
    "wan-5b": "wan2.2-ti2v-5b",
    "ltx-2b": "ltxv-2b-0.9.5",
    "ltx-13b": "ltxv-13b",
    "hunyuan-13b": "hunyuan-t2v",
    "mochi-10b": "mochi-1-preview",
}


_TINY_VARIANTS = {"wan2.1-t2v-1.3b": "wan2.1-t2v", "wan2.1-t2v-14b": "wan2.1-t2v", "wan2.2-ti2v-5b": "wan2.2-ti2v"}
"""What a model is when it has not the size by which it is known."""


def full_size(name: str, tiny: bool = False) -> FullSize:
    """A model by its short name."""
    family, variant = family_of(_NAMES[name])
    published = next(entry for entry in TINY[family.id].published if entry.variant == variant.id)
    if tiny:
        family, variant = family_of(_TINY_VARIANTS.get(variant.id, variant.id))
    return FullSize(name, family, variant, published, tiny)


def model_names() -> list[str]:
    return list(_NAMES)


def write_random(path: Path, entries: Entries, metadata: Mapping[str, str] | None = None) -> None:
    """A safetensors file of random values: matrices that keep the size of what they are given, norms near 1, the rest small."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, (dtype, shape) in entries.items():
        start, end = end, end + prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    pools = _Pools(min(_POOL_NUMBERS, 4 * max(prod(shape) for _, shape in entries.values())))
    partial = path.with_suffix(".partial")
    with partial.open("wb", buffering=0) as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        for name, (dtype, shape) in entries.items():
            nbytes = prod(shape) * dtype.itemsize
            for part in pools.bytes_of(name, dtype, shape, nbytes):
                written = 0
                while written < len(part):
                    written += file.write(part[written:]) or 0
    os.replace(partial, path)


class _Pools:
    """Random bytes for tensors: a pool for each (dtype, mean, deviation), read from a place that the tensor's name gives."""

    def __init__(self, numbers: int) -> None:
        self._normal = torch.randn(numbers, generator=torch.Generator().manual_seed(0))
        self._pools: dict[tuple[torch.dtype, float, float], memoryview] = {}
        self._deviations: dict[str, float] = {}

    def bytes_of(self, name: str, dtype: torch.dtype, shape: tuple[int, ...], nbytes: int) -> list[memoryview]:
        """Parts whose bytes, one after the other, are the tensor's."""
        if name.endswith(".scale_weight"):
            return [memoryview(torch.tensor(self._scale(name)).view(1).view(torch.uint8).numpy())]
        pool = self._pool(dtype, *self._values(name, dtype, shape))
        place = zlib.crc32(name.encode()) % (len(self._normal) // 2) * dtype.itemsize
        parts, left = [], nbytes
        while left:
            parts.append(pool[place : place + left])
            left -= len(parts[-1])
            place = 0
        return parts

    def _values(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> tuple[float, float]:
        """Mean and standard deviation of what is stored."""
        if len(shape) < 2:
            is_norm = "norm" in name and name.endswith(("weight", "scale"))
            return (1.0, 0.05) if is_norm else (0.0, 0.02)
        deviation = prod(shape[1:]) ** -0.5
        if dtype == torch.float8_e4m3fn:
            self._deviations[name.removesuffix("weight")] = deviation
            return 0.0, FP8_STANDARD_DEVIATION
        return 0.0, deviation

    def _scale(self, name: str) -> float:
        return self._deviations[name.removesuffix("scale_weight")] / FP8_STANDARD_DEVIATION

    def _pool(self, dtype: torch.dtype, mean: float, deviation: float) -> memoryview:
        key = dtype, mean, deviation
        if key not in self._pools:
            values = self._normal * deviation + mean
            values = values.clamp_(-448, 448) if dtype.itemsize == 1 else values
            self._pools[key] = memoryview(values.to(dtype).view(torch.uint8).numpy())
        return self._pools[key]


def write_clips(folder: Path, model: FullSize, path: Path, sizes: Sequence[tuple[int, int, int]]) -> Path:
    """An encoded folder of random clips of these sizes (frames, height, width in pixels) for the model in `path`."""
    family, variant = model.family, model.variant
    assert family.required(variant) == {"latents"}, f"{variant.id} needs more than latents and text"
    config, latent = model.detection(path).config, family.latent(variant)
    chance, cache = torch.Generator().manual_seed(2), Cache(folder / "cache")
    width, pooled = family.text_width(config), config.get("pooled_projection_dim") if TINY[family.id].pooled_dim else None
    rows = 7 if model.tiny else TEXT_ROWS
    captions = ["", *(f"clip {index}" for index in range(len(sizes)))]
    texts = {caption: cache.text_key(caption, "random") for caption in captions}
    for caption, key in texts.items():
        embeds = torch.randn(rows if caption else 1, width, generator=chance).to(torch.bfloat16)
        cache.write_text(key, TextRecord(embeds, None if pooled is None else torch.randn(int(pooled), generator=chance)))
    items = []
    for caption, size in zip(captions[1:], sizes, strict=True):
        key = cache.latents_key(caption, 0.0, size[0], latent.fps, size[1], size[2], "random")
        cache.write_latents(key, torch.randn(latent.shape(*size), generator=chance))
        items.append(EncodedItem(key, texts[caption], caption, f"{caption}.mp4", 0.0, *size, latent.fps, 1, False))
    Encoded(folder, family.id, variant.id, tuple(items), {"": texts[""]}, cache).save()
    return folder


def tiny_size(family: Family, variant: Variant) -> tuple[int, int, int]:
    """(frames, height, width) of the smallest clips that are worth the name."""
    latent = family.latent(variant)
    return 2 * latent.temporal_stride + 1, 2 * latent.spatial_step, 3 * latent.spatial_step


assert set(_NAMES.values()) <= {variant.id for family in families().values() for variant in family.variants}
