"""ComfyUI's Mochi and the trainer's answer alike: one step of its sampler, its VAE, its text, its schedule.

ComfyUI hard-codes the model's sizes, so it is two blocks at true width; the VAE has few channels.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import assert_near
from installation import PACK, ComfyUI
from mochi_files import native_vae, tiny_mochi_vae
from questions import relative
from safetensors.torch import load_file, save_file

from trainers.adapter import Adapter, LoraPair
from trainers.checkpoint import Checkpoint
from trainers.families.mochi import FAMILY
from trainers.family import Conditions, TextRecord, detect, simple_schedule
from trainers.flow import noised
from trainers.folder_encoder import EncoderFiles, FolderEncoder
from trainers.job import LoraSpec
from trainers.load import load_transformer, native_state
from trainers.lora import adapter_state, inject, load_adapter_state
from trainers.lora_format import read_lora, write_lora

TOLERANCE = 1e-4
DEPTH, BASE_CHANNELS = 2, 32
NATIVE_MODULES = 8 + 5
"""What a LoRA adapts of a block in the native model: qkv, proj, w1, w2 of both streams; of the last one proj_y and mlp_y are not there."""
SPEC = LoraSpec(rank=4)
VARIANT = FAMILY.variants[0].id
WIDE_VAE = {"encoder_block_out_channels": (32, 64, 128, 192), "decoder_block_out_channels": (32, 64, 128, 192)}
PROMPTS = ["a kitten playing the piano", "", "a (red) circle, 100%"]
STEPS = [7, 20, 30, 38]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that both sides read: a transformer of two blocks, a LoRA on it, a VAE, a text encoder."""
    folder = tmp_path_factory.mktemp("mochi")
    write_transformer(folder / "mochi_preview_bf16.safetensors")
    write_trained_lora(folder)
    state = native_vae(tiny_mochi_vae(**WIDE_VAE))
    save_file(state, folder / "mochi_vae.safetensors")
    bare = {name.removeprefix("decoder."): tensor for name, tensor in state.items() if name.startswith("decoder.")}
    save_file(bare, folder / "decoder.safetensors")
    save_file(question(), folder / "question")
    save_file(videos(), folder / "videos")
    return folder


def write_transformer(path: Path) -> None:
    """Two blocks at true width in bf16; the noise is one buffer, read at other places, for time's sake."""
    config = detect_config() | {"num_layers": DEPTH}
    noise = torch.randn(2**23, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    state, start = {}, 0
    for name, tensor in FAMILY.build(config).state_dict().items():
        count, start = tensor.numel(), (start + 7919) % 2**20
        values = noise[start:].repeat(count // (2**23 - 2**20) + 1)[:count].view(tensor.shape)
        scale = 1.0 if name == "pos_frequencies" else 0.1 if tensor.ndim == 1 else tensor[0].numel() ** -0.5
        state[name] = (scale * values + (1.0 if "norm" in name and tensor.ndim == 1 else 0.0)).to(torch.bfloat16)
    prefixed = {f"model.diffusion_model.{name}": tensor for name, tensor in native_state(state, FAMILY.keys).items()}
    save_file(prefixed, path)


def detect_config() -> dict[str, Any]:
    return {"num_attention_heads": 24, "attention_head_dim": 128, "pooled_projection_dim": 1536, "text_embed_dim": 4096}


def load(folder: Path) -> torch.nn.Module:
    checkpoint = Checkpoint.open(folder / "mochi_preview_bf16.safetensors")
    return load_transformer(checkpoint, detect(checkpoint), "cpu", torch.float32, keep_stored=False)


def write_trained_lora(folder: Path) -> None:
    """As the trainer writes it, with random B."""
    transformer = FAMILY.build(detect_config() | {"num_layers": DEPTH})
    inject(transformer, FAMILY, SPEC, seed=0)
    chance = torch.Generator().manual_seed(1)
    modules = {
        name: LoraPair(pair.down_RI, 0.5 * torch.randn(pair.up_OR.shape, generator=chance), pair.alpha)
        for name, pair in adapter_state(transformer, SPEC).modules.items()
    }
    write_lora(folder / "lora.safetensors", Adapter(modules), FAMILY)


def question() -> dict[str, torch.Tensor]:
    """One clip at one noise level, with a caption of 9 tokens."""
    chance = torch.Generator().manual_seed(0)
    record = TextRecord(torch.randn(9, 4096, generator=chance))
    padded_BLD = torch.nn.functional.pad(record.embeds_LD, (0, 0, 0, 256 - 9))[None]
    clean, noise = (torch.randn(1, 12, 3, 4, 6, generator=chance) for _ in range(2))
    given = {"clean_BCFHW": clean, "noise_BCFHW": noise, "sigma": torch.tensor(0.7), "text_BLD": padded_BLD}
    return {**given, "cond/attention_mask": (torch.arange(256) < 9).long()[None]}


def videos() -> dict[str, torch.Tensor]:
    chance = torch.Generator().manual_seed(2)
    pixels = torch.rand(1, 3, 13, 16, 24, generator=chance) * 2 - 1
    return {"pixels_BCFHW": pixels, "latents_BCFHW": torch.randn(1, 12, 3, 2, 3, generator=chance)}


@pytest.fixture(scope="module")
def answers(comfyui: ComfyUI, folder: Path) -> dict[str, Any]:
    """All that ComfyUI says, asked in one process; tensors under "tensors"."""
    write_text_encoder(folder / "text", comfyui)
    base = {"family": "mochi", "variant": VARIANT, "transformer": str(folder / "mochi_preview_bf16.safetensors")}
    vae = base | {"vae": str(folder / "mochi_vae.safetensors")}
    step = {"task": "denoise", "base": base, "inputs": str(folder / "question")}
    tasks = {
        "bare": step | {"output": str(folder / "bare")},
        "patched": step | {"output": str(folder / "patched"), "lora": str(folder / "lora.safetensors")},
        "vae": {"task": "vae", "base": vae, "inputs": str(folder / "videos"), "output": str(folder / "vae")},
        "decoder_only": {"task": "decoder_only", "base": base | {"vae": str(folder / "decoder.safetensors")}},
        "sigmas": {"task": "sigmas", "shift": FAMILY.sampling(FAMILY.variants[0]).shift, "steps": STEPS},
        "misfits": {"task": "misfits", "base": base},
        "text": {"task": "text", "base": base | {"text_encoders": [str(folder / "text")]}, "prompts": PROMPTS},
    }
    tasks["text"]["output"] = str(folder / "rows")
    arguments = {"pack": str(PACK), "depth": DEPTH, "base_channels": BASE_CHANNELS, "tasks": list(tasks.values())}
    told = dict(zip(tasks, comfyui.call("native_mochi.py", **arguments), strict=True))
    files = {"bare": "bare", "patched": "patched", "vae": "vae", "text": "rows"}
    return {**told, "tensors": {name: load_file(folder / file) for name, file in files.items()}}


def write_text_encoder(folder: Path, comfyui: ComfyUI) -> None:
    """A tiny T5 in transformers' layout with the tokenizer that ComfyUI brings."""
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(0)
    sizes = {"d_model": 32, "num_layers": 2, "num_heads": 2, "d_kv": 8, "d_ff": 16}
    encoder = T5EncoderModel(T5Config(vocab_size=32128, feed_forward_proj="gated-gelu", **sizes))
    encoder.half().float().save_pretrained(folder / "text_encoder")  # ComfyUI keeps text encoders in fp16
    shutil.copytree(comfyui.root / "comfy" / "text_encoders" / "t5_tokenizer", folder / "tokenizer")


@torch.no_grad()
def test_one_step_of_its_sampler_is_our_velocity_without_and_with_a_lora(answers: dict[str, Any], folder: Path) -> None:
    given, tensors = question(), answers["tensors"]
    sigma = given["sigma"].reshape(1)
    noisy = noised(given["clean_BCFHW"], given["noise_BCFHW"], sigma)
    assert_near(tensors["bare"]["noisy"], noisy)
    transformer = load(folder)
    prepared = FAMILY.prepare(FAMILY.variants[0], tensors["bare"]["noisy"], sigma, Conditions())
    text = FAMILY.collate_text([TextRecord(given["text_BLD"][0, :9])], torch.device("cpu"), torch.float32)
    ours = FAMILY.predict(transformer, prepared, text)
    inject(transformer, FAMILY, SPEC, seed=0)
    load_adapter_state(transformer, read_lora(folder / "lora.safetensors", FAMILY))
    ours_with_lora = FAMILY.predict(transformer, prepared, text)
    bare, patched = (tensors[name]["velocity"] for name in ("bare", "patched"))
    figures = {"bare": relative(bare, ours), "with LoRA": relative(patched, ours_with_lora), "LoRA's effect": relative(patched, bare)}
    print(json.dumps(figures))
    assert figures["bare"] < TOLERANCE
    assert figures["with LoRA"] < TOLERANCE
    assert figures["LoRA's effect"] > 100 * TOLERANCE
    assert answers["bare"]["class"] == "GenmoMochi"
    assert answers["patched"]["patched"] == NATIVE_MODULES
    assert len(load_file(folder / "lora.safetensors")) == 2 * NATIVE_MODULES
    assert not [line for line in answers["patched"]["log"] if "not loaded" in line.lower()]


@torch.no_grad()
def test_its_vae_decodes_as_ours(answers: dict[str, Any]) -> None:
    ours = FAMILY.decode_video(tiny_mochi_vae(**WIDE_VAE), videos()["latents_BCFHW"])
    found = answers["tensors"]["vae"]["pixels"]
    print(json.dumps({"decoded": relative(found, ours)}))
    assert answers["vae"] == {"class": "VideoVAE", "dtype": "torch.float32"}
    assert found.shape == ours.shape == (1, 3, 13, 16, 24)
    assert relative(found, ours) < TOLERANCE


@torch.no_grad()
def test_its_vae_encodes_one_frame_as_ours_and_more_without_a_causal_mask(answers: dict[str, Any]) -> None:
    vae, found, pixels = tiny_mochi_vae(**WIDE_VAE), answers["tensors"]["vae"], videos()["pixels_BCFHW"]
    first, published = FAMILY.encode_video(vae, pixels[:, :, :1]), FAMILY.encode_video(vae, pixels)
    for module in vae.modules():
        if hasattr(module, "is_causal"):
            module.is_causal = False
    figures = {"one frame": relative(found["first"], first), "as published": relative(found["latents"], published)}
    figures["without the mask"] = relative(found["latents"], FAMILY.encode_video(vae, pixels))
    print(json.dumps(figures))
    assert figures["one frame"] < TOLERANCE
    assert figures["without the mask"] < TOLERANCE
    assert figures["as published"] > TOLERANCE, "ComfyUI has the mask now: encode_video says that it has not"


def test_a_vae_without_an_encoder_decodes_and_is_refused_for_encoding(answers: dict[str, Any]) -> None:
    assert answers["decoder_only"]["shape"] == [1, 1, 16, 16, 3]
    assert answers["decoder_only"]["error"].startswith("the VAE's file holds the decoder only; clips are encoded with the encoder. ")


def test_the_schedule_is_that_of_the_graph(answers: dict[str, Any]) -> None:
    shift = FAMILY.sampling(FAMILY.variants[0]).shift
    assert answers["sigmas"]["shift"] == shift
    for steps, levels in zip(STEPS, answers["sigmas"]["levels"], strict=True):
        assert_near(torch.tensor(simple_schedule(steps, shift, 0)), torch.tensor(levels), share=1e-6)


def test_text_is_that_of_a_diffusers_folder_and_core_s_node(answers: dict[str, Any], folder: Path) -> None:
    files = EncoderFiles.find(folder / "text", vae=folder / "mochi_vae.safetensors", tokenizer=folder / "text" / "tokenizer")
    ours = FolderEncoder(FAMILY, FAMILY.variants[0], files, "cpu").encode_text(PROMPTS)
    tensors = answers["tensors"]["text"]
    assert answers["text"] == "MochiT5Tokenizer"
    assert [len(tensors[f"text{index}"]) for index in range(3)] == [len(record.embeds_LD) for record in ours]
    assert len(ours[1].embeds_LD) == 1, "the empty prompt is its end mark"
    figures = [relative(tensors[f"text{index}"], record.embeds_LD.float()) for index, record in enumerate(ours)]
    print(json.dumps({"text": figures}))
    assert max(figures) < TOLERANCE
    for index in (0, 1):
        batch = FAMILY.collate_text([TextRecord(tensors[f"text{index}"])], torch.device("cpu"), torch.float32)
        counts_BL = tensors[f"mask{index}"].bool()
        assert batch.mask_BL is None
        assert_near(batch.embeds_BLD[0], tensors[f"rows{index}"][counts_BL], share=1e-6)


def test_objects_of_other_models_are_refused(answers: dict[str, Any]) -> None:
    assert "the VAE is a PixelspaceConversionVAE; Mochi has its own" in answers["misfits"]
