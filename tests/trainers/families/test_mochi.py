from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from closeness import assert_near
from mochi_files import MOCHI, MOCHI_VAE, native_vae, tiny_mochi, tiny_mochi_vae
from model_files import Shapes, entries, shapes_of, write_header_only
from safetensors.torch import load_file, save_file

from trainers.checkpoint import Checkpoint
from trainers.errors import CheckpointError
from trainers.families.mochi import FAMILY, LATENT
from trainers.family import Conditions, TextBatch, TextRecord, VaeDetection, detect, detect_vae, families, simple_schedule
from trainers.flow import noised
from trainers.job import LoraSpec
from trainers.load import load_transformer, load_vae, native_state
from trainers.lora import adapter_state, inject
from trainers.lora_format import convert, read_lora, write_lora

# Of diffusers' own rope; ours has no autocast.
pytestmark = pytest.mark.filterwarnings("ignore:In CPU autocast, but the target dtype is not supported")

CPU = torch.device("cpu")
PUBLISHED = {  # config.json of the published diffusers folder; its out_channels is null, which means in_channels
    "patch_size": 2,
    "num_attention_heads": 24,
    "attention_head_dim": 128,
    "num_layers": 48,
    "pooled_projection_dim": 1536,
    "in_channels": 12,
    "out_channels": 12,
    "qk_norm": "rms_norm",
    "text_embed_dim": 4096,
    "time_embed_dim": 256,
    "activation_fn": "swiglu",
    "max_sequence_length": 256,
}
OTHERS = ["ltxv_2B", "hunyuan_video_t2v__i2v_v2", "wan2.1_t2v_1.3B", "wan2.1_i2v_14B", "vae_hunyuan_video", "vae_ltx_0.9.5", "vae_wan2.2"]


def header_of(tmp_path: Path, shapes: Shapes, file_name: str = "model.safetensors", prefix: str = "", vae: bool = False) -> Checkpoint:
    path = write_header_only(tmp_path / file_name, entries(shapes, torch.bfloat16, prefix))
    return Checkpoint.open(path, "vae" if vae else "transformer")


# Which file it is


@pytest.mark.parametrize(("file_name", "prefix"), [("dit.safetensors", ""), ("mochi_preview_bf16.safetensors", "model.diffusion_model.")])
def test_detects_the_variant_and_the_whole_config(tmp_path: Path, file_name: str, prefix: str) -> None:
    detection = detect(header_of(tmp_path, shapes_of(MOCHI), file_name, prefix))
    assert (detection.family, detection.variant.id, detection.config) == (FAMILY, "mochi-1-preview", PUBLISHED)
    assert "48 blocks of width 3072" in detection.reason


def test_an_all_in_one_checkpoint_has_both(tmp_path: Path) -> None:
    parts = entries(shapes_of(MOCHI), torch.bfloat16, "model.diffusion_model.") | entries(shapes_of(MOCHI_VAE), torch.float32, "vae.")
    parts |= {"text_encoders.t5xxl.transformer.shared.weight": (torch.float16, (32128, 4096))}
    path = write_header_only(tmp_path / "mochi_preview_fp8_scaled.safetensors", parts)
    assert detect(Checkpoint.open(path)).config == PUBLISHED
    found = detect_vae(Checkpoint.open(path, "vae"), FAMILY, to_encode=True)
    assert FAMILY.build_vae(found).state_dict().keys() == FAMILY.build_vae(VaeDetection(FAMILY, FAMILY.vaes[0], {})).state_dict().keys()


def test_the_table_names_every_tensor_of_the_transformer() -> None:
    native, state = shapes_of(MOCHI), FAMILY.build(PUBLISHED).state_dict()
    places = FAMILY.keys.map_file(native)
    assert places.keys() == state.keys()
    for name, place in places.items():
        rows = place.rows(native[place.name][0])
        assert tuple(state[name].shape) == (rows.stop - rows.start, *native[place.name][1:]), name
    assert {FAMILY.keys.to_native(name).name for name in state} == native.keys()


def test_the_table_agrees_with_the_converter_of_diffusers() -> None:
    """It knows 48 blocks only: each tensor is one number for each row, which says where the row went."""
    from diffusers.loaders.single_file_utils import convert_mochi_transformer_checkpoint_to_diffusers

    native = {name: torch.arange(shape[0]) + 100_000 * index for index, (name, shape) in enumerate(shapes_of(MOCHI).items())}
    ours = {name: place.cut(native[place.name]) for name, place in FAMILY.keys.map_file(native).items()}
    theirs = convert_mochi_transformer_checkpoint_to_diffusers(dict(native))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


@pytest.mark.parametrize("name", OTHERS)
def test_is_not_fooled_by_other_models(tmp_path: Path, name: str) -> None:
    assert FAMILY.detect(header_of(tmp_path, shapes_of(name))) is None
    assert FAMILY.detect_vae(header_of(tmp_path, shapes_of(name), vae=True)) is None


@pytest.mark.parametrize("missing", ["t5_yproj.weight", "pos_frequencies", "final_layer.linear.weight"])
def test_half_a_mochi_is_none(tmp_path: Path, missing: str) -> None:
    shapes = {name: shape for name, shape in shapes_of(MOCHI).items() if name != missing}
    assert FAMILY.detect(header_of(tmp_path, shapes)) is None


def test_an_unknown_key_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no place for blocks\.3\.control"):
        detect(header_of(tmp_path, shapes_of(MOCHI) | {"blocks.3.control.weight": (4, 4)}))


def test_a_block_that_is_missing_is_told_when_it_is_loaded(tmp_path: Path) -> None:
    native = native_state(tiny_mochi().state_dict(), FAMILY.keys)
    del native["blocks.0.mlp_y.w1.weight"]
    save_file(native, tmp_path / "mochi.safetensors")
    checkpoint = Checkpoint.open(tmp_path / "mochi.safetensors")
    with pytest.raises(CheckpointError, match=r"1 tensors are missing \(transformer_blocks\.0\.ff_context\.net\.0\.proj\.weight\)"):
        load_transformer(checkpoint, detect(checkpoint), "cpu", torch.float32)


def test_a_diffusers_folder_says_the_same(tmp_path: Path) -> None:
    transformer = tiny_mochi()
    transformer.save_pretrained(tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    detection = detect(checkpoint)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert {**detection.config, "out_channels": None} == {key: value for key, value in saved.items() if not key.startswith("_")}
    loaded = load_transformer(checkpoint, detection, "cpu", torch.float32).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in transformer.state_dict().items())


# Its VAE


def test_the_table_names_every_tensor_of_the_vae() -> None:
    native = shapes_of(MOCHI_VAE)
    state = FAMILY.build_vae(VaeDetection(FAMILY, FAMILY.vaes[0], {})).state_dict()
    places = VAE_KEYS.map_file(native)
    assert places.keys() == state.keys()
    assert all(tuple(state[name].shape)[1:] == native[place.name][1:] for name, place in places.items())
    assert {VAE_KEYS.to_native(name).name for name in state} == native.keys()


VAE_KEYS = FAMILY.vaes[0].keys


def test_the_vae_s_config_is_the_published_one(tmp_path: Path) -> None:
    found = detect_vae(header_of(tmp_path, shapes_of(MOCHI_VAE), vae=True), FAMILY, FAMILY.variants[0], to_encode=True)
    assert found.config == {"encoder_block_out_channels": (64, 128, 256, 384), "decoder_block_out_channels": (128, 256, 512, 768)}


def test_latent_constants_are_those_of_the_vae() -> None:
    config = tiny_mochi_vae().config
    assert (list(LATENT.mean), list(LATENT.std)) == (list(config.latents_mean), list(config.latents_std))


@pytest.mark.parametrize("start", ["decoder.", ""])
def test_the_decoder_alone_shows_previews_but_does_not_encode(tmp_path: Path, start: str) -> None:
    vae = tiny_mochi_vae()
    native = {name: tensor for name, tensor in native_vae(vae).items() if name.startswith("decoder.")}
    save_file({start + name.removeprefix("decoder."): tensor for name, tensor in native.items()}, tmp_path / "decoder.safetensors")
    checkpoint = Checkpoint.open(tmp_path / "decoder.safetensors", "vae")
    found = detect_vae(checkpoint, FAMILY, FAMILY.variants[0])
    latents = torch.randn(1, *LATENT.shape(7, 16, 16), generator=torch.Generator().manual_seed(0))
    half = load_vae(checkpoint, found, "cpu")
    assert torch.equal(FAMILY.decode_video(half, latents), FAMILY.decode_video(vae, latents))
    with pytest.raises(CheckpointError, match=r"decoder\.safetensors holds the decoder only; clips are encoded with the encoder"):
        detect_vae(checkpoint, FAMILY, FAMILY.variants[0], to_encode=True)


@pytest.mark.parametrize("start", ["encoder.", ""])
def test_the_encoder_alone_is_refused(tmp_path: Path, start: str) -> None:
    native = {start + name.removeprefix("encoder."): shape for name, shape in shapes_of(MOCHI_VAE).items() if name.startswith("encoder.")}
    with pytest.raises(CheckpointError, match=r"encoder\.safetensors holds the encoder of the Mochi VAE only; .*mochi_vae\.safetensors"):
        detect_vae(header_of(tmp_path, native, "encoder.safetensors", vae=True), FAMILY)


def test_the_vae_of_another_family_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is the Wan 2\.1 VAE; Mochi needs its own VAE\. Give the file or folder of the Mochi VAE"):
        detect_vae(header_of(tmp_path, shapes_of("vae_wan2.1"), vae=True), FAMILY)


def test_video_goes_through_the_vae_and_back_in_normalised_latents(tmp_path: Path) -> None:
    vae = tiny_mochi_vae()
    pixels = torch.rand(1, 3, 7, 16, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = FAMILY.encode_video(vae, pixels)
    assert latents.shape == (1, *LATENT.shape(7, 16, 24))
    mean, std = (torch.tensor(values).view(1, 12, 1, 1, 1) for values in (LATENT.mean, LATENT.std))
    assert_near(latents * std + mean, vae.encode(pixels).latent_dist.mean, share=1e-6)
    decoded = FAMILY.decode_video(vae, latents)
    assert decoded.shape == pixels.shape
    theirs = vae.decode(latents * std + mean).sample.clamp(-1, 1)
    assert (decoded - theirs).abs().max() > 1e-3, "diffusers' first frames have looked at what is dropped"


# What the model gets and gives


def inputs(batch: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    clean, noise = (torch.randn(batch, 12, 2, 4, 6, generator=generator) for _ in range(2))
    return clean, noise, torch.tensor([0.25, 1.0])[:batch]


def text(batch: int = 2, lengths: tuple[int, ...] = (3, 4)) -> TextBatch:
    generator = torch.Generator().manual_seed(1)
    return FAMILY.collate_text([TextRecord(torch.randn(n, 32, generator=generator)) for n in lengths[:batch]], CPU, torch.float32)


def test_prepare_gives_times_from_noise_to_clean() -> None:
    clean, _, sigma = inputs()
    prepared = FAMILY.prepare(FAMILY.variants[0], clean, sigma, Conditions())
    assert torch.equal(prepared.latents_BCFHW, clean)
    assert (prepared.timesteps.dtype, prepared.timesteps.tolist()) == (torch.float32, [750.0, 0.0])


def test_predict_is_the_opposite_of_what_diffusers_answers() -> None:
    transformer = tiny_mochi()
    clean, noise, sigma = inputs()
    prepared = FAMILY.prepare(FAMILY.variants[0], noised(clean, noise, sigma), sigma, Conditions())
    batch = text()
    expected = transformer(prepared.latents_BCFHW, batch.embeds_BLD, 1000 * (1 - sigma), batch.mask_BL).sample
    assert torch.equal(FAMILY.predict(transformer, prepared, batch), -expected)


def test_ten_steps_lower_the_loss() -> None:
    """The velocity has the sign and scale of noise - clean."""
    transformer = tiny_mochi().requires_grad_(True)
    optimizer = torch.optim.AdamW(transformer.parameters(), lr=1e-3)
    clean, noise, sigma = inputs()
    prepared = FAMILY.prepare(FAMILY.variants[0], noised(clean, noise, sigma), sigma, Conditions())
    losses = []
    for _ in range(10):
        loss = (FAMILY.predict(transformer, prepared, text()) - (noise - clean)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_padding_changes_nothing() -> None:
    transformer = tiny_mochi()
    clean, _, sigma = inputs()
    prepared = FAMILY.prepare(FAMILY.variants[0], clean, sigma, Conditions())
    batch = text()
    other = TextBatch(torch.where(batch.mask_BL[:, :, None], batch.embeds_BLD, torch.tensor(7.0)), batch.mask_BL)
    assert_near(FAMILY.predict(transformer, prepared, batch), FAMILY.predict(transformer, prepared, other))


def test_text_is_256_rows_with_a_mask_padded_or_cut() -> None:
    records = [TextRecord(torch.ones(3, 8)), TextRecord(torch.full((300, 8), 2.0)), TextRecord(torch.ones(1, 8))]
    batch = FAMILY.collate_text(records, CPU, torch.bfloat16)
    assert batch.embeds_BLD.shape == (3, 256, 8)
    assert batch.mask_BL.dtype == torch.bool
    assert batch.mask_BL.sum(dim=1).tolist() == [3, 256, 1]
    assert batch.embeds_BLD.sum(dim=(1, 2)).tolist() == [24.0, 4096.0, 8.0]
    assert not batch.embeds_BLD[0, 3:].any()


def test_targets_are_the_linears_of_the_blocks_only() -> None:
    names = [name for name, module in tiny_mochi().named_modules() if isinstance(module, torch.nn.Linear)]
    found = [
        [name for name in names if any(re.fullmatch(p, name) for p in patterns)]
        for patterns in (FAMILY.targets.attention, FAMILY.targets.feed_forward)
    ]
    both = ["to_q", "to_k", "to_v", "add_k_proj", "add_v_proj", "add_q_proj", "to_out.0"]
    expected = [f"transformer_blocks.{index}.attn1.{name}" for index in range(2) for name in both]
    assert sorted(found[0]) == sorted([*expected, "transformer_blocks.0.attn1.to_add_out"])
    first, last = (f"transformer_blocks.{index}.ff" for index in range(2))
    assert found[1] == [f"{ff}.net.{part}" for ff in (first, f"{first}_context", last) for part in ("0.proj", "2")]


def test_cost_counts_what_torch_counts() -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    transformer = tiny_mochi()
    clean, _, _ = inputs(batch=1)
    batch = text(1, (256,))
    # The fused attention of the CPU is not counted by torch; the one of plain matrix products is.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        transformer(clean, batch.embeds_BLD, torch.tensor([500.0]), torch.ones(1, 256, dtype=torch.bool))
    rope = 2 * 3 * clean[0, 0].numel() / 4 * transformer.pos_frequencies[0].numel()
    assert FAMILY.cost(transformer.config, tuple(clean.shape[1:]), 256) == counter.get_total_flops() - rope


def test_80_frames_are_refused_with_what_to_use() -> None:
    assert [str(problem) for problem in LATENT.problems(80, 480, 848)] == ["num_frames is 80; this model needs 6n+1. Use 79 or 85."]


def test_the_schedule_goes_from_noise_to_clean() -> None:
    sigmas = simple_schedule(30, 6.0, 0)
    assert (len(sigmas), sigmas[0], sigmas[-1]) == (31, 1.0, 0.0)
    assert sigmas == sorted(sigmas, reverse=True)


def test_the_registry_finds_mochi() -> None:
    assert families()["mochi"] is FAMILY


# Stored weights


@pytest.mark.parametrize("spelling", ["scale_weight", "weight_scale"])
@pytest.mark.parametrize("per_row", [False, True])
def test_scales_follow_cut_and_swapped_weights(tmp_path: Path, spelling: str, per_row: bool) -> None:
    stored, values = {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}, {}
    for name, tensor in native_state(tiny_mochi().state_dict(), FAMILY.keys).items():
        if not name.startswith("blocks.") or not name.endswith(".weight") or tensor.ndim < 2:
            stored[name] = values[name] = tensor
            continue
        scale = (tensor.abs().amax(1, keepdim=True) if per_row else tensor.abs().max()) / 448
        stored[name] = (tensor / scale).to(torch.float8_e4m3fn)
        stored[name.replace("weight", spelling)] = scale
        values[name] = stored[name].float() * scale
    save_file(stored, tmp_path / "mochi_preview_fp8_scaled.safetensors")
    checkpoint = Checkpoint.open(tmp_path / "mochi_preview_fp8_scaled.safetensors")
    quantised = load_transformer(checkpoint, detect(checkpoint), "cpu", torch.float32)
    expected = tiny_mochi()
    expected.load_state_dict({name: place.cut(values[place.name]) for name, place in FAMILY.keys.map_file(values).items()})
    clean, _, sigma = inputs()
    prepared = FAMILY.prepare(FAMILY.variants[0], clean, sigma, Conditions())
    with torch.no_grad():
        answers = [FAMILY.predict(model, prepared, text()) for model in (quantised, expected)]
    torch.testing.assert_close(*answers, rtol=1e-5, atol=1e-6)


# Text of a diffusers folder


def tiny_text_encoder() -> tuple[Any, torch.nn.Module]:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    words = ["<pad>", "</s>", "<unk>", "a", "red", "circle", "&"]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    torch.manual_seed(0)
    config = T5Config(vocab_size=len(words), d_model=32, num_layers=1, num_heads=2, d_kv=8, d_ff=16, feed_forward_proj="gated-gelu")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    return fast, T5EncoderModel(config).double().eval()


def test_text_is_encoded_as_the_pipeline_of_diffusers_does() -> None:
    from diffusers import MochiPipeline

    tokenizer, encoder = tiny_text_encoder()
    prompts = ["a red circle", "", "red " * 300]
    folder = SimpleNamespace(tokenizer=lambda: tokenizer, text_encoder=lambda: encoder)
    records = FAMILY.encode_text(FAMILY.variants[0], folder, prompts)
    assert [len(record.embeds_LD) for record in records] == [4, 1, 256]
    pipeline = MochiPipeline(None, tiny_mochi_vae(), encoder, tokenizer, None)
    expected, mask = pipeline._get_t5_prompt_embeds(prompts, device=CPU)
    batch = FAMILY.collate_text(records, CPU, torch.float64)
    assert torch.equal(batch.mask_BL, mask)
    assert_near(batch.embeds_BLD, expected * mask[:, :, None], share=1e-12)


# LoRA files


@torch.no_grad()
def test_the_pipeline_of_diffusers_loads_the_converted_file_and_answers_the_same(tmp_path: Path) -> None:
    """Diffusers has no converter for Mochi: the native file is ComfyUI's, and `convert` makes the pipeline's."""
    from diffusers import MochiPipeline

    spec, trained, bare = LoraSpec(rank=4, alpha=2.0), tiny_mochi(), tiny_mochi()
    for parameter in inject(trained, FAMILY, spec, seed=0):
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())))
    write_lora(tmp_path / "native.safetensors", adapter_state(trained, spec), FAMILY)
    convert(tmp_path / "native.safetensors", tmp_path / "converted.safetensors", "diffusers")
    pipeline = MochiPipeline(scheduler=None, vae=None, text_encoder=None, tokenizer=None, transformer=tiny_mochi())
    pipeline.load_lora_weights(str(tmp_path), weight_name="converted.safetensors", local_files_only=True)
    clean, _, sigma = inputs()
    prepared = FAMILY.prepare(FAMILY.variants[0], clean, sigma, Conditions())
    expected, found, without = (FAMILY.predict(model, prepared, text()) for model in (trained, pipeline.transformer, bare))
    assert (expected - without).abs().max() > 0.01
    torch.testing.assert_close(found, expected)


def test_a_lora_is_native_and_its_gated_layers_are_turned_round(tmp_path: Path) -> None:
    transformer, spec = tiny_mochi(), LoraSpec(rank=2)
    with torch.no_grad():
        for index, parameter in enumerate(inject(transformer, FAMILY, spec, seed=0)):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)))
    adapter = adapter_state(transformer, spec)
    write_lora(tmp_path / "lora.safetensors", adapter, FAMILY)
    found = load_file(tmp_path / "lora.safetensors")
    names = ["qkv_x", "qkv_y", "proj_x", "proj_y"]
    modules = [f"blocks.{block}.attn.{name}" for block in range(2) for name in names if (block, name) != (1, "proj_y")]
    modules += [f"blocks.{block}.mlp_{side}.w{n}" for block, side in ((0, "x"), (0, "y"), (1, "x")) for n in (1, 2)]
    assert sorted(found) == sorted(f"diffusion_model.{module}.lora_{part}.weight" for module in modules for part in "AB")
    trained = adapter.modules["transformer_blocks.1.ff.net.0.proj"].up_OR
    assert torch.equal(found["diffusion_model.blocks.1.mlp_x.w1.lora_B.weight"], torch.cat(trained.chunk(2)[::-1]))
    back = read_lora(tmp_path / "lora.safetensors", FAMILY)
    assert back.modules.keys() == adapter.modules.keys()
    assert all(torch.equal(back.modules[name].up_OR, pair.up_OR) for name, pair in adapter.modules.items())
