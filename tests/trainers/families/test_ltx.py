from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import assert_near
from ltx_files import CAUSAL, CONFIG, NOT_CAUSAL, random_ltx, write_ltx
from model_files import T2V_1_3B, entries, shapes_of, write_header_only
from safetensors.torch import load_file, save_file

from trainers.checkpoint import Checkpoint
from trainers.errors import CheckpointError, KeyTableError
from trainers.families.ltx import FAMILY, LATENT
from trainers.family import FIRST_FRAME, Conditions, ModelInput, TextBatch, TextRecord, detect, families
from trainers.flow import noised
from trainers.job import LoraSpec
from trainers.load import load_transformer, native_state
from trainers.lora import adapter_state, inject
from trainers.lora_format import write_lora
from trainers.preflight import _same_latents

SIZES = {
    "ltxv_2B": {"attention_head_dim": 64, "cross_attention_dim": 2048, "num_layers": 28},
    "ltxv_13B": {"attention_head_dim": 128, "cross_attention_dim": 4096, "num_layers": 48},
}
DISTILLED = {"allowed_inference_steps": [1.0, 0.9937]}
PUBLISHED = [  # file, shapes, header, variant
    ("ltx-video-2b-v0.9.safetensors", "ltxv_2B", NOT_CAUSAL, "ltxv-2b-0.9"),
    ("ltx-video-2b-v0.9.1.safetensors", "ltxv_2B", {"transformer": {}}, "ltxv-2b-0.9"),
    ("ltx-video-2b-v0.9.5.safetensors", "ltxv_2B", CAUSAL, "ltxv-2b-0.9.5"),
    ("ltxv-2b-0.9.6-dev-04-25.safetensors", "ltxv_2B", CAUSAL, "ltxv-2b-0.9.5"),
    ("ltxv-2b-0.9.6-distilled-04-25.safetensors", "ltxv_2B", CAUSAL, "ltxv-2b-distilled"),
    ("ltxv-2b-0.9.8-distilled.safetensors", "ltxv_2B", CAUSAL | DISTILLED, "ltxv-2b-distilled"),
    ("ltxv-13b-0.9.7-dev.safetensors", "ltxv_13B", CAUSAL, "ltxv-13b"),
    ("ltxv-13b-0.9.7-distilled.safetensors", "ltxv_13B", CAUSAL | DISTILLED, "ltxv-13b-distilled"),
    ("ltxv-13b-0.9.8-dev.safetensors", "ltxv_13B", CAUSAL, "ltxv-13b"),
    ("ltxv-13b-0.9.8-distilled.safetensors", "ltxv_13B", CAUSAL | DISTILLED, "ltxv-13b-distilled"),
    ("renamed.safetensors", "ltxv_13B", CAUSAL | DISTILLED, "ltxv-13b-distilled"),
    ("renamed.safetensors", "ltxv_2B", CAUSAL, "ltxv-2b-0.9.5"),
]


def header_only(
    path: Path, name: str, header: Mapping[str, Any] | None = None, dtype: torch.dtype = torch.bfloat16, prefix: str = ""
) -> Checkpoint:
    metadata = {"config": json.dumps(header)} if header else None
    return Checkpoint.open(write_header_only(path, entries(shapes_of(name), dtype, prefix), metadata))


# Which model a file is


@pytest.mark.parametrize(("file_name", "name", "header", "variant"), PUBLISHED)
def test_detects_the_variant_and_the_whole_config(tmp_path: Path, file_name: str, name: str, header: dict[str, Any], variant: str) -> None:
    detection = detect(header_only(tmp_path / file_name, name, header))
    assert detection.variant.id == variant
    causal = variant != "ltxv-2b-0.9"
    assert detection.config == CONFIG | SIZES[name] | {"causal_temporal_positioning": causal}
    assert detection.doubt is None
    assert bool(detection.notes) == (file_name == "renamed.safetensors" and "allowed_inference_steps" not in header)


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "diffusion_model."])
def test_of_an_all_in_one_checkpoint_each_part_is_seen(tmp_path: Path, prefix: str) -> None:
    parts = entries(shapes_of("ltxv_2B"), torch.bfloat16, prefix) | entries(shapes_of("vae_ltx_0.9.5"), torch.bfloat16, "vae.")
    path = write_header_only(tmp_path / "ltx-video-2b-v0.9.5.safetensors", parts, {"config": json.dumps(CAUSAL)})
    assert detect(Checkpoint.open(path)).variant.id == "ltxv-2b-0.9.5"
    found = FAMILY.detect_vae(Checkpoint.open(path, "vae"))
    assert found is not None
    assert found.vae.id == "ltx-0.9.5"


@pytest.mark.parametrize("name", SIZES)
def test_the_table_names_every_tensor_of_the_transformer(name: str) -> None:
    expected = {key: tuple(tensor.shape) for key, tensor in FAMILY.build(CONFIG | SIZES[name]).state_dict().items()}
    native = shapes_of(name)
    assert {key: native[place.name] for key, place in FAMILY.keys.map_file(native).items()} == expected
    assert {FAMILY.keys.to_native(key).name for key in expected} == native.keys()


def test_without_a_header_frames_count_as_comfyui_counts_them(tmp_path: Path) -> None:
    detection = detect(header_only(tmp_path / "ltxv-13b-0.9.7-dev_fp8_e4m3fn.safetensors", "ltxv_13B", dtype=torch.float8_e4m3fn))
    assert detection.variant.id == "ltxv-13b"
    assert detection.config["causal_temporal_positioning"] is False
    assert "ComfyUI counts its frames as for 0.9" in detection.notes[0]
    named = detect(header_only(tmp_path / "ltx-video-2b-v0.9.5.safetensors", "ltxv_2B"))
    assert named.variant.id == "ltxv-2b-0.9.5", "its VAE is still the newer one"
    unnamed = detect(header_only(tmp_path / "model.safetensors", "ltxv_2B"))
    assert unnamed.variant.id == "ltxv-2b-0.9"
    assert "choose the variant" in unnamed.notes[1]
    assert detect(header_only(tmp_path / "model.safetensors", "ltxv_2B"), "ltxv-2b-distilled").variant.id == "ltxv-2b-distilled"


def test_the_size_leaves_only_its_own_variants(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"variant is 'ltxv-2b-0.9'; .* can only be ltxv-13b, ltxv-13b-distilled"):
        detect(header_only(tmp_path / "ltxv-13b-0.9.7-dev.safetensors", "ltxv_13B", CAUSAL), "ltxv-2b-0.9")


@pytest.mark.parametrize(("header", "variant"), [(CAUSAL, "ltxv-2b-0.9"), (NOT_CAUSAL, "ltxv-2b-0.9.5")])
def test_a_variant_that_counts_frames_otherwise_than_the_header_says_is_refused(tmp_path: Path, header: Any, variant: str) -> None:
    with pytest.raises(CheckpointError, match=f"variant is '{variant}'; .* can only be ltxv-2b-"):
        detect(header_only(tmp_path / "model.safetensors", "ltxv_2B", header), variant)


@pytest.mark.parametrize("file_name", ["ltxv-13b-0.9.7-dev-fp8.safetensors", "LTX_13B_Dev_V_0_9_7_FP8.safetensors"])
def test_lightricks_fp8_is_refused_with_the_reason(tmp_path: Path, file_name: str) -> None:
    with pytest.raises(CheckpointError, match=r"rotated for the Q8 kernels.*Give the bf16 file.*fp8_e4m3fn"):
        detect(header_only(tmp_path / file_name, "ltxv_13B", CAUSAL, torch.float8_e4m3fn), "ltxv-13b")
    assert detect(header_only(tmp_path / file_name, "ltxv_13B", CAUSAL)).variant.id == "ltxv-13b", "a name alone refuses no bf16"


def test_fp8_of_unknown_origin_is_the_user_s_to_vouch_for(tmp_path: Path) -> None:
    checkpoint = header_only(tmp_path / "ltxv-13b-0.9.7-dev.safetensors", "ltxv_13B", CAUSAL, torch.float8_e4m3fn)
    with pytest.raises(CheckpointError, match=r"holds fp8 weights; .* rotated .* name the variant"):
        detect(checkpoint)
    assert detect(checkpoint, "ltxv-13b").variant.id == "ltxv-13b"


def test_ltx_2_is_refused_by_name(tmp_path: Path) -> None:
    shapes = shapes_of("ltxv_13B") | {"audio_adaln_single.linear.weight": (12, 2)}
    with pytest.raises(CheckpointError, match=r"is LTX-2.*only LTX-Video 0\.9 to 0\.9\.8"):
        detect(Checkpoint.open(write_header_only(tmp_path / "ltx-2-19b-dev.safetensors", entries(shapes, torch.bfloat16))))


def test_a_header_that_asks_for_another_model_is_refused(tmp_path: Path) -> None:
    header = {"transformer": {"rope_type": "split", "timestep_scale_multiplier": 1}}
    with pytest.raises(CheckpointError) as error:
        detect(header_only(tmp_path / "ltx.safetensors", "ltxv_2B", header))
    assert [problem.value.split(" in ")[0] for problem in error.value.problems] == ["timestep_scale_multiplier is 1", "rope_type is split"]


def test_an_unknown_key_is_an_error(tmp_path: Path) -> None:
    shapes = shapes_of("ltxv_2B") | {"transformer_blocks.3.attn3.to_q.weight": (4, 4)}
    with pytest.raises(KeyTableError, match=r"no place for transformer_blocks\.3\.attn3"):
        detect(Checkpoint.open(write_header_only(tmp_path / "ltx.safetensors", entries(shapes, torch.bfloat16))))


@pytest.mark.parametrize("name", [T2V_1_3B, "hunyuan_video_t2v__i2v_v2", "mochi_preview", "vae_ltx_0.9.5", "vae_wan2.2"])
def test_other_models_are_none_of_it(tmp_path: Path, name: str) -> None:
    assert FAMILY.detect(header_only(tmp_path / "model.safetensors", name)) is None
    vae = FAMILY.detect_vae(header_only(tmp_path / "model.safetensors", name))
    assert (vae is not None) == (name == "vae_ltx_0.9.5")


@pytest.mark.parametrize("missing", ["patchify_proj.weight", "caption_projection.linear_1.weight", "proj_out.weight"])
def test_half_an_ltx_is_none(tmp_path: Path, missing: str) -> None:
    shapes = {name: shape for name, shape in shapes_of("ltxv_2B").items() if name != missing}
    assert FAMILY.detect(Checkpoint.open(write_header_only(tmp_path / "model.safetensors", entries(shapes, torch.bfloat16)))) is None


def test_the_registry_finds_the_family_and_not_its_parts() -> None:
    assert families()["ltx"] is FAMILY


# Files into models


@pytest.mark.parametrize(
    ("vae", "name", "causal"), [("LTXVideo095DownBlock3D", "model", True), (None, "LTX-Video-0.9.5", True), (None, "LTX-Video", False)]
)
def test_a_diffusers_folder_says_by_its_vae_or_its_name_how_frames_count(tmp_path: Path, vae: str | None, name: str, causal: bool) -> None:
    folder = tmp_path / name
    transformer = random_ltx(causal=causal)
    transformer.save_pretrained(folder / "transformer")
    if vae:
        (folder / "vae").mkdir()
        (folder / "vae" / "config.json").write_text(json.dumps({"down_block_types": [vae]}))
    checkpoint = Checkpoint.open(folder)
    detection = detect(checkpoint)
    assert detection.config["causal_temporal_positioning"] is causal
    assert json.loads(detection.native_metadata["config"]) == {"transformer": {"causal_temporal_positioning": causal}}
    assert equal(load_transformer(checkpoint, detection, "cpu", torch.float32), transformer)


def equal(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items())


def test_native_to_diffusers_and_back_is_equal_in_bytes(tmp_path: Path) -> None:
    path = write_ltx(tmp_path / "ltx.safetensors", random_ltx(), CAUSAL)
    checkpoint = Checkpoint.open(path)
    state = native_state(load_transformer(checkpoint, detect(checkpoint), "cpu", torch.float32).state_dict(), FAMILY.keys)
    stored = load_file(path)
    assert state.keys() == stored.keys()
    assert all(torch.equal(tensor, stored[name]) for name, tensor in state.items())


@pytest.mark.parametrize("spelling", ["scale_weight", "weight_scale"])
def test_fp8_scaled_reaches_the_model_with_its_scales(tmp_path: Path, spelling: str) -> None:
    path = write_ltx(tmp_path / "ltx.safetensors", random_ltx(), CAUSAL)
    stored, dense = {}, {}
    for name, tensor in load_file(path).items():
        stored[name], dense[name] = tensor, tensor
        if name.startswith("transformer_blocks.") and name.endswith(".weight") and tensor.ndim == 2:
            scale = tensor.abs().max() / 448
            stored[name] = (tensor / scale).to(torch.float8_e4m3fn)
            stored[name.replace("weight", spelling)] = scale
            dense[name] = stored[name].float() * scale
    save_file(stored | {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}, tmp_path / "ltx_fp8_scaled.safetensors")
    save_file(dense, tmp_path / "dense.safetensors")
    answers = []
    for file in ("ltx_fp8_scaled.safetensors", "dense.safetensors"):
        checkpoint = Checkpoint.open(tmp_path / file)
        transformer = load_transformer(checkpoint, detect(checkpoint), "cpu", torch.float32)
        answers.append(FAMILY.predict(transformer, prepared(Conditions()), text()))
    assert_near(answers[0], answers[1])


def test_targets_are_the_linears_of_the_blocks_only() -> None:
    names = [name for name, module in random_ltx().named_modules() if isinstance(module, torch.nn.Linear)]
    attention, feed_forward = (
        [name for name in names if any(re.fullmatch(pattern, name) for pattern in patterns)]
        for patterns in (FAMILY.targets.attention, FAMILY.targets.feed_forward)
    )
    block = [f"attn{n}.{part}" for n in (1, 2) for part in ("to_q", "to_k", "to_v", "to_out.0")]
    assert attention == [f"transformer_blocks.{index}.{name}" for index in range(2) for name in block]
    assert feed_forward == [f"transformer_blocks.{index}.ff.net.{name}" for index in range(2) for name in ("0.proj", "2")]


# What the model gets and gives

VARIANT = FAMILY.variants[1]
SHAPE = (128, 3, 2, 4)


def clips(batch: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(clean, noise, sigma)."""
    chance = torch.Generator().manual_seed(0)
    clean, noise = (torch.randn(batch, *SHAPE, generator=chance) for _ in range(2))
    return clean, noise, torch.tensor([0.25, 1.0])[:batch]


def text(lengths: tuple[int, ...] = (3, 6)) -> TextBatch:
    chance = torch.Generator().manual_seed(1)
    records = [TextRecord(torch.randn(length, 4096, generator=chance)) for length in lengths]
    return FAMILY.collate_text(records, torch.device("cpu"), torch.float32)


def prepared(conditions: Conditions) -> ModelInput:
    clean, noise, sigma = clips()
    return FAMILY.prepare(VARIANT, noised(clean, noise, sigma), sigma, conditions)


def first_frames(*given: bool) -> Conditions:
    return Conditions({FIRST_FRAME: clips()[0][:, :, :1]}, torch.tensor(given))


def test_prepare_gives_times_in_thousandths_and_the_usual_rate() -> None:
    inputs = prepared(Conditions())
    assert inputs.timesteps.dtype == torch.float32
    assert inputs.timesteps.tolist() == [250.0, 1000.0]
    assert inputs.extra["fps"].tolist() == [25.0, 25.0]
    assert inputs.loss_mask is None


def test_a_first_frame_is_clean_at_time_0_and_counts_for_nothing() -> None:
    clean, noise, sigma = clips()
    inputs = prepared(first_frames(True, False))
    noisy = noised(clean, noise, sigma)
    assert torch.equal(inputs.latents_BCFHW[0, :, 0], clean[0, :, 0])
    assert torch.equal(inputs.latents_BCFHW[0, :, 1:], noisy[0, :, 1:])
    assert torch.equal(inputs.latents_BCFHW[1], noisy[1])
    assert inputs.timesteps[0].tolist() == [0.0] * 8 + [250.0] * 16, "a token for each place, frame by frame"
    assert inputs.timesteps[1].tolist() == [1000.0] * 24
    assert inputs.loss_mask is not None
    assert inputs.loss_mask.expand(2, *SHAPE)[:, 0, :, 0, 0].tolist() == [[0, 1, 1], [1, 1, 1]]


def test_a_still_is_never_its_own_first_frame() -> None:
    """Nothing would be left to predict."""
    clean, _, sigma = clips()
    still = clean[:, :, :1]
    assert FAMILY.prepare(VARIANT, still, sigma, Conditions({FIRST_FRAME: still}, torch.tensor([True, True]))).loss_mask is None


@torch.no_grad()
def test_predict_is_the_transformer_of_diffusers() -> None:
    """Packed frame by frame, and unpacked; without causal positions by the scale of latent frames in seconds."""
    transformer, inputs = random_ltx(causal=False), prepared(Conditions(fps_B=torch.tensor([20.0, 20.0])))
    packed = inputs.latents_BCFHW.permute(0, 2, 3, 4, 1).reshape(2, 24, 128)
    sizes = {"num_frames": 3, "height": 2, "width": 4, "rope_interpolation_scale": (8 / 20, 32, 32)}
    given = text()
    expected = transformer(packed, given.embeds_BLD, inputs.timesteps, given.mask_BL, **sizes).sample
    assert torch.equal(FAMILY.predict(transformer, inputs, given), expected.view(2, 3, 2, 4, 128).permute(0, 4, 1, 2, 3))


@torch.no_grad()
def test_causal_positions_are_pixels_and_seconds() -> None:
    """As diffusers' LTXConditionPipeline gives them to the same transformer."""
    transformer, inputs, given = random_ltx(causal=True), prepared(Conditions(fps_B=torch.tensor([20.0, 30.0]))), text()
    places = torch.tensor([[max(0, 8 * f - 7), 32 * y, 32 * x] for f in range(3) for y in range(2) for x in range(4)])
    coords_B3N = torch.stack([places / torch.tensor([fps, 1, 1]) for fps in (20, 30)]).transpose(1, 2)
    ours = FAMILY.predict(transformer, inputs, given)
    transformer.rope = transformer.rope.rope
    packed = inputs.latents_BCFHW.permute(0, 2, 3, 4, 1).reshape(2, 24, 128)
    theirs = transformer(packed, given.embeds_BLD, inputs.timesteps, given.mask_BL, video_coords=coords_B3N).sample
    assert_near(ours, theirs.view(2, 3, 2, 4, 128).permute(0, 4, 1, 2, 3))


@pytest.mark.parametrize("causal", [True, False])
@torch.no_grad()
def test_a_batch_is_its_samples(causal: bool) -> None:
    """Each with its own time, rate, first frame and length of text."""
    transformer, fps = random_ltx(causal=causal), torch.tensor([16.0, 30.0])
    whole = first_frames(True, False)
    together = FAMILY.predict(transformer, prepared(Conditions(whole.tensors, whole.first_frame_B, fps)), text())
    clean, noise, sigma = clips()
    noisy, texts = noised(clean, noise, sigma), text()
    for index, length in enumerate((3, 6)):
        one = slice(index, index + 1)
        conditions = Conditions({FIRST_FRAME: clean[one, :, :1]}, torch.tensor([index == 0]), fps[one])
        record = TextRecord(texts.embeds_BLD[index, :length])
        inputs = FAMILY.prepare(VARIANT, noisy[one], sigma[one], conditions)
        alone = FAMILY.predict(transformer, inputs, FAMILY.collate_text([record], torch.device("cpu"), torch.float32))
        assert_near(together[one], alone)


def test_ten_steps_lower_the_loss() -> None:
    """The velocity has the sign and scale of noise - clean."""
    transformer = random_ltx().requires_grad_(True)
    optimizer = torch.optim.AdamW(transformer.parameters(), lr=1e-3)
    clean, noise, sigma = clips()
    inputs, losses = FAMILY.prepare(VARIANT, noised(clean, noise, sigma), sigma, Conditions()), []
    for _ in range(10):
        loss = (FAMILY.predict(transformer, inputs, text()) - (noise - clean)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_text_is_padded_to_the_longest_with_a_mask() -> None:
    records = [TextRecord(torch.ones(2, 8)), TextRecord(torch.full((300, 8), 2.0))]
    batch = FAMILY.collate_text(records, torch.device("cpu"), torch.bfloat16)
    assert batch.embeds_BLD.shape == (2, 300, 8)
    assert batch.embeds_BLD.dtype == torch.bfloat16
    assert batch.embeds_BLD.sum(dim=(1, 2)).tolist() == [16.0, 4800.0]
    assert batch.mask_BL is not None
    assert batch.mask_BL.sum(dim=1).tolist() == [2, 300]
    assert batch.mask_BL[0, :2].all()


def test_cost_counts_what_torch_counts() -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    transformer, (clean, _, sigma) = random_ltx(width=192), clips(batch=1)
    inputs = FAMILY.prepare(VARIANT, clean, sigma, Conditions())
    # The fused attention of the CPU is not counted by torch; the one of plain matrix products is.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        FAMILY.predict(transformer, inputs, text((7,)))
    assert FAMILY.cost(transformer.config, SHAPE, 7) == counter.get_total_flops()


def test_sampling_of_distilled_models_is_their_own() -> None:
    distilled = [variant for variant in FAMILY.variants if "distilled" in variant.id]
    assert len(distilled) == 2
    for variant in FAMILY.variants:
        found = FAMILY.sampling(variant)
        sigmas = found.schedule(found.steps, found.shift, 4992)
        assert (len(sigmas) - 1, found.cfg) == ((8, 1.0) if variant in distilled else (30, 3.0))
        assert (sigmas[0], sigmas[-1]) == (1.0, 0.0)
        assert sigmas == sorted(sigmas, reverse=True)
        assert sigmas[-2] == pytest.approx(0.4219 if variant in distilled else 0.1)
        assert len(found.schedule(1, found.shift, 4992)) == 2
        assert len(found.schedule(5, found.shift, 4992)) == 6


def test_80_frames_are_refused_with_what_is_allowed() -> None:
    assert [str(problem) for problem in LATENT.problems(80, 500, 768)] == [
        "num_frames is 80; this model needs 8n+1. Use 73 or 81.",
        "height is 500; this model needs multiples of 32 pixels. Use 480 or 512.",
    ]


def test_data_of_another_generation_s_vae_are_not_these_latents(tmp_path: Path) -> None:
    detection = detect(header_only(tmp_path / "ltx-video-2b-v0.9.5.safetensors", "ltxv_2B", CAUSAL))
    fitting = [variant.id for variant in (*FAMILY.variants, *families()["wan"].variants) if _same_latents(variant.id, detection)]
    assert fitting == ["ltxv-2b-0.9.5", "ltxv-2b-distilled", "ltxv-13b", "ltxv-13b-distilled"]


# The LoRA in diffusers' pipeline


@torch.no_grad()
def test_the_pipeline_loads_the_file_and_answers_the_same(tmp_path: Path) -> None:
    from diffusers import LTXPipeline

    spec, trained, inputs = LoraSpec(rank=4, alpha=2.0), random_ltx(causal=False), prepared(Conditions())
    bare = FAMILY.predict(trained, inputs, text())
    for parameter in inject(trained, FAMILY, spec, seed=0):
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    expected = FAMILY.predict(trained, inputs, text())
    assert (expected - bare).abs().max() > 0.01
    write_lora(tmp_path / "lora.safetensors", adapter_state(trained, spec), FAMILY)
    pipeline = LTXPipeline(scheduler=None, vae=None, text_encoder=None, tokenizer=None, transformer=random_ltx(causal=False))
    pipeline.load_lora_weights(str(tmp_path), weight_name="lora.safetensors", local_files_only=True)
    assert torch.equal(FAMILY.predict(pipeline.transformer, inputs, text()), expected)
