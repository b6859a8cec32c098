"""Tiny Mochi models with random weights, for tests."""

from __future__ import annotations

import torch

from trainers.families.mochi import FAMILY
from trainers.load import native_state

MOCHI, MOCHI_VAE = "mochi_preview", "vae_mochi"
TINY_MOCHI = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 2,
    "pooled_projection_dim": 24,
    "text_embed_dim": 32,
    "time_embed_dim": 32,
}
TINY_MOCHI_VAE = {"encoder_block_out_channels": (32, 64, 96, 128), "decoder_block_out_channels": (32, 64, 96, 128)}


def tiny_mochi(seed: int = 0, **changes: object) -> torch.nn.Module:
    """A random MochiTransformer3DModel of 2 blocks and width 32, in which every part counts."""
    from diffusers import MochiTransformer3DModel

    torch.manual_seed(seed)
    transformer = MochiTransformer3DModel(**(TINY_MOCHI | changes))
    with torch.no_grad():
        for parameter in transformer.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
        transformer.pos_frequencies.normal_()
    return transformer.requires_grad_(False).eval()


def tiny_mochi_vae(seed: int = 0, **changes: object) -> torch.nn.Module:
    """A random AutoencoderKLMochi of few channels (32 is the least that its norms take)."""
    from diffusers import AutoencoderKLMochi

    torch.manual_seed(seed)
    vae = AutoencoderKLMochi(**(TINY_MOCHI_VAE | changes))
    with torch.no_grad():
        for parameter in vae.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return vae.requires_grad_(False).eval()


def native_vae(vae: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A VAE as a native file holds it."""
    return native_state(vae.state_dict(), FAMILY.vaes[0].keys)
