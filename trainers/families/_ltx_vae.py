"""The VAEs of LTX-Video: how their files name their tensors, and the config that the shapes tell.

    0.9     strided encoder   first decoder
    0.9.1   strided encoder   timed decoder: it is told how noisy its latents are, and adds noise in between
    0.9.5   folded encoder    timed decoder; so also 0.9.6, 0.9.7, 0.9.8

Native blocks are numbered one after the other, whatever they are; diffusers nests them in levels.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from ..keytable import KeyTable, Rename, same

Shapes = Mapping[str, tuple[int, ...]]


def _reshaping(ours: str, theirs: str) -> tuple[Rename, ...]:
    """A residual block that changes the number of channels."""
    parts = {"conv1": "conv1", "conv2": "conv2", "conv_shortcut.conv": "conv_shortcut", "norm3": "norm3.norm"}
    return tuple(Rename(f"{ours}.{name}", f"{theirs}.{native}") for name, native in parts.items())


def _level(ours: str, theirs: str) -> tuple[Rename, ...]:
    """Residual blocks of one width, with the time embedder of a timed decoder."""
    return Rename(f"{ours}.resnets", f"{theirs}.res_blocks"), Rename(f"{ours}.time_embedder", f"{theirs}.time_embedder")


_STATISTICS = (
    Rename("latents_mean", "per_channel_statistics.mean-of-means"),
    Rename("latents_std", "per_channel_statistics.std-of-means"),
)
_UNUSED = tuple(f"per_channel_statistics.{name}" for name in ("mean-of-stds", "mean-of-stds_over_std-of-means", "channel"))
_ENDS = same("encoder.conv_in", "encoder.conv_out", "decoder.conv_in", "decoder.conv_out")

# Blocks are numbered one after the other in a native file. The first encoder: residual blocks, a strided convolution and
# a widening at each level.
_STRIDED_ENCODER = (
    *(row for level in range(4) for row in _level(f"encoder.down_blocks.{level}", f"encoder.down_blocks.{(0, 3, 6, 8)[level]}")),
    *(Rename(f"encoder.down_blocks.{level}.downsamplers.0", f"encoder.down_blocks.{3 * level + 1}") for level in range(3)),
    *(row for level in range(2) for row in _reshaping(f"encoder.down_blocks.{level}.conv_out", f"encoder.down_blocks.{3 * level + 2}")),
    *_level("encoder.mid_block", "encoder.down_blocks.9"),
)
# The second: residual blocks and a space-to-depth block, which widens.
_FOLDED_ENCODER = (
    *(row for level in range(4) for row in _level(f"encoder.down_blocks.{level}", f"encoder.down_blocks.{2 * level}")),
    *(Rename(f"encoder.down_blocks.{level}.downsamplers.0", f"encoder.down_blocks.{2 * level + 1}") for level in range(4)),
    *_level("encoder.mid_block", "encoder.down_blocks.8"),
)
_FIRST_DECODER = (
    *_level("decoder.mid_block", "decoder.up_blocks.0"),
    *(row for level in range(4) for row in _level(f"decoder.up_blocks.{level}", f"decoder.up_blocks.{3 * level or 1}")),
    *(Rename(f"decoder.up_blocks.{level}.upsamplers.0", f"decoder.up_blocks.{3 * level - 1}") for level in (1, 2, 3)),
    *(row for level in (2, 3) for row in _reshaping(f"decoder.up_blocks.{level}.conv_in", f"decoder.up_blocks.{3 * level - 2}")),
)
_TIMED_DECODER = (
    *_level("decoder.mid_block", "decoder.up_blocks.0"),
    *(row for level in range(3) for row in _level(f"decoder.up_blocks.{level}", f"decoder.up_blocks.{2 * level + 2}")),
    *(Rename(f"decoder.up_blocks.{level}.upsamplers.0", f"decoder.up_blocks.{2 * level + 1}") for level in range(3)),
    *same("decoder.timestep_scale_multiplier"),
    Rename("decoder.time_embedder", "decoder.last_time_embedder"),
    Rename("decoder.scale_shift_table", "decoder.last_scale_shift_table"),
)


def _vae_keys(encoder: tuple[Rename, ...], decoder: tuple[Rename, ...]) -> KeyTable:
    return KeyTable((*_STATISTICS, *_ENDS, *encoder, *decoder), ignored=_UNUSED)


VAE_KEYS_0_9 = _vae_keys(_STRIDED_ENCODER, _FIRST_DECODER)
VAE_KEYS_0_9_1 = _vae_keys(_STRIDED_ENCODER, _TIMED_DECODER)
VAE_KEYS_0_9_5 = _vae_keys(_FOLDED_ENCODER, _TIMED_DECODER)

_FOLDS = {4: "spatial", 2: "temporal", 8: "spatiotemporal"}
"""What a space-to-depth block halves, by how many positions it folds into one."""


def vae_config(shapes: Shapes, *, folded: bool, timed: bool) -> dict[str, Any]:
    """The arguments of AutoencoderKLLTXVideo that native shapes tell."""
    config = {
        "latent_channels": shapes["encoder.conv_out.conv.weight"][0] - 1,
        "spatial_compression_ratio": 32,
        "temporal_compression_ratio": 8,
    }
    encoder = _folded_encoder(shapes) if folded else _strided_encoder(shapes)
    return config | encoder | (_timed_decoder(shapes) if timed else _first_decoder(shapes))


def _strided_encoder(shapes: Shapes) -> dict[str, Any]:
    levels = [f"encoder.down_blocks.{block}" for block in (0, 3, 6, 8)]
    return {
        "block_out_channels": tuple(_width(shapes, level) for level in levels),
        "layers_per_block": tuple(_layers(shapes, level) for level in (*levels, "encoder.down_blocks.9")),
        "spatio_temporal_scaling": (True, True, True, False),
    }


def _folded_encoder(shapes: Shapes) -> dict[str, Any]:
    levels = [f"encoder.down_blocks.{block}" for block in (0, 2, 4, 6, 8)]
    widths = [_width(shapes, level) for level in levels]
    folds = [widths[level + 1] // shapes[f"encoder.down_blocks.{2 * level + 1}.conv.conv.weight"][0] for level in range(4)]
    return {
        "block_out_channels": tuple(widths),
        "down_block_types": ("LTXVideo095DownBlock3D",) * 4,
        "downsample_type": tuple(_FOLDS[fold] for fold in folds),
        "layers_per_block": tuple(_layers(shapes, level) for level in levels),
        "spatio_temporal_scaling": (True,) * 4,
    }


def _first_decoder(shapes: Shapes) -> dict[str, Any]:
    """Levels are listed from the pixels' side, as in diffusers."""
    levels = [f"decoder.up_blocks.{block}" for block in (9, 6, 3, 1)]
    return {
        "decoder_block_out_channels": tuple(_width(shapes, level) for level in levels),
        "decoder_layers_per_block": tuple(_layers(shapes, level) for level in (*levels, "decoder.up_blocks.0")),
        "decoder_spatio_temporal_scaling": (True, True, True, False),
        "decoder_inject_noise": (False,) * 5,
        "upsample_residual": (False,) * 4,
        "upsample_factor": (1,) * 4,
        "timestep_conditioning": False,
    }


def _timed_decoder(shapes: Shapes) -> dict[str, Any]:
    levels = [f"decoder.up_blocks.{block}" for block in (6, 4, 2, 0)]
    widths = [_width(shapes, level) for level in levels]
    return {
        "decoder_block_out_channels": tuple(widths[1:]),
        "decoder_layers_per_block": tuple(_layers(shapes, level) for level in levels),
        "decoder_spatio_temporal_scaling": (True,) * 3,
        "decoder_inject_noise": tuple(f"{level}.res_blocks.0.per_channel_scale1" in shapes for level in levels),
        "upsample_residual": (True,) * 3,
        "upsample_factor": tuple(before // after for after, before in pairwise(widths)),
        "timestep_conditioning": True,
    }


def _width(shapes: Shapes, level: str) -> int:
    return shapes[f"{level}.res_blocks.0.conv1.conv.weight"][0]


def _layers(shapes: Shapes, level: str) -> int:
    return sum(name.startswith(f"{level}.res_blocks.") and name.endswith(".conv1.conv.weight") for name in shapes)
