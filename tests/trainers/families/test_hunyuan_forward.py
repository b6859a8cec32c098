"""HunyuanVideo's inputs and answers: what the transformer gets, text and video from a diffusers folder, LoRAs in diffusers."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from hunyuan_encoders import Folder, clip, image, image_processor, llama, llama_tokenizer, llava, word_tokenizer
from hunyuan_files import I2V_V1, I2V_V2, IMAGE, T2V, random_adapter, random_transformer

from trainers.families import hunyuan
from trainers.families.hunyuan import FAMILY, LATENT
from trainers.family import FIRST_FRAME, IMAGE_TEXT, Conditions, FirstFrameRule, TextBatch, TextRecord, Variant, family_of, simple_schedule
from trainers.flow import noised, velocity_loss
from trainers.lora_format import write_lora

ALL = [T2V, I2V_V1, I2V_V2]
SIGMA = torch.tensor([0.25, 1.0])


def variant_of(name: str) -> Variant:
    return family_of(name)[1]


def clips() -> tuple[torch.Tensor, torch.Tensor, Conditions]:
    generator = torch.Generator().manual_seed(0)
    clean, noise = (torch.randn(2, 16, 3, 4, 6, generator=generator) for _ in range(2))
    return clean, noise, Conditions({FIRST_FRAME: torch.randn(2, 16, 1, 4, 6, generator=generator)})


def text(batch: int = 2) -> TextBatch:
    generator = torch.Generator().manual_seed(1)
    records = [TextRecord(torch.randn(3 + index, 64, generator=generator), torch.randn(768, generator=generator)) for index in range(batch)]
    return FAMILY.collate_text(records, torch.device("cpu"), torch.float32)


def built(variant: str) -> torch.nn.Module:
    """The family's own module with random weights."""
    weights = random_transformer(variant)
    transformer = FAMILY.build(dict(weights.config))
    transformer.load_state_dict(weights.state_dict(), assign=True)
    return transformer.eval()


# What the transformer gets


@pytest.mark.parametrize("variant", ALL)
def test_times_and_guidance_in_thousandths(variant: str) -> None:
    clean, _, conditions = clips()
    prepared = FAMILY.prepare(variant_of(variant), clean, SIGMA, conditions)
    assert prepared.timesteps.tolist() == [250.0, 1000.0]
    assert prepared.extra["guidance"].tolist() == [6000.0, 6000.0]
    told = Conditions(conditions.tensors, guidance=1.0)
    assert FAMILY.prepare(variant_of(variant), clean, SIGMA, told).extra["guidance"].tolist() == [1000.0, 1000.0]


def test_text_to_video_gets_the_latents_as_they_are() -> None:
    clean, _, _ = clips()
    prepared = FAMILY.prepare(variant_of(T2V), clean, SIGMA, Conditions())
    assert torch.equal(prepared.latents_BCFHW, clean)
    assert prepared.loss_mask is None


def test_v1_gets_the_first_frame_beside_the_latents() -> None:
    clean, _, conditions = clips()
    prepared = FAMILY.prepare(variant_of(I2V_V1), clean, SIGMA, conditions)
    latents, image, mask = prepared.latents_BCFHW.split((16, 16, 1), dim=1)
    assert torch.equal(latents, clean)
    assert torch.equal(image[:, :, :1], conditions.tensors[FIRST_FRAME])
    assert not image[:, :, 1:].any()
    assert mask[:, :, 0].eq(1).all()
    assert not mask[:, :, 1:].any()
    assert prepared.loss_mask is None


def test_v2_gets_the_first_frame_in_the_place_of_the_first() -> None:
    clean, _, conditions = clips()
    prepared = FAMILY.prepare(variant_of(I2V_V2), clean, SIGMA, conditions)
    assert torch.equal(prepared.latents_BCFHW[:, :, :1], conditions.tensors[FIRST_FRAME])
    assert torch.equal(prepared.latents_BCFHW[:, :, 1:], clean[:, :, 1:])
    assert prepared.loss_mask is not None
    assert not prepared.loss_mask[:, :, 0].any()
    assert prepared.loss_mask[:, :, 1:].eq(1).all()


def test_what_is_declared() -> None:
    for name in ALL:
        image = {FIRST_FRAME, IMAGE_TEXT} if name != T2V else set()
        assert FAMILY.required(variant_of(name)) == {"latents"} | image
        assert FAMILY.first_frame(variant_of(name)) == (FirstFrameRule(1.0, always=True) if image else None)
    assert [FAMILY.comfyui(variant_of(name)).image_interleave for name in ALL] == [None, 2, 4]
    assert [FAMILY.sampling(variant_of(name)).guidance for name in ALL] == [6.0, None, 6.0]
    assert FAMILY.latent(variant_of(T2V)).shape(73, 480, 848) == (16, 19, 60, 106)
    assert "num_frames is 80; this model needs 4n+1. Use 77 or 81." in str(LATENT.problems(80, 480, 848)[0])


def test_captions_are_padded_to_the_longest_with_a_mask() -> None:
    batch = text()
    assert batch.embeds_BLD.shape == (2, 4, 64)
    assert batch.mask_BL is not None
    assert batch.mask_BL.tolist() == [[True, True, True, False], [True] * 4]
    assert not batch.embeds_BLD[0, 3].any()
    assert batch.pooled_BD is not None
    assert batch.pooled_BD.shape == (2, 768)


def test_the_schedule_is_evenly_spaced_then_shifted() -> None:
    assert simple_schedule(4, 1.0, 0) == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert simple_schedule(20, 7.0, 0)[10] == pytest.approx(0.875)
    assert simple_schedule(30, 1.0, 0)[1] == 0.967, "one of a thousand levels"


# What it answers


@pytest.mark.parametrize("variant", [T2V, I2V_V1])
def test_predict_is_the_transformer_of_diffusers(variant: str) -> None:
    clean, noise, conditions = clips()
    given, captions = FAMILY.prepare(variant_of(variant), noised(clean, noise, SIGMA), SIGMA, conditions), text()
    theirs = random_transformer(variant)
    expected = theirs(
        given.latents_BCFHW,
        1000 * SIGMA,
        captions.embeds_BLD,
        captions.mask_BL,
        captions.pooled_BD,
        torch.tensor([6000.0, 6000.0]) if theirs.config.guidance_embeds else None,
    ).sample
    ours = built(variant).requires_grad_(False)  # as theirs: for weights to train, a Linear's bits differ on CPUs without AVX2
    assert torch.equal(FAMILY.predict(ours, given, captions), expected)


def test_the_guidance_modulates_the_first_frame_of_v2() -> None:
    """Unlike in diffusers: frames after the first, which are those that are predicted, differ by that."""
    _, noise, conditions = clips()
    given = FAMILY.prepare(variant_of(I2V_V2), noise, SIGMA, conditions)
    ours, theirs = (FAMILY.predict(model, given, text())[:, :, 1:] for model in (built(I2V_V2), random_transformer(I2V_V2)))
    assert (ours - theirs).norm() > 1e-3 * theirs.norm()
    embedding = built(I2V_V2).time_text_embed
    others, first = embedding(1000 * SIGMA, text().pooled_BD, torch.tensor([6000.0, 6000.0]))
    assert torch.equal(first, embedding(torch.zeros(2), text().pooled_BD, torch.tensor([6000.0, 6000.0]))[0])
    assert not torch.equal(first, others)


@pytest.mark.parametrize("variant", ALL)
def test_ten_steps_lower_the_loss(variant: str) -> None:
    """The velocity has the sign and scale of noise - clean."""
    transformer = built(variant).requires_grad_(True)
    optimizer = torch.optim.AdamW(transformer.parameters(), lr=1e-3)
    clean, noise, conditions = clips()
    given, losses = FAMILY.prepare(variant_of(variant), noised(clean, noise, SIGMA), SIGMA, conditions), []
    for _ in range(10):
        loss = velocity_loss(FAMILY.predict(transformer, given, text()), noise - clean, given.loss_mask)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("variant", ALL)
def test_cost_counts_what_torch_counts(variant: str) -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    transformer, captions = random_transformer(variant), text(1)
    clean, _, conditions = clips()
    conditions = Conditions({FIRST_FRAME: conditions.tensors[FIRST_FRAME][:1]})
    given = FAMILY.prepare(variant_of(variant), clean[:1], SIGMA[:1], conditions)
    # The fused attention of the CPU is not counted by torch; the one of plain matrix products is.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        FAMILY.predict(transformer, given, captions)
    assert FAMILY.cost(transformer.config, (16, 3, 4, 6), captions.embeds_BLD.shape[1]) == pytest.approx(counter.get_total_flops(), rel=0.1)


def test_targets_are_the_linears_of_the_blocks_only() -> None:
    import re

    patterns = [re.compile(pattern) for pattern in FAMILY.targets.attention + FAMILY.targets.feed_forward]
    names = [name for name, module in random_transformer().named_modules() if isinstance(module, torch.nn.Linear)]
    adapted = {name for name in names if any(pattern.search(name) for pattern in patterns)}
    blocks = {name for name in names if name.startswith(FAMILY.blocks)}
    assert blocks - adapted == {name for name in blocks if ".norm" in name}, "all but the modulation"
    assert adapted <= blocks


# LoRAs in diffusers


def answer(transformer: Any, channels: int = 16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    latents, captions = torch.randn(2, channels, 2, 4, 4, generator=generator), text()
    guidance = torch.tensor([6000.0, 6000.0])
    with torch.no_grad():
        found: torch.Tensor = transformer(
            latents, 1000 * SIGMA, captions.embeds_BLD, captions.mask_BL, captions.pooled_BD, guidance, return_dict=False
        )[0]
    return found


PIPELINE_SIZES = {
    "double blocks": {"num_single_layers": 0},
    "single blocks, at the only width their reader knows": {
        "num_attention_heads": 24,
        "num_layers": 1,
        "num_single_layers": 1,
        "num_refiner_layers": 0,
    },
}


reads_native_loras = pytest.mark.skipif(
    tuple(map(int, version("diffusers").split(".")[:2])) < (0, 40),
    reason="diffusers before 0.40 reads native LoRAs of HunyuanVideo wrongly",
)


@reads_native_loras
@pytest.mark.parametrize("size", PIPELINE_SIZES.values(), ids=PIPELINE_SIZES)
def test_the_pipeline_loads_the_file_and_answers_the_same(tmp_path: Path, size: dict[str, int]) -> None:
    from diffusers import HunyuanVideoPipeline

    trained = random_transformer(T2V, **size)
    bare = answer(trained)
    write_lora(tmp_path / "a.safetensors", random_adapter(trained), FAMILY)
    expected = answer(trained)
    trained = None  # two of this size need not be in memory at once
    pipeline = HunyuanVideoPipeline(None, None, random_transformer(T2V, **size), None, None, None, None)
    pipeline.load_lora_weights(str(tmp_path), weight_name="a.safetensors", local_files_only=True)
    found = answer(pipeline.transformer)
    assert (expected - bare).norm() > 0.01 * bare.norm()
    assert float((found - expected).norm() / expected.norm()) < 1e-5
    del pipeline


@reads_native_loras
@pytest.mark.parametrize("variant", [I2V_V1, I2V_V2])
def test_the_image_to_video_pipeline_loads_it_too(tmp_path: Path, variant: str) -> None:
    from diffusers import HunyuanVideoImageToVideoPipeline

    size = {"num_single_layers": 0}
    channels = IMAGE[variant].get("in_channels", 16)
    trained = random_transformer(variant, **size)
    write_lora(tmp_path / "a.safetensors", random_adapter(trained), FAMILY)
    pipeline = HunyuanVideoImageToVideoPipeline(None, None, random_transformer(variant, **size), None, None, None, None, None)
    pipeline.load_lora_weights(str(tmp_path), weight_name="a.safetensors", local_files_only=True)
    torch.testing.assert_close(answer(pipeline.transformer, channels), answer(trained, channels))


# Text and video from a diffusers folder

PROMPTS = ["a red circle", "", "two lines,\nthe second longer"]


def test_text_is_encoded_as_the_pipeline_of_diffusers_does() -> None:
    from diffusers import HunyuanVideoPipeline

    folder = Folder((llama_tokenizer(), word_tokenizer()), (llama(), clip()))
    records = FAMILY.encode_text(variant_of(T2V), folder, PROMPTS)
    pipeline = HunyuanVideoPipeline(llama(), llama_tokenizer(), None, None, None, clip(), word_tokenizer())
    template = hunyuan._TEMPLATE
    crop = len(llama_tokenizer()(template).input_ids) - len("{}") - 1  # <|eot_id|>
    expected, mask = pipeline._get_llama_prompt_embeds(PROMPTS, {"template": template, "crop_start": crop}, device=torch.device("cpu"))
    batch = FAMILY.collate_text(records, torch.device("cpu"), torch.float32)
    rows = batch.embeds_BLD.shape[1]
    assert batch.mask_BL is not None
    assert torch.equal(batch.mask_BL.long(), mask[:, :rows])
    assert not mask[:, rows:].any()
    torch.testing.assert_close(batch.embeds_BLD, expected[:, :rows] * mask[:, :rows, None])
    pooled = pipeline._get_clip_prompt_embeds(PROMPTS, device=torch.device("cpu"))
    torch.testing.assert_close(batch.pooled_BD, pooled)


def test_the_template_is_that_of_the_pipelines() -> None:
    from diffusers.pipelines.hunyuan_video import pipeline_hunyuan_video, pipeline_hunyuan_video_image2video

    assert pipeline_hunyuan_video.DEFAULT_PROMPT_TEMPLATE["template"] == hunyuan._TEMPLATE
    assert pipeline_hunyuan_video_image2video.DEFAULT_PROMPT_TEMPLATE["template"] == hunyuan._IMAGE_TEMPLATE


@pytest.mark.parametrize(("variant", "rows"), [(I2V_V1, 288), (I2V_V2, 144)])
def test_image_text_differs_from_the_pipeline_by_the_last_row(variant: str, rows: int) -> None:
    """ComfyUI, and so this, ends with the caption's <|eot_id|>; diffusers drops it and keeps the line break of the answer."""
    from diffusers import HunyuanVideoImageToVideoPipeline

    folder = Folder((llama_tokenizer(), word_tokenizer()), (llava(), clip()), image_processor())
    (record,) = FAMILY.encode_text(variant_of(variant), folder, PROMPTS[:1], image())
    assert len(record.embeds_LD) == rows + len("a red circle") + 1
    pipeline = HunyuanVideoImageToVideoPipeline(llava(), llama_tokenizer(), None, None, None, clip(), word_tokenizer(), image_processor())
    crop = len(llama_tokenizer()(hunyuan._IMAGE_TEMPLATE.split("{}")[0]).input_ids)
    template = {"template": hunyuan._IMAGE_TEMPLATE, "crop_start": crop, "image_emb_start": folder_start(), "image_emb_len": 576}
    template["image_emb_end"] = folder_start() + 576
    pixels = (image().permute(2, 0, 1) * 255).round().to(torch.uint8)
    expected, mask = pipeline._get_llama_prompt_embeds(
        pixels, PROMPTS[:1], template, device=torch.device("cpu"), image_embed_interleave=576 // rows
    )
    theirs = expected[0][mask[0].bool()]
    assert float((record.embeds_LD[:-1] - theirs[: len(record.embeds_LD) - 1]).norm() / theirs.norm()) < 0.05, "an image of 8 bits"


def folder_start() -> int:
    return int(llama_tokenizer()(hunyuan._IMAGE_TEMPLATE).input_ids.index(128257))


@torch.no_grad()
def test_video_goes_through_the_vae_and_back_in_normalised_latents() -> None:
    from diffusers import AutoencoderKLHunyuanVideo

    torch.manual_seed(0)
    vae = AutoencoderKLHunyuanVideo(block_out_channels=(8, 8, 16, 16), norm_num_groups=4).eval()
    pixels = torch.rand(1, 3, 5, 16, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = FAMILY.encode_video(vae, pixels)
    assert latents.shape == (1, *LATENT.shape(5, 16, 24))
    mean, std = (torch.tensor(values).view(1, 16, 1, 1, 1) for values in (LATENT.mean, LATENT.std))
    posterior = vae.encode(pixels).latent_dist
    torch.testing.assert_close(latents * std + mean, posterior.mean)
    decoded = FAMILY.decode_video(vae, latents)
    assert decoded.shape == pixels.shape
    assert torch.equal(decoded, vae.decode(latents / vae.config.scaling_factor).sample.clamp(-1, 1))
    assert vae.config.scaling_factor == pytest.approx(1 / LATENT.std[0])
