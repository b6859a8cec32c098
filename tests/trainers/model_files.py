"""Model files for tests: at full size with a real header and no data on the disk, and tiny ones with random weights."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from math import prod
from pathlib import Path

import torch

ASSETS = Path(__file__).parents[1] / "assets"
NAMES = {
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.uint8: "U8",
}

Shapes = dict[str, tuple[int, ...]]
Entries = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]

T2V_1_3B, T2V_14B, VAE = "wan2.1_t2v_1.3B", "wan2.1_t2v_14B__wan2.2_t2v_A14B", "vae_wan2.1"
TINY = {"num_attention_heads": 2, "num_layers": 2, "ffn_dim": 64, "text_dim": 32, "freq_dim": 32}


def shapes_of(name: str) -> Shapes:
    """Native names and shapes of a real checkpoint."""
    shapes: Shapes = {}
    for key, shape, *blocks in json.loads((ASSETS / "keys" / f"{name}.json").read_text("utf-8")):
        first, last = blocks[0] if blocks else (0, 0)
        shapes.update({key.replace("{}", str(index)): tuple(shape) for index in range(first, last + 1)})
    return shapes


def entries(shapes: Shapes, dtype: torch.dtype, prefix: str = "") -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    return {prefix + name: (dtype, shape) for name, shape in shapes.items()}


def fp8_entries(shapes: Shapes, dtype: torch.dtype, scale: str | None = None) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """As published: matrices in the blocks in fp8, the rest in fp16; with a scale beside each fp8 matrix if named."""
    found: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        quantised = name.startswith("blocks.") and len(shape) == 2
        found[name] = (dtype if quantised else torch.float16, shape)
        if quantised and scale:
            found[name.removesuffix("weight") + scale] = (torch.float32, ())
    return found


def write_header_only(path: Path, tensors: Entries, metadata: dict[str, str] | None = None, data: Mapping[str, bytes] = {}) -> Path:
    """A safetensors file of the right size: real header, the bytes in `data`, and a hole everywhere else."""
    header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    offsets: dict[str, int] = {}
    end = 0
    for name, (dtype, shape) in tensors.items():
        offsets[name] = end
        end += prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [offsets[name], end]}
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        for name, content in data.items():
            file.seek(8 + len(raw) + offsets[name])
            file.write(content)
        file.truncate(8 + len(raw) + end)
    return path


def tiny_transformer(seed: int = 0, **changes: object) -> torch.nn.Module:
    """A random WanTransformer3DModel of 2 blocks and width 256."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(seed)
    return WanTransformer3DModel(**(TINY | changes)).requires_grad_(False).eval()


def tiny_vae(seed: int = 0) -> torch.nn.Module:
    """A random AutoencoderKLWan of base width 4."""
    from diffusers import AutoencoderKLWan

    torch.manual_seed(seed)
    return AutoencoderKLWan(base_dim=4).requires_grad_(False).eval()
