"""ComfyUI's VAE and CLIP, through the graph's encoder, give what the trainer's own encoder gives."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from installation import ComfyUI
from questions import ask, relative
from safetensors.torch import load_file, save_file
from tiny import VARIANT, WAN

from trainers.checkpoint import Checkpoint
from trainers.demo import demo, world
from trainers.demo.text import encode_captions
from trainers.encoders import pixels_from_frames
from trainers.family import detect_vae
from trainers.folder_encoder import EncoderFiles, FolderEncoder
from trainers.load import load_vae

PROMPTS = [
    "a red circle moving diagonally",
    "",
    "a blue square (striped) moving left",
    "a (green:1.4) star, ((white)) ground \\(plain\\) \\ moving down",
    "a kitten " * 200,
]
BASE = {
    "family": "wan",
    "variant": VARIANT,
    "transformer": str(demo.TRANSFORMER),
    "vae": str(demo.VAE),
    "text_encoders": [str(demo.BASE)],
}
ROWS = 512


@pytest.fixture(scope="module")
def answers(comfyui: ComfyUI, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All answers of ComfyUI, asked in two processes; tensors under "tensors"."""
    folder = tmp_path_factory.mktemp("encoders")
    pixels_BCFHW = pixels_from_frames(world.render(world.random_scenes(1, 3)[0]))
    save_file({"pixels_BCFHW": pixels_BCFHW.contiguous()}, folder / "pixels")
    files = {"pixels": str(folder / "pixels"), "output": str(folder / "encoded")}
    (encode,) = ask(comfyui, {"task": "encode", "base": BASE, "prompts": PROMPTS, **files})
    save_file({"encoder.final_layer_norm.weight": torch.zeros(4)}, folder / "umt5.safetensors")
    escapes, identities, refusal, misfits, tied, unpadded = ask(
        comfyui,
        {"task": "escapes", "prompts": PROMPTS},
        {"task": "identities", "base": BASE},
        {"task": "refusal", "base": BASE | {"text_encoders": [str(folder / "umt5.safetensors")]}},
        {"task": "misfits", "base": BASE},
        {"task": "clip_identity", "base": BASE | {"text_encoders": [str(write_tied(folder / "tied"))]}},
        {"task": "unpadded"},
    )
    return {
        **encode,
        "escapes": escapes,
        "objects": identities,
        "refusal": refusal,
        "misfits": misfits,
        "tied": tied,
        "unpadded": unpadded,
        "tensors": load_file(folder / "encoded"),
        "pixels": pixels_BCFHW,
    }


def write_tied(folder: Path) -> Path:
    """The tiny text encoder with its embeddings under their other name; the path of its weights, as a user may choose it."""
    shutil.copytree(demo.BASE / "tokenizer", folder / "tokenizer")
    shutil.copytree(demo.BASE / "text_encoder", folder / "text_encoder")
    path = folder / "text_encoder" / "model.safetensors"
    state = load_file(path)
    save_file({name.replace("shared.", "encoder.embed_tokens."): tensor.clone() for name, tensor in state.items()}, path)
    return path


def test_latents_are_the_trainer_s(answers: dict[str, Any]):
    checkpoint = Checkpoint.open(demo.VAE, "vae")
    vae = load_vae(checkpoint, detect_vae(checkpoint, WAN), "cpu")
    expected = WAN.encode_video(vae, answers["pixels"])
    found = answers["tensors"]["latents"]
    print(json.dumps({"latents": relative(found, expected)}))
    assert answers["vae_dtype"] == "torch.float32"
    assert found.shape == (1, 16, 3, 8, 8)
    assert relative(found, expected) < 1e-5


def test_text_is_the_trainer_s(answers: dict[str, Any]):
    expected = encode_captions(demo.BASE, PROMPTS[:4])
    found = [answers["tensors"][f"text{index}"] for index in range(4)]
    print(json.dumps({"text": [relative(ours, theirs) for ours, theirs in zip(found, expected, strict=True)]}))
    assert [len(rows) for rows in found] == [len(rows) for rows in expected]
    assert len(found[1]) == 1, "the empty prompt is its end mark"
    assert all(relative(ours, theirs) < 1e-5 for ours, theirs in zip(found, expected, strict=True))


def test_text_is_that_of_the_command_line_s_encoder(answers: dict[str, Any]):
    encoder = FolderEncoder(WAN, WAN.variants[-1], EncoderFiles.find(demo.BASE, vae=demo.VAE), "cpu")
    for index, record in enumerate(encoder.encode_text(PROMPTS[:4])):
        found = answers["tensors"][f"text{index}"]
        assert found.shape == record.embeds_LD.shape
        assert relative(found, record.embeds_LD.float()) < 5e-3, "it computes in fp16, as its weights are stored"


def test_it_is_what_core_s_node_gives_but_for_weights_and_padding(answers: dict[str, Any]):
    for index, prompt in enumerate(PROMPTS):
        ours, node = answers["tensors"][f"text{index}"], answers["tensors"][f"node{index}"][0]
        assert len(node) >= ROWS
        same = torch.equal(ours, node[: len(ours)]) and not node[len(ours) :].any()
        assert same == ("(" not in prompt), prompt


def test_a_caption_longer_than_the_model_takes_is_cut_where_it_is_used(answers: dict[str, Any]):
    assert len(answers["tensors"]["text4"]) > ROWS


def test_every_prompt_reaches_the_tokenizer_as_it_is_written(answers: dict[str, Any]):
    for prompt, parts in zip(PROMPTS, answers["escapes"], strict=True):
        assert "".join(text for text, _ in parts) == prompt
        assert {weight for _, weight in parts} <= {1.0}


def test_an_object_s_identity_is_its_content(answers: dict[str, Any]):
    found = answers["objects"]["identities"]
    same = [
        {"vae", "vae, loaded again"},
        {"clip", "clip, loaded again", "clip, unpatched while the other is applied"},
        {"clip, patched", "clip, patched and applied"},
    ]
    for names in same:
        assert len({found[name] for name in names}) == 1, names
    alone = set(found) - set().union(*same)
    assert len({found[name] for name in (*alone, "vae", "clip", "clip, patched")}) == len(alone) + 3
    assert answers["identities"] == [f"wan comfyui {found['vae']}", f"wan comfyui {found['clip']}"], "another process said it"
    assert answers["objects"]["seconds"] < 0.5


def test_an_encoder_without_a_tokenizer_is_refused_with_a_remedy(answers: dict[str, Any]):
    assert answers["refusal"].startswith("umt5.safetensors has no tokenizer; ")
    assert "Choose" in answers["refusal"]


def test_objects_of_other_models_are_refused_at_once(answers: dict[str, Any]):
    assert "2 problems" in answers["misfits"]
    assert "the VAE is a PixelspaceConversionVAE; Wan has its own" in answers["misfits"]
    assert "the CLIP reads text with a MochiT5Tokenizer; Wan needs a WanT5Tokenizer. Choose the type wan" in answers["misfits"]


def test_tied_embeddings_are_found_under_either_name_and_from_a_file(answers: dict[str, Any]):
    assert answers["tied"] == answers["objects"]["identities"]["clip"]


def test_padding_is_what_the_mask_leaves_out_or_else_zeros_at_the_end(answers: dict[str, Any]):
    assert answers["unpadded"] == [3, 4, 1]
