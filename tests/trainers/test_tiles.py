"""Decoding in tiles: exact where a decoder looks at nothing beside, close to the whole where it does."""

from __future__ import annotations

import pytest
import torch
from tiny_families import tiny_vae_of

from trainers.checkpoint import Checkpoint
from trainers.demo.demo import VAE
from trainers.demo.world import random_scenes, render
from trainers.family import Family, Vae, detect_vae, families
from trainers.load import load_vae
from trainers.sample import decode_frames
from trainers.tiles import decode_in_tiles, sides_below

VAES = [(family, vae) for family in families().values() for vae in family.vaes]


def nearest(latents_BCFHW: torch.Tensor) -> torch.Tensor:
    """Each latent is 4 x 4 pixels of its first three channels."""
    return latents_BCFHW[:, :3].repeat_interleave(4, dim=-1).repeat_interleave(4, dim=-2)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (9, 20), (16, 5), (3, 30), (31, 17)])
def test_what_each_latent_decodes_to_is_put_where_it_belongs(height: int, width: int) -> None:
    latents = torch.randn(1, 4, 3, height, width, generator=torch.Generator().manual_seed(0))
    seen: list[tuple[int, ...]] = []

    def decode(tile: torch.Tensor) -> torch.Tensor:
        seen.append(tuple(tile.shape[-2:]))
        return nearest(tile)

    found = decode_in_tiles(decode, latents, 8)
    assert torch.allclose(found, nearest(latents), atol=1e-6)
    assert set(seen) == {(min(height, 8), min(width, 8))}, "no thin rests, and none larger"
    assert len(seen) > 1 or max(height, width) <= 8


def test_neighbours_fade_into_each_other() -> None:
    """Tiles of different brightness: no step between two pixels is larger than the difference by the pixels of the overlap."""
    brightness = iter(range(100))
    found = decode_in_tiles(lambda tile: torch.full_like(nearest(tile), next(brightness)), torch.zeros(1, 4, 1, 8, 26), 8)
    row = found[0, 0, 0, 0]
    assert row[0] == 0
    assert row.diff().abs().max() <= 1 / 8 + 1e-6, "the overlap is 2 latents of 4 pixels"
    assert row.diff().min() >= -1e-6


@pytest.mark.parametrize(
    ("size", "own", "sides"),
    [((480, 832), None, (512, 256, 128)), ((256, 512), None, (256, 128)), ((480, 832), 256, (128,)), ((64, 64), None, ())],
)
def test_tiles_are_smaller_than_what_there_is_without_them(size: tuple[int, int], own: int | None, sides: tuple[int, ...]) -> None:
    assert sides_below(*size, own) == sides


@pytest.mark.parametrize(("family", "vae"), VAES, ids=[vae.id for _, vae in VAES])
def test_every_vae_decodes_in_tiles(family: Family, vae: Vae) -> None:
    """Of random weights, which make much of what lies beyond an edge: two pictures that have nothing in common differ by 1.1."""
    module = tiny_vae_of(family, vae)
    for name, parameter in module.named_parameters():
        if "per_channel_scale" in name:  # noise that the decoder of LTX 0.9.1 adds, drawn for each tile
            parameter.zero_()
    latent = family.latent(next(variant for variant in family.variants if vae.fits(variant)))
    side = 3 if latent.spatial_stride == 32 else 6
    latents = torch.randn(
        1, latent.channels, 1 if family.id == "hunyuan" else 2, side, side * 3 // 2, generator=torch.Generator().manual_seed(0)
    )
    (whole,) = decode_frames(family, module, latents)
    (tiled,) = decode_frames(family, module, latents, tile=side)
    assert tiled.shape == whole.shape
    difference = (tiled.float() - whole.float()).abs().mean() / whole.float().std()
    assert 0 < difference < 0.35


def test_a_trained_vae_decodes_in_tiles_what_it_decodes_whole() -> None:
    """The demo's: two tiles of 10 of 16 latents, which differ from the whole by less than half a level of 255 in the mean."""
    family = families()["wan"]
    checkpoint = Checkpoint.open(VAE, "vae")
    module = load_vae(checkpoint, detect_vae(checkpoint, family), "cpu")
    frames_FHWC = torch.from_numpy(render(random_scenes(1, seed=0)[0]))
    pixels = (frames_FHWC.permute(3, 0, 1, 2)[None].float() / 127.5 - 1).repeat(1, 1, 1, 1, 2)
    latents = family.encode_video(module, pixels)
    (whole,) = decode_frames(family, module, latents)
    (tiled,) = decode_frames(family, module, latents, tile=latents.shape[-1] * 2 // 3)
    difference = (tiled.float() - whole.float()).abs()
    assert whole.float().std() > 40
    assert 0 < difference.mean() < 0.5
    assert difference.max() < 20
