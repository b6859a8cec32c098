"""A linear codec of 16 numbers a block, by PCA: it defines the latents of the tiny VAE and transformer.

A block is 8x8 pixels of the first frame, or of four later frames. The codec alone reaches 35.7 dB on first frames and
29.6 dB on later ones. Being a matrix product, it lets the transformer's training start before there is a VAE.

Shape suffixes: B batch, F frames, H height, W width, C channels, f, h, w latent frames, height and width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

CHANNELS = 16
BLOCK = 8  # pixels
CHUNK = 4  # frames


@dataclass(frozen=True)
class BlockCodec:
    """Encode `(block - mean) @ encode`, decode `latent @ decode + mean`; the latents have mean 0 and variance 1."""

    mean: torch.Tensor
    encode: torch.Tensor  # (values of a block, 16)
    decode: torch.Tensor  # (16, values of a block)

    @classmethod
    def fit(cls, blocks: torch.Tensor) -> BlockCodec:
        """The 16 leading principal components of `blocks` (count, values), whitened."""
        mean = blocks.mean(0)
        covariance = (blocks - mean).T @ (blocks - mean) / len(blocks)
        variances, directions = torch.linalg.eigh(covariance.double())
        spread, directions = variances.flip(0)[:CHANNELS].sqrt(), directions.flip(1)[:, :CHANNELS]
        return cls(mean, (directions / spread).float(), (directions * spread).T.float())

    def rotated_towards(self, blocks: torch.Tensor, targets: torch.Tensor) -> BlockCodec:
        """The same codec, its latents rotated to lie as near as possible to `targets` (Procrustes)."""
        left, _, right = torch.linalg.svd(((blocks - self.mean) @ self.encode).T @ targets)
        rotation = left @ right
        return BlockCodec(self.mean, self.encode @ rotation, rotation.T @ self.decode)

    def metric(self) -> torch.Tensor:
        """(16, 16): what an error of the latents costs, half by itself and half in pixels; its trace is 16."""
        gram = self.decode @ self.decode.T
        return 0.5 * torch.eye(CHANNELS) + 0.5 * gram * CHANNELS / gram.trace()


@dataclass(frozen=True)
class ClipCodec:
    """Clips of 4n + 1 frames to latents and back."""

    first: BlockCodec
    later: BlockCodec

    @classmethod
    def fit(cls, clips_BFHWC: torch.Tensor) -> ClipCodec:
        """Fit to clips in -1..1. Chunks' latents are rotated towards a frame's: less for a decoder to learn."""
        first_blocks = cut(clips_BFHWC[:, :1]).flatten(0, 1)
        chunks = [cut(clips_BFHWC[:, start : start + CHUNK]) for start in range(1, clips_BFHWC.shape[1], CHUNK)]
        first, later = BlockCodec.fit(first_blocks), BlockCodec.fit(torch.cat(chunks).flatten(0, 1))
        frames = (cut(clips_BFHWC[:, 3:4]).flatten(0, 1) - first.mean) @ first.encode
        return cls(first, later.rotated_towards(chunks[0].flatten(0, 1), frames))

    def encode(self, clips_BFHWC: torch.Tensor) -> torch.Tensor:
        """Latents (B, 16, f, h, w) of clips in -1..1."""
        frames, height, width = clips_BFHWC.shape[1:4]
        latents = [(cut(clips_BFHWC[:, :1]) - self.first.mean) @ self.first.encode]
        for start in range(1, frames, CHUNK):
            latents.append((cut(clips_BFHWC[:, start : start + CHUNK]) - self.later.mean) @ self.later.encode)
        stacked = torch.stack(latents, 1).view(-1, len(latents), height // BLOCK, width // BLOCK, CHANNELS)
        return stacked.permute(0, 4, 1, 2, 3).contiguous()

    def decode(self, latents_BCfhw: torch.Tensor) -> torch.Tensor:
        """Clips (B, F, H, W, 3), about -1..1."""
        rows, columns = latents_BCfhw.shape[3:]
        first, *later = latents_BCfhw.permute(2, 0, 3, 4, 1).flatten(2, 3)
        clips = [paste(first @ self.first.decode + self.first.mean, 1, rows, columns)]
        clips += [paste(latent @ self.later.decode + self.later.mean, CHUNK, rows, columns) for latent in later]
        return torch.cat(clips, 1)

    def metric_roots(self, latent_frames: int) -> torch.Tensor:
        """(f, 16, 16): `error @ root`, squared and summed, is the error in each latent frame's metric."""
        metrics = [self.first.metric()] + [self.later.metric()] * (latent_frames - 1)
        roots: torch.Tensor = torch.linalg.cholesky(torch.stack(metrics))
        return roots


def cut(frames_BFHWC: torch.Tensor) -> torch.Tensor:
    """(B, blocks, F * 8 * 8 * 3)."""
    batch, frames, height, width, channels = frames_BFHWC.shape
    parts = frames_BFHWC.reshape(batch, frames, height // BLOCK, BLOCK, width // BLOCK, BLOCK, channels)
    return parts.permute(0, 2, 4, 1, 3, 5, 6).flatten(3).flatten(1, 2)


def paste(blocks: torch.Tensor, frames: int, rows: int, columns: int) -> torch.Tensor:
    """The inverse of `cut`: (B, F, H, W, 3)."""
    parts = blocks.reshape(len(blocks), rows, columns, frames, BLOCK, BLOCK, 3)
    return parts.permute(0, 3, 1, 4, 2, 5, 6).reshape(len(blocks), frames, rows * BLOCK, columns * BLOCK, 3)
