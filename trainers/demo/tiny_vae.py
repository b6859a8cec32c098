"""The tiny VAE: Wan 2.1's architecture at width 8, regressed onto a linear codec.

From scratch, by reconstruction, so small a VAE stays grey. Here the latents are given (`codec.py`): the decoder learns
pixels from latents plus noise, then the encoder learns the latents. Training runs whole clips at once, which equals
the class's own chunk-by-chunk way, and leaves four residual blocks at full and half size as they start: identities.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders import autoencoder_kl_wan as wan
from torch import nn

WIDTH = 8
LATENT_NOISE = 0.08  # standard deviation; the decoder must bear what sampling leaves
LOG_VARIANCE = -10.0  # of the posterior, in normalised latents


def build_vae(seed: int) -> AutoencoderKLWan:
    """A VAE whose variance is kept from layer to layer and whose residual branches start at zero."""
    torch.manual_seed(seed)
    vae = AutoencoderKLWan(base_dim=WIDTH, z_dim=16)
    for module in vae.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            nn.init.normal_(module.weight, 0, _fan_in(module.weight) ** -0.5)
            assert module.bias is not None
            module.bias.data.zero_()
    for module in vae.modules():
        if isinstance(module, wan.WanResidualBlock):
            nn.init.normal_(module.conv1.weight, 0, (1.8 / _fan_in(module.conv1.weight)) ** 0.5)
            nn.init.zeros_(module.conv2.weight)
        if isinstance(module, wan.WanAttentionBlock):
            nn.init.zeros_(module.proj.weight)
        if isinstance(module, wan.WanResample) and hasattr(module, "time_conv"):
            _start_with_present(module.time_conv.weight, tap=2 if module.mode == "upsample3d" else 1)
    return vae


def _fan_in(weight: torch.Tensor) -> int:
    return weight[0].numel()


@torch.no_grad()
def _start_with_present(weight: torch.Tensor, tap: int) -> None:
    """Let a convolution over time begin as a copy of the frame at `tap`, with a little noise."""
    nn.init.normal_(weight, 0, 0.3 * _fan_in(weight) ** -0.5)
    for row in range(weight.shape[0]):
        weight[row, row % weight.shape[1], tap] += 1


def identity_blocks(vae: AutoencoderKLWan) -> list[nn.Module]:
    """The residual blocks that are left out of training; together they would cost as much as all others."""
    full, half = vae.decoder.up_blocks[3].resnets, vae.decoder.up_blocks[2].resnets
    return [full[1], full[2], half[2], vae.encoder.down_blocks[1]]


def trained_parameters(vae: AutoencoderKLWan, part: str) -> list[nn.Parameter]:
    """The parameters of the "decoder" or the "encoder" that training moves."""
    modules = [vae.decoder, vae.post_quant_conv] if part == "decoder" else [vae.encoder, vae.quant_conv]
    left_out = {id(parameter) for block in identity_blocks(vae) for parameter in block.parameters()}
    return [p for module in modules for p in module.parameters() if id(p) not in left_out]


@contextmanager
def whole_clips(vae: AutoencoderKLWan) -> Iterator[None]:
    """Within, encoder and decoder take clips whole, without a cache, and skip the identity blocks."""
    left_out = {id(block) for block in identity_blocks(vae)}

    def residual(self: Any, x: torch.Tensor, feat_cache: Any = None, feat_idx: Any = None) -> torch.Tensor:
        if id(self) in left_out:
            return x
        hidden = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        output: torch.Tensor = hidden + self.conv_shortcut(x)
        return output

    originals = wan.WanResample.forward, wan.WanResidualBlock.forward
    wan.WanResample.forward, wan.WanResidualBlock.forward = _resample, residual
    try:
        yield
    finally:
        wan.WanResample.forward, wan.WanResidualBlock.forward = originals


def _resample(self: Any, x: torch.Tensor, feat_cache: Any = None, feat_idx: Any = None) -> torch.Tensor:
    """`WanResample.forward` for a whole clip (B, C, F, H, W); the first frame stays out of what happens in time."""
    if self.mode == "upsample3d":
        doubled = self.time_conv(x[:, :, 1:]).unflatten(1, (2, -1))
        x = torch.cat([x[:, :, :1], doubled.permute(0, 2, 3, 1, 4, 5).flatten(2, 3)], 2)
    batch, _, frames = x.shape[:3]
    x = self.resample(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (batch, frames)).transpose(1, 2)
    if self.mode == "downsample3d":
        x = torch.cat([x[:, :, :1], self.time_conv(x)], 2)
    return x


def decode(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    """Clips (B, 3, F, H, W), not clamped, from normalised latents; within `whole_clips`."""
    clips: torch.Tensor = vae.decoder(vae.post_quant_conv(latents))
    return clips


def encode(vae: AutoencoderKLWan, clips: torch.Tensor) -> torch.Tensor:
    """Means of the posterior; within `whole_clips`."""
    means: torch.Tensor = vae.quant_conv(vae.encoder(clips))[:, :16]
    return means


def decoder_loss(vae: AutoencoderKLWan, clips: torch.Tensor, latents: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """L1 + 2 MSE, and 2 L1 + 6 MSE of the chroma: without this term small decoders stay grey."""
    error = decode(vae, latents + LATENT_NOISE * noise) - clips
    chroma = error - error.mean(1, keepdim=True)
    return error.abs().mean() + 2 * error.square().mean() + 2 * chroma.abs().mean() + 6 * chroma.square().mean()


def encoder_loss(vae: AutoencoderKLWan, clips: torch.Tensor, latents: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """MSE + 0.3 L1 of the latents."""
    error = encode(vae, clips) - latents
    return error.square().mean() + 0.3 * error.abs().mean()


LOSSES: dict[str, Callable[[AutoencoderKLWan, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "decoder": decoder_loss,
    "encoder": encoder_loss,
}


def use_channels_last(vae: AutoencoderKLWan) -> None:
    """Lay the kernels out for the faster convolutions."""
    for module in vae.modules():
        if isinstance(module, nn.Conv3d):
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last_3d)
        elif isinstance(module, nn.Conv2d):
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def fold_constants(vae: AutoencoderKLWan) -> None:
    """Let the VAE give and take raw latents: (raw - mean) / std, with Wan's own constants, are normalised ones."""
    mean = torch.tensor(vae.config.latents_mean)
    std = torch.tensor(vae.config.latents_std)
    into, out_of = vae.quant_conv, vae.post_quant_conv
    into.weight[:16] *= std.view(-1, 1, 1, 1, 1)
    into.bias[:16] = into.bias[:16] * std + mean
    into.weight[16:] = 0
    into.bias[16:] = LOG_VARIANCE + 2 * std.log()
    out_of.bias -= out_of.weight.flatten(1) @ (mean / std)
    out_of.weight /= std.view(1, -1, 1, 1, 1)
