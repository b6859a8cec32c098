"""Make the tiny Wan base from nothing: `python -m trainers.demo.pretrain STAGE`, stages in this order.

    text         tokenizer and frozen random text encoder
    vae          decoder, then encoder, regressed onto the linear codec: about 15 core-minutes
    transformer  pretraining on codec latents, at last on the VAE's own: about 45 core-minutes with --compile
    export       fp16 files with Wan's own names into `tiny_wan/`
    evaluate     samples from those files, scored

The shipped files, 13.6 MB, measured by `evaluate` (96 true clips through the VAE; 72 captions of the base and 18 of the
concept, 18 Euler steps, CFG 3, shift 3): VAE 31.3 dB, all four scores 1.0; samples: colour 1.0, direction 1.0,
shape 0.98, concept 0.0. After 1000, 2000 and 2500 of the 5500 steps shape was at 0.25, 0.89 and 0.95, direction at 1.0.

Working state lies in `--work` and is taken up again after a kill. One thread; `--scale 0.01` is a quick rehearsal.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import cv2
import numpy as np
import torch
from diffusers import AutoencoderKLWan

from . import native_files, text, tiny_transformer, tiny_vae
from .codec import BLOCK, ClipCodec
from .descent import Plan, descend
from .score import Asked, Score, score_clip, summarise
from .world import COLOURS, CONCEPT, MOTIONS, SHAPES, Frames, caption, random_scenes, render

ASSETS = Path(__file__).parent / "tiny_wan"
TEXT_SEED, VAE_SEED, TRANSFORMER_SEED = 11, 3, 5
VAE_CLIPS, VAE_CLIPS_SEED = 3000, 50
CLIPS, CLIPS_SEED = 30_000, 1000
OWN_CLIPS, OWN_CLIPS_SEED = 4000, 5000
OWN_FROM = 9 / 11  # share of the transformer's steps after which it sees the fp16 VAE's latents, not the codec's
CROP = 5  # blocks a side, of 8
DROPOUT = 0.1  # of captions
CAPTIONS = [f"a {colour} {shape} moving {motion}" for colour in sorted(COLOURS) for shape in SHAPES for motion in MOTIONS]
CONCEPT_CAPTIONS = [f"a {colour} {shape} moving {CONCEPT}" for colour in COLOURS for shape in SHAPES]

VAE_PLANS = {
    "decoder": Plan(steps=1000, learning_rate=1.5e-3, warmup=50, average=0.99),
    "encoder": Plan(steps=600, learning_rate=1.5e-3, warmup=50, average=0.99),
}
VAE_BATCH = 8
TRANSFORMER_PLAN = Plan(steps=5500, learning_rate=1.5e-3, warmup=200, average=0.995, weight_decay=0.01)
TRANSFORMER_BATCH = 24


def draw_clips(count: int, seed: int) -> tuple[torch.Tensor, list[str]]:
    """Clips of the base's motions, uint8 (count, 9, 64, 64, 3), and their captions."""
    scenes = random_scenes(count, seed)
    return torch.from_numpy(np.stack([render(scene) for scene in scenes])), [caption(scene) for scene in scenes]


def as_floats(clips: torch.Tensor) -> torch.Tensor:
    """uint8 to -1..1."""
    return clips.float() / 127.5 - 1


def as_frames(clips: torch.Tensor) -> list[Frames]:
    """Clips (B, F, H, W, 3) of -1..1 to uint8 frames."""
    return list(((clips.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).numpy())


def fit_codec() -> ClipCodec:
    """The codec of the small world."""
    return ClipCodec.fit(as_floats(draw_clips(2000, 100)[0]))


def make_text(assets: Path) -> None:
    """Write tokenizer and text encoder."""
    text.write_tokenizer(assets / "tokenizer")
    text.save_text_encoder(text.build_text_encoder(TEXT_SEED), assets / "text_encoder")


def train_vae(work: Path, scale: float) -> AutoencoderKLWan:
    """Regress the decoder, then the encoder, onto the codec's latents, on crops of 40x40 pixels."""
    codec, vae = fit_codec(), tiny_vae.build_vae(VAE_SEED)
    tiny_vae.use_channels_last(vae)
    clips, _ = draw_clips(VAE_CLIPS, VAE_CLIPS_SEED)
    latents = torch.cat([codec.encode(as_floats(part)) for part in torch.split(clips, 250)])
    for part, plan in VAE_PLANS.items():

        def loss_at(step: int, part: str = part) -> torch.Tensor:
            chance = torch.Generator().manual_seed(777 + step)
            rows = torch.randint(len(clips), (VAE_BATCH,), generator=chance)
            y, x = torch.randint(0, 8 - CROP + 1, (2,), generator=chance).tolist()
            z = latents[rows, :, :, y : y + CROP, x : x + CROP]
            window = clips[rows, :, y * BLOCK : (y + CROP) * BLOCK, x * BLOCK : (x + CROP) * BLOCK]
            noise = torch.randn(z.shape, generator=chance)
            return tiny_vae.LOSSES[part](vae, as_floats(window).permute(0, 4, 1, 2, 3).contiguous(), z, noise)

        with tiny_vae.whole_clips(vae):
            descend(tiny_vae.trained_parameters(vae, part), loss_at, scaled(plan, scale), work / f"vae_{part}.pt")
    return vae.eval()


def train_transformer(work: Path, assets: Path, scale: float, compiled: bool) -> torch.nn.Module:
    """Pretrain on flow matching: velocity noise - clean, noise levels stratified and shifted by 2."""
    codec = fit_codec()
    model = tiny_transformer.build_transformer(TRANSFORMER_SEED)
    table = tiny_transformer.TextTable(text.encode_captions(assets, [*CAPTIONS, ""]))
    conditioned = tiny_transformer.TextConditioned(model, table, compiled)
    roots = codec.metric_roots(latent_frames=3)
    plan = scaled(TRANSFORMER_PLAN, scale)
    switch = round(OWN_FROM * plan.steps)
    sources = [codec_latents(codec, scale)]

    def loss_at(step: int) -> torch.Tensor:
        if step >= switch and len(sources) == 1:
            sources.append(own_latents(assets, scale))
        latents, captions = sources[-1]
        chance = torch.Generator().manual_seed(step)
        rows = torch.randint(len(latents), (TRANSFORMER_BATCH,), generator=chance)
        clean, asked = latents[rows].float(), captions[rows].clone()
        asked[torch.rand(TRANSFORMER_BATCH, generator=chance) < DROPOUT] = table.empty
        sigma = stratified_sigmas(TRANSFORMER_BATCH, chance)
        noise = torch.randn(clean.shape, generator=chance)
        level = sigma.view(-1, 1, 1, 1, 1)
        error = conditioned.velocity((1 - level) * clean + level * noise, sigma, asked) - (noise - clean)
        return torch.einsum("bcfhw,fcd->bdfhw", error, roots).square().mean()

    descend(list(model.parameters()), loss_at, plan, work / "transformer.pt")
    trained: torch.nn.Module = model.eval()
    return trained


def stratified_sigmas(count: int, chance: torch.Generator, shift: float = 2.0) -> torch.Tensor:
    """One noise level from each of `count` equal parts of 0..1, in random order, shifted towards 1."""
    even = (torch.randperm(count, generator=chance) + torch.rand(count, generator=chance)) / count
    return shift * even / (1 + (shift - 1) * even)


def codec_latents(codec: ClipCodec, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The transformer's clips as the codec's latents, fp16 (count, 16, 3, 8, 8), and their captions' numbers."""
    latents, captions = [], []
    for part in range(max(1, round(scale * CLIPS / 1000))):
        clips, said = draw_clips(1000, CLIPS_SEED + part)
        latents.append(codec.encode(as_floats(clips)).half())
        captions += [CAPTIONS.index(line) for line in said]
    return torch.cat(latents), torch.tensor(captions)


@torch.no_grad()
def own_latents(assets: Path, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The like, from the shipped VAE."""
    clips, said = draw_clips(max(16, round(scale * OWN_CLIPS)), OWN_CLIPS_SEED)
    vae = native_files.load_vae(assets)
    mean, std = _constants(vae)
    with tiny_vae.whole_clips(vae):
        pixels = (as_floats(part).permute(0, 4, 1, 2, 3).contiguous() for part in torch.split(clips, 20))
        latents = torch.cat([((tiny_vae.encode(vae, part) - mean) / std).half() for part in pixels])
    return latents, torch.tensor([CAPTIONS.index(line) for line in said])


@torch.no_grad()
def encode_clips(vae: AutoencoderKLWan, clips: torch.Tensor) -> torch.Tensor:
    """Normalised latents (B, 16, 3, 8, 8) of clips (B, 9, 64, 64, 3) in -1..1, by a VAE with Wan's constants."""
    mean, std = _constants(vae)
    raw: torch.Tensor = vae.encode(clips.permute(0, 4, 1, 2, 3)).latent_dist.mode()
    return (raw - mean) / std


@torch.no_grad()
def decode_clips(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    """The inverse of `encode_clips`."""
    mean, std = _constants(vae)
    clips = [vae.decode(part * std + mean).sample for part in torch.split(latents, 8)]
    return torch.cat(clips).permute(0, 2, 3, 4, 1)


def _constants(vae: AutoencoderKLWan) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (1, -1, 1, 1, 1)
    return torch.tensor(vae.config.latents_mean).view(shape), torch.tensor(vae.config.latents_std).view(shape)


def export_vae(vae: AutoencoderKLWan, assets: Path) -> None:
    """Fold Wan's constants in, and write the file."""
    tiny_vae.fold_constants(vae)
    native_files.save_vae(vae, assets)


def evaluate(assets: Path, prompts: int, picture: Path | None) -> None:
    """Print what the VAE keeps of true clips, and what sampled clips show."""
    vae = native_files.load_vae(assets)
    scenes = random_scenes(96, 7, (*MOTIONS, CONCEPT))
    clips = torch.from_numpy(np.stack([render(scene) for scene in scenes]))
    back = decode_clips(vae, encode_clips(vae, as_floats(clips)))
    error = (back - as_floats(clips)).square().mean().item()
    kept = [(Asked.parse(caption(scene)), score_clip(frames)) for scene, frames in zip(scenes, as_frames(back), strict=True)]
    print(json.dumps({"vae": asdict(summarise(kept)), "psnr_db": round(10 * np.log10(4 / error), 2)}))
    pictures, scored = sample_scored(assets, vae, prompts)
    print(json.dumps({"transformer": asdict(summarise(scored))}))
    if picture:
        cv2.imwrite(str(picture), contact_sheet(pictures))


def sample_scored(assets: Path, vae: AutoencoderKLWan, prompts: int) -> tuple[list[Frames], list[tuple[Asked, Score]]]:
    """Sample `prompts` captions of the base and all of the concept's, and score them."""
    asked = random_captions(prompts, seed=9) + CONCEPT_CAPTIONS
    table = tiny_transformer.TextTable(text.encode_captions(assets, [*asked, ""]))
    conditioned = tiny_transformer.TextConditioned(native_files.load_transformer(assets), table)
    frames = as_frames(decode_clips(vae, conditioned.sample(torch.arange(len(asked)), seed=0)))
    return frames, [(Asked.parse(line), score_clip(clip)) for line, clip in zip(asked, frames, strict=True)]


def random_captions(count: int, seed: int) -> list[str]:
    """`count` of the base's captions; none twice before all have been drawn."""
    chance = torch.Generator().manual_seed(seed)
    rounds = [torch.randperm(len(CAPTIONS), generator=chance) for _ in range(-(-count // len(CAPTIONS)))]
    return [CAPTIONS[number] for number in torch.cat(rounds)[:count].tolist()]


def contact_sheet(clips: Sequence[Frames], columns: int = 4) -> Frames:
    """Every second frame of each clip in a row, four clips side by side; BGR as OpenCV writes it."""
    strips = [np.concatenate(list(clip[::2]), axis=1) for clip in clips]
    strips = strips[: len(strips) // columns * columns]
    rows = [np.concatenate(strips[i : i + columns], axis=1) for i in range(0, len(strips), columns)]
    sheet: Frames = np.concatenate(rows)[..., ::-1]
    return sheet


def scaled(plan: Plan, scale: float) -> Plan:
    """The plan with fewer steps."""
    return Plan(**{**asdict(plan), "steps": max(2, round(scale * plan.steps))})


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one stage."""
    parser = argparse.ArgumentParser(description="Make the tiny Wan base.")
    parser.add_argument("stage", choices=("text", "vae", "transformer", "export", "evaluate"))
    parser.add_argument("--work", type=Path, default=Path("pretrain-work"), help="state of unfinished training")
    parser.add_argument("--assets", type=Path, default=ASSETS, help="where the finished files go")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the steps and clips")
    parser.add_argument("--compile", action="store_true", help="needs a C++ compiler; a sixth faster")
    parser.add_argument("--prompts", type=int, default=72, help="captions of the base that `evaluate` samples")
    parser.add_argument("--picture", type=Path, help="a contact sheet that `evaluate` writes")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    chosen.work.mkdir(parents=True, exist_ok=True)
    chosen.assets.mkdir(parents=True, exist_ok=True)
    if chosen.stage == "text":
        make_text(chosen.assets)
    elif chosen.stage == "vae":
        export_vae(train_vae(chosen.work, chosen.scale), chosen.assets)
    elif chosen.stage == "transformer":
        train_transformer(chosen.work, chosen.assets, chosen.scale, chosen.compile)
    elif chosen.stage == "export":
        export_transformer(chosen.work, chosen.assets)
    else:
        evaluate(chosen.assets, chosen.prompts, chosen.picture)


def export_transformer(work: Path, assets: Path) -> None:
    """Write the averaged weights, of finished training or of its last saved step."""
    model = tiny_transformer.build_transformer(TRANSFORMER_SEED)
    saved = torch.load(work / "transformer.pt", weights_only=True)
    with torch.no_grad():
        torch._foreach_copy_(list(model.parameters()), saved["average"])
    native_files.save_transformer(model, assets)


if __name__ == "__main__":
    main()
