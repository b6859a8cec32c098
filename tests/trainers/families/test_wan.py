from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from closeness import assert_near
from model_files import T2V_1_3B, T2V_14B, TINY, VAE, entries, shapes_of, tiny_transformer, tiny_vae, write_header_only

from trainers.checkpoint import Checkpoint
from trainers.families.wan import FAMILY, LATENT
from trainers.family import Conditions, TextBatch, TextRecord, VaeDetection, detect, families
from trainers.flow import noised

PUBLISHED = {  # config.json of the published diffusers folders
    "patch_size": (1, 2, 2),
    "attention_head_dim": 128,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 4096,
    "freq_dim": 256,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "eps": 1e-6,
    "image_dim": None,
    "added_kv_proj_dim": None,
    "rope_max_seq_len": 1024,
    "pos_embed_seq_len": None,
}
SIZES = {
    T2V_1_3B: {"num_attention_heads": 12, "num_layers": 30, "ffn_dim": 8960},
    T2V_14B: {"num_attention_heads": 40, "num_layers": 40, "ffn_dim": 13824},
}


def header_of(tmp_path: Path, name: str, file_name: str = "model.safetensors", prefix: str = "") -> Checkpoint:
    return Checkpoint.open(write_header_only(tmp_path / file_name, entries(shapes_of(name), torch.bfloat16, prefix)))


@pytest.mark.parametrize(("name", "variant"), [(T2V_1_3B, "wan2.1-t2v-1.3b"), (T2V_14B, "wan2.1-t2v-14b")])
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "model.model.", "net.", "diffusion_model.", "model."])
def test_detects_the_variant_and_the_whole_config(tmp_path: Path, name: str, variant: str, prefix: str) -> None:
    detection = detect(header_of(tmp_path, name, prefix=prefix))
    assert detection.variant.id == variant
    assert detection.config == PUBLISHED | SIZES[name]


@pytest.mark.parametrize("name", [T2V_1_3B, T2V_14B])
def test_the_table_names_every_tensor_of_the_transformer(name: str) -> None:
    expected = {key: tuple(tensor.shape) for key, tensor in FAMILY.build(PUBLISHED | SIZES[name]).state_dict().items()}
    native = shapes_of(name)
    assert {key: native[place.name] for key, place in FAMILY.keys.map_file(native).items()} == expected
    assert {FAMILY.keys.to_native(key).name for key in expected} == native.keys()


def test_the_table_names_every_tensor_of_the_vae() -> None:
    native = shapes_of(VAE)
    expected = {key: tuple(tensor.shape) for key, tensor in FAMILY.build_vae(VaeDetection(FAMILY, FAMILY.vaes[0], {})).state_dict().items()}
    assert {key: native[place.name] for key, place in FAMILY.vaes[0].keys.map_file(native).items()} == expected
    assert {FAMILY.vaes[0].keys.to_native(key).name for key in expected} == native.keys()


@pytest.mark.parametrize("name", ["ltxv_2B", "hunyuan_video_t2v__i2v_v2", "mochi_preview", VAE, "vae_ltx_0.9.5"])
def test_is_not_fooled_by_other_models(tmp_path: Path, name: str) -> None:
    checkpoint = header_of(tmp_path, name)
    assert FAMILY.detect(checkpoint) is None
    assert (FAMILY.detect_vae(checkpoint) is not None) == (name == VAE)


@pytest.mark.parametrize("missing", ["text_embedding.0.weight", "head.modulation", "blocks.0.ffn.0.weight"])
def test_half_a_wan_is_none(tmp_path: Path, missing: str) -> None:
    shapes = {name: shape for name, shape in shapes_of(T2V_1_3B).items() if name != missing}
    assert FAMILY.detect(Checkpoint.open(write_header_only(tmp_path / "model.safetensors", entries(shapes, torch.bfloat16)))) is None


def test_a_config_json_tells_the_heads_that_shapes_do_not(tmp_path: Path) -> None:
    transformer = tiny_transformer(num_attention_heads=4, attention_head_dim=64)
    transformer.save_pretrained(tmp_path)
    detection = detect(Checkpoint.open(tmp_path))
    assert detection.variant.id == "wan2.1-t2v"
    saved = json.loads((tmp_path / "config.json").read_text())
    assert json.loads(json.dumps(detection.config)) == {key: value for key, value in saved.items() if not key.startswith("_")}


def test_the_config_of_an_original_repository_is_not_one_of_diffusers(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "WanModel", "num_attention_heads": 7, "eps": 1.0}))
    assert detect(header_of(tmp_path, T2V_1_3B)).config == PUBLISHED | SIZES[T2V_1_3B]


def test_the_registry_finds_wan() -> None:
    assert families()["wan"] is FAMILY


def test_latent_constants_are_those_of_the_vae() -> None:
    from diffusers import AutoencoderKLWan

    with torch.device("meta"):
        config = AutoencoderKLWan(base_dim=4).config
    assert (list(LATENT.mean), list(LATENT.std)) == (config.latents_mean, config.latents_std)


def test_targets_are_the_linears_of_the_blocks_only() -> None:
    import re

    names = [
        name
        for name, module in tiny_transformer(added_kv_proj_dim=256, image_dim=64).named_modules()
        if isinstance(module, torch.nn.Linear)
    ]
    attention = [name for name in names if any(re.fullmatch(pattern, name) for pattern in FAMILY.targets.attention)]
    feed_forward = [name for name in names if any(re.fullmatch(pattern, name) for pattern in FAMILY.targets.feed_forward)]
    block = [f"attn{n}.{p}" for n in (1, 2) for p in ("to_q", "to_k", "to_v", "to_out.0")]
    assert attention == [f"blocks.{index}.{name}" for index in range(2) for name in block]
    assert feed_forward == [f"blocks.{index}.ffn.net.{name}" for index in range(2) for name in ("0.proj", "2")]


# What the model gets and gives


def inputs(batch: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    clean, noise = (torch.randn(batch, 16, 2, 4, 6, generator=generator) for _ in range(2))
    return clean, noise, torch.tensor([0.25, 1.0])[:batch]


def text(batch: int = 2) -> TextBatch:
    generator = torch.Generator().manual_seed(1)
    records = [TextRecord(torch.randn(3 + index, TINY["text_dim"], generator=generator)) for index in range(batch)]
    return FAMILY.collate_text(records, torch.device("cpu"), torch.float32)


def test_prepare_gives_times_in_thousandths() -> None:
    clean, _, sigma = inputs()
    prepared = FAMILY.prepare(FAMILY.variants[0], clean, sigma, Conditions())
    assert torch.equal(prepared.latents_BCFHW, clean)
    assert prepared.timesteps.dtype == torch.float32
    assert prepared.timesteps.tolist() == [250.0, 1000.0]


def test_predict_is_the_transformer_of_diffusers() -> None:
    transformer = tiny_transformer()
    clean, noise, sigma = inputs()
    prepared = FAMILY.prepare(FAMILY.variants[0], noised(clean, noise, sigma), sigma, Conditions())
    expected = transformer(prepared.latents_BCFHW, 1000 * sigma, text().embeds_BLD).sample
    assert torch.equal(FAMILY.predict(transformer, prepared, text()), expected)


def test_ten_steps_lower_the_loss() -> None:
    """The velocity has the sign and scale of noise - clean."""
    transformer = tiny_transformer().requires_grad_(True)
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


def test_text_is_512_rows_zero_padded_or_cut() -> None:
    records = [TextRecord(torch.ones(3, 8)), TextRecord(torch.full((600, 8), 2.0)), TextRecord(torch.ones(0, 8))]
    batch = FAMILY.collate_text(records, torch.device("cpu"), torch.bfloat16)
    assert batch.embeds_BLD.shape == (3, 512, 8)
    assert batch.embeds_BLD.dtype == torch.bfloat16
    assert batch.embeds_BLD.sum(dim=(1, 2)).tolist() == [24.0, 8192.0, 0.0]
    assert not batch.embeds_BLD[0, 3:].any()


def test_cost_counts_what_torch_counts() -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    transformer = tiny_transformer()
    clean, _, _ = inputs(batch=1)
    # The fused attention of the CPU is not counted by torch; the one of plain matrix products is.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        transformer(clean, torch.tensor([500.0]), text(batch=1).embeds_BLD)
    assert FAMILY.cost(transformer.config, tuple(clean.shape[1:]), 512) == counter.get_total_flops()


# The VAE and the text encoder


def test_video_goes_through_the_vae_and_back_in_normalised_latents() -> None:
    vae = tiny_vae()
    pixels = torch.rand(1, 3, 5, 16, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = FAMILY.encode_video(vae, pixels)
    assert latents.shape == (1, *LATENT.shape(5, 16, 24))
    mean, std = (torch.tensor(values).view(1, 16, 1, 1, 1) for values in (LATENT.mean, LATENT.std))
    posterior = vae.encode(pixels).latent_dist
    assert_near(latents * std + mean, posterior.mean, share=1e-6)
    decoded = FAMILY.decode_video(vae, latents)
    assert decoded.shape == pixels.shape
    assert_near(decoded, vae.decode(posterior.mean).sample)


def tiny_text_encoder() -> tuple[Any, torch.nn.Module]:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

    words = ["<pad>", "</s>", "<unk>", "a", "red", "circle", "&"]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    torch.manual_seed(0)
    config = UMT5Config(vocab_size=len(words), d_model=32, num_layers=1, num_heads=2, d_kv=8, d_ff=16)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    return fast, UMT5EncoderModel(config).double().eval()


def test_text_is_encoded_as_the_pipeline_of_diffusers_does() -> None:
    from diffusers import WanPipeline

    tokenizer, encoder = tiny_text_encoder()
    prompts = ["a red circle", "", "  a &amp;amp;\n red ", "red " * 600]
    records = FAMILY.encode_text(FAMILY.variants[0], SimpleNamespace(tokenizer=lambda: tokenizer, text_encoder=lambda: encoder), prompts)
    assert [len(record.embeds_LD) for record in records] == [4, 1, 4, 512]
    pipeline = WanPipeline(tokenizer, encoder, tiny_vae(), scheduler=None, transformer=None)
    expected = pipeline._get_t5_prompt_embeds(prompts, max_sequence_length=512, device=torch.device("cpu"))
    batch = FAMILY.collate_text(records, torch.device("cpu"), torch.float64)
    assert_near(batch.embeds_BLD, expected, share=1e-12)
