"""A family of its own making, as a file in `trainers/families/` is: a test puts it there (see test_toy_family.py).

Its transformer and its VAE are not diffusers'. The model is fed the share of the clean video (1 - sigma) and answers with the
clean video itself, so the velocity is worked out here; a native file stacks the projections of attention in one tensor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..family import (
    ComfyNames,
    Conditions,
    Detection,
    Family,
    FirstFrameRule,
    LatentSpec,
    LoraTargets,
    ModelInput,
    PrecisionName,
    Sampling,
    TextBatch,
    TextFolder,
    TextRecord,
    Trial,
    Vae,
    VaeDetection,
    Variant,
)
from ..keytable import Fuse, KeyTable, Rename
from ..offload.chunks import ChunkedForward

if TYPE_CHECKING:
    from ..checkpoint import Checkpoint

LATENT = LatentSpec(6, temporal_stride=2, spatial_stride=8, spatial_step=8, fps=8.0, mean=(0.0,) * 6, std=(1.0,) * 6)
KEYS = KeyTable(
    (
        Rename("patches", "toy_in"),
        Rename("captions", "toy_text"),
        Rename("time", "toy_time"),
        Fuse(("blocks.{}.to_q", "blocks.{}.to_k", "blocks.{}.to_v"), "layers.{}.qkv"),
        Rename("blocks.{}.to_out", "layers.{}.out"),
        Rename("pixels", "toy_out"),
    )
)
VAE_KEYS = KeyTable((Rename("encoder", "toy_encoder"), Rename("decoder", "toy_decoder")))
_TOY = Variant("toy-1", "Toy 1")
_VAE = Vae("toy", "Toy VAE", VAE_KEYS)


class Block(nn.Module):
    """Attention of one head over video and text together."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, tokens_BND: torch.Tensor) -> torch.Tensor:
        heads = (layer(tokens_BND)[:, None] for layer in (self.to_q, self.to_k, self.to_v))
        attended_BND: torch.Tensor = nn.functional.scaled_dot_product_attention(*heads)[:, 0]
        return tokens_BND + self.to_out(attended_BND)


class ToyTransformer(nn.Module):
    """Latents, times and captions to the clean latents."""

    def __init__(self, width: int, channels: int, text_dim: int, layers: int) -> None:
        super().__init__()
        self.patches, self.captions, self.time = nn.Linear(channels, width), nn.Linear(text_dim, width), nn.Linear(1, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.pixels = nn.Linear(width, channels)

    def forward(self, latents_BCFHW: torch.Tensor, clean_share_B: torch.Tensor, text_BLD: torch.Tensor) -> torch.Tensor:
        video_BND = self.patches(latents_BCFHW.flatten(2).transpose(1, 2)) + self.time(clean_share_B[:, None])[:, None]
        tokens_BND = torch.cat([video_BND, self.captions(text_BLD)], dim=1)
        for block in self.blocks:
            tokens_BND = block(tokens_BND)
        clean_BNC: torch.Tensor = self.pixels(tokens_BND[:, : video_BND.shape[1]])
        return clean_BNC.transpose(1, 2).unflatten(2, latents_BCFHW.shape[2:])


class ToyVae(nn.Module):
    """One convolution each way; the first frame stands twice, so that 2n + 1 frames are n + 1 latent frames."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.encoder = nn.Conv3d(3, channels, (2, 8, 8), (2, 8, 8))
        self.decoder = nn.ConvTranspose3d(channels, 3, (2, 8, 8), (2, 8, 8))


class Toy:
    """The Family protocol for Toy."""

    id = "toy"
    title = "Toy"
    variants: tuple[Variant, ...] = (_TOY,)
    keys = KEYS
    vaes: tuple[Vae, ...] = (_VAE,)
    lora_keys = KEYS
    targets = LoraTargets(attention=(r"^blocks\.\d+\.to_([qkv]|out)$",), feed_forward=())
    blocks: tuple[str, ...] = ("blocks",)
    precisions: tuple[PrecisionName, ...] = ("bf16", "fp32")
    chunked: tuple[ChunkedForward, ...] = ()
    control = None
    trial = Trial(1, 16, masked=False, config={"width": 16, "channels": 6, "text_dim": 16, "layers": 2}, patch_side=1)

    def latent(self, variant: Variant) -> LatentSpec:
        return LATENT

    def sampling(self, variant: Variant) -> Sampling:
        return Sampling(steps=4, shift=1.0, cfg=2.0)

    def comfyui(self, variant: Variant) -> ComfyNames:
        return ComfyNames("TOY", "Toy", "ToyTokenizer", ("ToyVae",))

    def first_frame(self, variant: Variant) -> FirstFrameRule | None:
        return None

    def detect(self, checkpoint: Checkpoint) -> Detection | None:
        shapes = {name: stored.shape for name, stored in checkpoint.tensors.items()}
        if "toy_in.weight" not in shapes:
            return None
        layers = len({place.name.split(".")[1] for place in map(KEYS.to_native, KEYS.map_file(shapes)) if "layers." in place.name})
        width, channels = shapes["toy_in.weight"]
        config = {"width": width, "channels": channels, "text_dim": shapes["toy_text.weight"][1], "layers": layers}
        return Detection(FAMILY, (_TOY,), config, reason=f"{layers} toy layers")

    def build(self, config: Mapping[str, Any]) -> nn.Module:
        with torch.device("meta"):
            return ToyTransformer(**config)

    def detect_vae(self, checkpoint: Checkpoint) -> VaeDetection | None:
        if "toy_decoder.weight" not in checkpoint.tensors:
            return None
        return VaeDetection(FAMILY, _VAE, {"channels": checkpoint.tensors["toy_decoder.weight"].shape[0]})

    def build_vae(self, detection: VaeDetection) -> nn.Module:
        with torch.device("meta"):
            return ToyVae(**detection.config)

    @torch.no_grad()
    def encode_video(self, vae: nn.Module, pixels_BCFHW: torch.Tensor) -> torch.Tensor:
        latents: torch.Tensor = vae.encoder(torch.cat([pixels_BCFHW[:, :, :1], pixels_BCFHW], dim=2))
        return latents

    @torch.no_grad()
    def decode_video(self, vae: nn.Module, latents_BCFHW: torch.Tensor) -> torch.Tensor:
        pixels: torch.Tensor = vae.decoder(latents_BCFHW.float())
        return pixels[:, :, 1:].clamp(-1.0, 1.0)

    @torch.no_grad()
    def encode_text(
        self, variant: Variant, folder: TextFolder, prompts: Sequence[str], image_HWC: torch.Tensor | None = None
    ) -> list[TextRecord]:
        tokenizer, encoder = folder.tokenizer(), folder.text_encoder()
        return [TextRecord(encoder(**tokenizer(prompt, return_tensors="pt")).last_hidden_state[0]) for prompt in prompts]

    def encode_image(self, folder: TextFolder, image_HWC: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def text_width(self, config: Mapping[str, Any]) -> int:
        return int(config["text_dim"])

    def collate_text(self, records: Sequence[TextRecord], device: torch.device, dtype: torch.dtype) -> TextBatch:
        return TextBatch(nn.utils.rnn.pad_sequence([record.embeds_LD for record in records], batch_first=True).to(device, dtype))

    def required(self, variant: Variant) -> frozenset[str]:
        return frozenset({"latents"})

    def prepare(self, variant: Variant, noisy_BCFHW: torch.Tensor, sigma_B: torch.Tensor, conditions: Conditions) -> ModelInput:
        return ModelInput(noisy_BCFHW, timesteps=1.0 - sigma_B)

    def predict(self, transformer: nn.Module, inputs: ModelInput, text: TextBatch) -> torch.Tensor:
        """The noisy video is clean + sigma * (noise - clean)."""
        dtype = text.embeds_BLD.dtype
        clean_BCFHW = transformer(inputs.latents_BCFHW.to(dtype), inputs.timesteps.to(dtype), text.embeds_BLD).float()
        sigma_B = (1.0 - inputs.timesteps).clamp(min=0.01)
        velocity: torch.Tensor = (inputs.latents_BCFHW - clean_BCFHW) / sigma_B.view(-1, 1, 1, 1, 1)
        return velocity

    def cost(self, config: Mapping[str, Any], latent_shape: tuple[int, int, int, int], text_tokens: int) -> float:
        _, frames, height, width = latent_shape
        tokens = frames * height * width + text_tokens
        return float(2 * config["layers"] * tokens * config["width"] * (4 * config["width"] + 2 * tokens))


FAMILY: Family = Toy()
