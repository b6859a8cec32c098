"""HunyuanVideo's VAE, text encoders and noise levels in ComfyUI and here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hunyuan_encoders import CLIP, LLAMA, Folder, clip, image, image_processor, llama_tokenizer, llava
from hunyuan_files import random_vae
from installation import PACK, ComfyUI
from questions import relative
from safetensors.torch import load_file, save_file

from trainers.checkpoint import Checkpoint
from trainers.families.hunyuan import FAMILY, VAE_KEYS
from trainers.family import detect_vae, simple_schedule
from trainers.load import load_vae, native_state


def ask(comfyui: ComfyUI, task: str, **arguments: Any) -> Any:
    return comfyui.call("hunyuan_answers.py", pack=str(PACK), tasks=[{"task": task, **arguments}])[0]


def test_the_vae_encodes_and_decodes_one_latent_frame_as_comfyui_does(comfyui: ComfyUI, tmp_path: Path) -> None:
    """At its real width. Beyond one latent frame ComfyUI's GroupNorms see another cut of the clip: measured, not equal."""
    save_file(native_state(random_vae().state_dict(), VAE_KEYS), tmp_path / "vae.safetensors")
    chance = torch.Generator().manual_seed(0)
    given = {f"pixels{frames}": torch.rand(1, 3, frames, 32, 32, generator=chance) * 2 - 1 for frames in (1, 5)}
    given |= {f"latents{frames}": 0.5 * torch.randn(1, 16, frames, 4, 4, generator=chance) for frames in (1, 2)}
    save_file(given, tmp_path / "inputs")
    told = ask(comfyui, "vae", vae=str(tmp_path / "vae.safetensors"), inputs=str(tmp_path / "inputs"), output=str(tmp_path / "answer"))
    answers = load_file(tmp_path / "answer")
    checkpoint = Checkpoint.open(tmp_path / "vae.safetensors", "vae")
    vae = load_vae(checkpoint, detect_vae(checkpoint, FAMILY), "cpu")
    ours = {name: (FAMILY.encode_video if "pixels" in name else FAMILY.decode_video)(vae, tensor) for name, tensor in given.items()}
    figures = {name: relative(answers[name], found) for name, found in ours.items()}
    print(json.dumps(figures | told))
    assert told == {"class": "AutoencoderKL", "dtype": "torch.float32"}
    assert told["class"] in FAMILY.comfyui(FAMILY.variants[0]).vaes
    assert all(answers[name].shape == found.shape for name, found in ours.items())
    assert float(ours["latents1"].abs().lt(1).float().mean()) > 0.5, "not all of it is clamped"
    assert figures["pixels1"] < 1e-4
    assert figures["latents1"] < 1e-4
    assert 1e-3 < figures["pixels5"] < 1.0
    assert 1e-3 < figures["latents2"] < 1.0


def test_the_schedule_is_that_of_the_shipped_graph(comfyui: ComfyUI) -> None:
    for steps, expected in ask(comfyui, "sigmas", steps=[1, 4, 20, 30, 50]).items():
        assert simple_schedule(int(steps), 7.0, 0) == pytest.approx(expected, abs=1e-6)


PROMPTS = ["a red circle", "", "two lines,\nthe second of them long " + "and longer " * 30]


def test_text_from_a_diffusers_folder_is_comfyui_s_conditioning(comfyui: ComfyUI, tmp_path: Path) -> None:
    """The same small encoders, with and without an image; the template's crop, <|eot_id|> and interleave are ComfyUI's."""
    from transformers import CLIPTokenizer

    clip_tokenizer = CLIPTokenizer.from_pretrained(comfyui.root / "comfy" / "sd1_tokenizer", local_files_only=True)
    whole, text_model = llava(), clip()
    language, processor = whole.model.language_model, image_processor()
    folders = {
        "plain": Folder((llama_tokenizer(), clip_tokenizer), (language, text_model)),
        "image": Folder((llama_tokenizer(), clip_tokenizer), (whole, text_model), processor),
    }
    llama_tokenizer().save_pretrained(tmp_path)
    for name, model in {"llama": language, "llava": whole, "clip": text_model}.items():
        model.save_pretrained(tmp_path / name)
        (tmp_path / name / "model.safetensors").rename(tmp_path / f"{name}.safetensors")
    pixels = processor(images=image().numpy(), do_rescale=False, return_tensors="pt").pixel_values
    rows = whole.get_image_features(pixels).pooler_output[0]
    save_file({"rows": rows.contiguous()}, tmp_path / "image_rows")
    ask(comfyui, "text", folder=str(tmp_path), llama=LLAMA, clip=CLIP | {"hidden_act": "quick_gelu"}, prompts=PROMPTS)
    theirs, figures = load_file(tmp_path / "answer"), {}
    for variant, kind in zip(FAMILY.variants, ("plain", "image2", "image4"), strict=True):
        folder = folders["plain" if kind == "plain" else "image"]
        records = FAMILY.encode_text(variant, folder, PROMPTS, None if kind == "plain" else image())
        for index, record in enumerate(records):
            expected = theirs[f"{index} {kind} text"]
            assert record.embeds_LD.shape == expected.shape
            assert record.pooled_D is not None
            figures[f"{kind} {index}"] = relative(record.embeds_LD, expected)
            figures[f"{kind} {index} pooled"] = relative(record.pooled_D, theirs[f"{index} {kind} pooled"])
    print(json.dumps(figures))
    assert max(figures.values()) < 1e-4


def test_a_graph_s_encoder_reads_captions_with_their_first_frame_as_core_s_node_does(comfyui: ComfyUI, tmp_path: Path) -> None:
    llama_tokenizer().save_pretrained(tmp_path)
    whole, text_model = llava(), clip()
    for name, model in {"llama": whole.model.language_model, "llava": whole, "clip": text_model}.items():
        model.save_pretrained(tmp_path / name)
        (tmp_path / name / "model.safetensors").rename(tmp_path / f"{name}.safetensors")
    save_file({"image_HWC": image()}, tmp_path / "image")
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_act": "quick_gelu"}
    vision = sizes | {"image_size": 336, "patch_size": 14, "num_channels": 3, "model_type": "clip_vision_model", "projection_dim": 8}
    (tmp_path / "vision.json").write_text(json.dumps(vision))
    options = {"llama": LLAMA, "clip": CLIP | {"hidden_act": "quick_gelu"}, "vision": str(tmp_path / "vision.json")}
    told = ask(comfyui, "graph_text", folder=str(tmp_path), prompts=PROMPTS, **options)
    print(json.dumps(told))
    assert "makes no words of an image" in told.pop("refused")
    assert [len(told[variant]) for variant in ("hunyuan-i2v-v1", "hunyuan-i2v-v2")] == [len(PROMPTS)] * 2
    for prompt, (text, pooled, rows) in enumerate(told["hunyuan-i2v-v1"]):
        assert (text, pooled) == (0.0, 0.0)
        assert rows - told["hunyuan-i2v-v2"][prompt][2] == 576 // 2 - 576 // 4
    assert all(text == pooled == 0.0 for text, pooled, _ in told["hunyuan-i2v-v2"])
