"""What the variants of Wan get beside text and noise, and what they make of it."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from closeness import assert_near
from safetensors.torch import load_file, save_file
from tiny import TinyShape
from wan_models import CHANNELS, NAMES, VARIANTS, Question, config_of, open_variant, write_variant

from trainers.checkpoint import Checkpoint
from trainers.families._wan_variants import LATENT_2_2
from trainers.families.wan import FAMILY
from trainers.family import FIRST_FRAME_CLIP, IMAGE_EMBEDS, Conditions, FirstFrameRule, TextBatch, TextRecord
from trainers.flow import noised, velocity_loss
from trainers.job import LoraSpec
from trainers.load import load_vae, native_state
from trainers.lora import adapter_state, inject
from trainers.lora_format import write_lora
from trainers.sample import Solver, sample_latents

SHAPE = TinyShape(text_dim=32)
I2V = ("wan2.1-i2v", "wan2.2-i2v")
REQUIRED = {
    "wan2.1-t2v": {"latents"},
    "wan2.2-t2v": {"latents"},
    "wan2.2-ti2v": {"latents"},
    "wan2.2-i2v": {"latents", FIRST_FRAME_CLIP},
    "wan2.1-i2v": {"latents", FIRST_FRAME_CLIP, IMAGE_EMBEDS},
}
PUBLISHED_AS = {"wan2.1-t2v": "wan2.1-t2v-14b", "wan2.2-t2v": "wan2.2-t2v-a14b", "wan2.2-ti2v": "wan2.2-ti2v-5b"}
PUBLISHED_AS |= {"wan2.2-i2v": "wan2.2-i2v-a14b", "wan2.1-i2v": "wan2.1-i2v-14b"}


def question(variant: str, first_frame: bool = True) -> Question:
    return Question.of(variant, first_frame, text_dim=SHAPE.text_dim)


def model(folder: Path, variant: str) -> torch.nn.Module:
    return open_variant(write_variant(folder, variant, SHAPE))[1]


@pytest.mark.parametrize(("variant", "published"), PUBLISHED_AS.items())
def test_the_published_sizes_are_as_the_others(variant: str, published: str) -> None:
    small, real = VARIANTS[variant], VARIANTS[published]
    assert FAMILY.required(small) == FAMILY.required(real) == REQUIRED[variant]
    assert (FAMILY.latent(small), FAMILY.first_frame(small)) == (FAMILY.latent(real), FAMILY.first_frame(real))
    assert (FAMILY.comfyui(small), FAMILY.sampling(small), small.boundary) == (FAMILY.comfyui(real), FAMILY.sampling(real), real.boundary)


def test_how_first_frames_are_trained() -> None:
    rules = {variant: FAMILY.first_frame(VARIANTS[variant]) for variant in CHANNELS}
    assert rules == {
        "wan2.1-t2v": None,
        "wan2.2-t2v": None,
        "wan2.2-ti2v": FirstFrameRule(0.5),
        "wan2.2-i2v": FirstFrameRule(1.0, always=True),
        "wan2.1-i2v": FirstFrameRule(1.0, always=True),
    }


def test_5b_has_latents_of_its_own() -> None:
    assert LATENT_2_2.shape(121, 704, 1280) == (48, 31, 44, 80)
    assert LATENT_2_2.tokens(121, 704, 1280) == 31 * 22 * 40
    assert "Use 704 or 736" in str(LATENT_2_2.problems(121, 720, 1280)[0])
    assert "Use 77 or 81" in str(LATENT_2_2.problems(80, 704, 1280)[0])
    assert FAMILY.latent(VARIANTS["wan2.2-ti2v-5b"]) is LATENT_2_2
    assert FAMILY.comfyui(VARIANTS["wan2.2-ti2v-5b"]).latent_format == "Wan22"


@pytest.mark.parametrize("variant", I2V)
def test_i2v_gets_mask_and_clip_beside_the_noise(variant: str) -> None:
    asked = question(variant)
    inputs = FAMILY.prepare(asked.variant, asked.noise_BCFHW, torch.tensor([0.7]), asked.conditions)
    noise, mask, clip = inputs.latents_BCFHW.split((16, 4, 16), dim=1)
    assert torch.equal(noise, asked.noise_BCFHW)
    assert torch.equal(clip, asked.conditions.tensors[FIRST_FRAME_CLIP])
    assert mask[:, :, 0].eq(1).all()
    assert not mask[:, :, 1:].any()
    assert inputs.timesteps.tolist() == [pytest.approx(700)]
    assert inputs.loss_mask is None, "every frame is predicted"
    assert inputs.extra.keys() == ({IMAGE_EMBEDS} if variant == "wan2.1-i2v" else set())


def test_ti2v_keeps_the_first_frames_that_are_asked_for() -> None:
    asked = question("wan2.2-ti2v")
    noisy, first = asked.noise_BCFHW.repeat(2, 1, 1, 1, 1), asked.clean_BCFHW.repeat(2, 1, 1, 1, 1)[:, :, :1]
    conditions = Conditions({"first_frame": first}, torch.tensor([False, True]))
    inputs = FAMILY.prepare(asked.variant, noisy, torch.tensor([0.25, 0.5]), conditions)
    assert torch.equal(inputs.latents_BCFHW[0], noisy[0])
    assert torch.equal(inputs.latents_BCFHW[1, :, :1], first[1])
    assert torch.equal(inputs.latents_BCFHW[1, :, 1:], noisy[1, :, 1:])
    assert inputs.timesteps[0].tolist() == [250.0] * 36
    assert inputs.timesteps[1].tolist() == [0.0] * 12 + [500.0] * 24
    assert inputs.loss_mask is not None
    assert inputs.loss_mask.expand(2, 48, 3, 8, 6)[:, 0, :, 0, 0].tolist() == [[1, 1, 1], [0, 1, 1]]


def test_ti2v_without_a_first_frame_has_one_time_for_each_sample() -> None:
    asked = question("wan2.2-ti2v")
    inputs = FAMILY.prepare(asked.variant, asked.noise_BCFHW, torch.tensor([0.5]), replace(asked.conditions, first_frame_B=None))
    assert inputs.timesteps.tolist() == [500.0]
    assert inputs.loss_mask is None
    assert torch.equal(inputs.latents_BCFHW, asked.noise_BCFHW)


@pytest.mark.parametrize("variant", CHANNELS)
def test_ten_steps_lower_the_loss(tmp_path: Path, variant: str) -> None:
    """The velocity has the sign and scale of noise - clean, where it is predicted."""
    transformer, asked = model(tmp_path, variant).requires_grad_(True), question(variant)
    for name, parameter in transformer.named_parameters():  # what is mapped from the file is read-only
        transformer.get_submodule(name.rpartition(".")[0]).register_parameter(
            name.rpartition(".")[2], torch.nn.Parameter(parameter.clone())
        )
    optimizer = torch.optim.AdamW(transformer.parameters(), lr=1e-3)
    sigma_B = torch.tensor([asked.sigma])
    inputs = FAMILY.prepare(asked.variant, noised(asked.clean_BCFHW, asked.noise_BCFHW, sigma_B), sigma_B, asked.conditions)
    losses = []
    for _ in range(10):
        velocity = FAMILY.predict(transformer, inputs, TextBatch(asked.text_BLD))
        loss = velocity_loss(velocity, asked.noise_BCFHW - asked.clean_BCFHW, inputs.loss_mask)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("variant", CHANNELS)
def test_cost_counts_what_torch_counts(tmp_path: Path, variant: str) -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    transformer, asked = model(tmp_path, variant), question(variant, first_frame=False)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        asked.velocity(transformer, asked.noise_BCFHW)
    assert FAMILY.cost(config_of(variant, SHAPE), tuple(asked.clean_BCFHW.shape[1:]), 512) == counter.get_total_flops()


@pytest.mark.parametrize("variant", CHANNELS)
def test_native_to_diffusers_and_back_is_the_same_file(tmp_path: Path, variant: str) -> None:
    path = write_variant(tmp_path, variant, SHAPE)
    again = native_state(open_variant(path)[1].state_dict(), FAMILY.keys)
    save_file({name: again[name].clone() for name in load_file(path)}, tmp_path / "again")
    save_file(load_file(path), tmp_path / "before")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "before").read_bytes()


def test_a_preview_gives_the_first_frame_back_as_it_was(tmp_path: Path) -> None:
    transformer, asked = model(tmp_path, "wan2.2-ti2v"), question("wan2.2-ti2v")
    solver = Solver.of(FAMILY, asked.variant, 2, None, None, tokens=36)
    texts = [TextRecord(text[0]) for text in (asked.text_BLD, asked.negative_BLD)]
    found = sample_latents(
        FAMILY,
        asked.variant,
        lambda _: transformer,
        asked.noise_BCFHW,
        [texts[0]],
        texts[1],
        solver,
        torch.float32,
        conditions=asked.conditions,
    )
    assert torch.equal(found[:, :, 0], asked.clean_BCFHW[:, :, 0])
    assert not torch.equal(found[:, :, 1], asked.clean_BCFHW[:, :, 1])


def test_the_schedule_is_that_of_the_shipped_graphs() -> None:
    """20 steps of "simple" under shift 8: sigma at the switch of A14B's template, after ten steps, is 0.889."""
    sigmas = Solver.of(FAMILY, VARIANTS["wan2.2-t2v-a14b"], None, None, None, tokens=1).sigmas
    assert len(sigmas) == 21
    assert (sigmas[0], sigmas[-1]) == (1.0, 0.0)
    assert sigmas[10] == pytest.approx(8 / 9)


@pytest.mark.parametrize("variant", CHANNELS)
def test_the_pipelines_of_diffusers_load_the_lora(tmp_path: Path, variant: str) -> None:
    """Equal answers; the low-noise expert's is loaded into the second transformer."""
    from diffusers import WanImageToVideoPipeline, WanPipeline

    asked, spec, trained = question(variant), LoraSpec(rank=4), model(tmp_path, variant)
    noisy = asked.noise_BCFHW
    base_answer = asked.velocity(trained, noisy)
    with torch.no_grad():
        for parameter in inject(trained, FAMILY, spec, seed=0):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())))
    expected = asked.velocity(trained, noisy)
    assert (expected - base_answer).abs().max() > 0.01
    write_lora(tmp_path / "lora.safetensors", adapter_state(trained, spec), FAMILY)

    blank = open_variant(tmp_path / NAMES.get(variant, f"{variant}.safetensors"))[1]
    parts = {"tokenizer": None, "text_encoder": None, "vae": None, "scheduler": None, "transformer": blank}
    low_noise = "low_noise" in NAMES.get(variant, "")
    if variant in I2V:
        pipeline = WanImageToVideoPipeline(**parts, image_encoder=None, image_processor=None)
    else:
        pipeline = WanPipeline(**parts, transformer_2=copy.deepcopy(blank) if low_noise else None)
    pipeline.load_lora_weights(
        str(tmp_path), weight_name="lora.safetensors", local_files_only=True, **({"load_into_transformer_2": True} if low_noise else {})
    )
    answers = [asked.velocity(part, noisy) for part in (pipeline.transformer, pipeline.transformer_2) if part is not None]
    assert torch.equal(answers[-1], expected)
    assert torch.equal(answers[0], base_answer if low_noise else expected)


# The VAE of 2.2


def tiny_vae_2_2() -> torch.nn.Module:
    from diffusers import AutoencoderKLWan

    torch.manual_seed(0)
    sizes = {"base_dim": 4, "decoder_base_dim": 8, "z_dim": 48, "in_channels": 12, "out_channels": 12, "patch_size": 2}
    return AutoencoderKLWan(**sizes, is_residual=True, scale_factor_spatial=16).requires_grad_(False).eval()


def test_its_latents_are_normalised_by_its_own_statistics() -> None:
    vae = tiny_vae_2_2()
    pixels = torch.rand(1, 3, 5, 32, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = FAMILY.encode_video(vae, pixels)
    assert latents.shape == (1, *LATENT_2_2.shape(5, 32, 64))
    mean, std = (torch.tensor(values).view(1, 48, 1, 1, 1) for values in (LATENT_2_2.mean, LATENT_2_2.std))
    posterior = vae.encode(pixels).latent_dist
    assert_near(latents * std + mean, posterior.mean, share=1e-6)
    decoded = FAMILY.decode_video(vae, latents)
    assert decoded.shape == pixels.shape
    assert_near(decoded, vae.decode(posterior.mean).sample)
    # Latent 0 of a clip is its first frame.
    first_alone = FAMILY.encode_video(vae, pixels[:, :, :1])
    assert_near(first_alone, latents[:, :, :1])


@pytest.mark.parametrize("kind", ["wan2.1", "wan2.2"])
def test_vaes_go_from_native_to_diffusers_and_back_unchanged(tmp_path: Path, kind: str) -> None:
    from model_files import tiny_vae

    vae = tiny_vae_2_2() if kind == "wan2.2" else tiny_vae()
    keys = next(found.keys for found in FAMILY.vaes if found.id == kind)
    stored = {name: tensor.clone() for name, tensor in native_state(vae.state_dict(), keys).items()}
    save_file(stored, tmp_path / "vae.safetensors")
    checkpoint = Checkpoint.open(tmp_path / "vae.safetensors", "vae")
    detection = FAMILY.detect_vae(checkpoint)
    assert detection is not None
    assert detection.vae.id == kind
    again = native_state(load_vae(checkpoint, detection, "cpu").state_dict(), keys)
    save_file({name: again[name].clone() for name in stored}, tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "vae.safetensors").read_bytes()


def test_a_vae_of_2_2_in_a_diffusers_folder(tmp_path: Path) -> None:
    tiny_vae_2_2().save_pretrained(tmp_path / "vae")
    checkpoint = Checkpoint.open(tmp_path, "vae")
    detection = FAMILY.detect_vae(checkpoint)
    assert detection is not None
    assert detection.vae.id == "wan2.2"
    pixels = torch.rand(1, 3, 1, 32, 32)
    torch.testing.assert_close(
        FAMILY.encode_video(load_vae(checkpoint, detection, "cpu"), pixels), FAMILY.encode_video(tiny_vae_2_2(), pixels)
    )
