"""Encoding with real classes of tiny size and random weights: AutoencoderKLWan, UMT5 and a tokenizer, from files."""

from __future__ import annotations

import shutil
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from clip_files import write_caption, write_video
from encoder_files import write_models

from trainers.data.buckets import Geometry
from trainers.data.scan import scan_folder
from trainers.data.video import read_window
from trainers.encoders import EncodeReport, encode_dataset, pixels_from_frames
from trainers.errors import CheckpointError
from trainers.family import families
from trainers.folder_encoder import EncoderFiles, FolderEncoder
from trainers.stable_file import save_file

WAN = families()["wan"]
VARIANT = WAN.variants[0]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_models(folder)
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    for index in range(3):
        write_caption(write_video(folder / f"{index}.mp4", 10 + index, 16), ["a cat", "a dog walks", "a cat"][index])
    return folder


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a socket was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


class Watched(FolderEncoder):
    """Tells which models it has loaded."""

    def __init__(self, base: Path, **places: Path) -> None:
        super().__init__(WAN, VARIANT, EncoderFiles.find(base, **places), "cpu")
        self.loads: list[str] = []

    def _load_vae(self) -> torch.nn.Module:
        self.loads.append("vae")
        assert self._loaded == ("vae", {}), "two models in memory"
        return super()._load_vae()

    def _load_encoder(self, folder: Path) -> Any:
        self.loads.append("text_encoder")
        assert self._loaded[1].keys() <= {"tokenizer"}, "two models in memory"
        return super()._load_encoder(folder)


def encode(clips: Path, encoder: FolderEncoder, out: Path) -> tuple[int, int, int, int]:
    report: EncodeReport = encode_dataset(scan_folder(clips), Geometry(48, 32, 9), encoder, out)
    return report.latents_new, report.latents_cached, report.texts_new, report.texts_cached


def test_only_what_changed_is_encoded_and_only_its_model_loaded(models: Path, source: Path, tmp_path: Path):
    clips, base, out = tmp_path / "clips", tmp_path / "base", tmp_path / "out"
    shutil.copytree(source, clips)
    shutil.copytree(models, base)

    def run() -> tuple[tuple[int, int, int, int], list[str]]:
        encoder = Watched(base)
        return encode(clips, encoder, out), encoder.loads

    assert run() == ((3, 0, 3, 0), ["text_encoder", "vae"])
    assert run() == ((0, 3, 0, 3), [])
    write_caption(clips / "0.mp4", "a dog")
    assert run() == ((0, 3, 1, 3), ["text_encoder"])
    write_video(clips / "1.mp4", 20, 16)
    assert run() == ((1, 2, 0, 4), ["vae"])
    change_one_weight(base / "vae/diffusion_pytorch_model.safetensors")
    assert run() == ((3, 0, 0, 4), ["vae"])
    (base / "tokenizer/tokenizer.json").write_text((base / "tokenizer/tokenizer.json").read_text() + "\n")
    assert run() == ((0, 3, 4, 0), ["text_encoder"])


def change_one_weight(path: Path) -> None:
    from safetensors.torch import load_file

    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    tensors["quant_conv.weight"].view(-1)[5] += 1.0
    save_file(tensors, path, overwrite=True)


def test_latents_and_text_are_what_the_family_makes_of_the_same_models(models: Path, source: Path, tmp_path: Path):
    from diffusers import AutoencoderKLWan
    from transformers import AutoTokenizer, UMT5EncoderModel

    encoder = FolderEncoder(WAN, VARIANT, EncoderFiles.find(models), "cpu")
    encoded = encode_dataset(scan_folder(source), Geometry(48, 32, 9), encoder, tmp_path).encoded
    assert encoded is not None
    vae = AutoencoderKLWan.from_pretrained(models / "vae", local_files_only=True)
    text_encoder = UMT5EncoderModel.from_pretrained(models / "text_encoder", local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(models / "tokenizer", local_files_only=True)
    for item in encoded.items:
        frames = read_window(source / item.source, 0.0, 9, 16.0, (item.height, item.width))
        latents = WAN.encode_video(vae, pixels_from_frames(frames))[0]
        assert latents.shape == WAN.latent(VARIANT).shape(9, item.height, item.width)
        assert torch.equal(encoded.latents_CFHW(item), latents)
        (record,) = WAN.encode_text(
            VARIANT, SimpleNamespace(tokenizer=lambda: tokenizer, text_encoder=lambda: text_encoder), [item.caption]
        )
        assert torch.equal(encoded.text(item.text).embeds_LD, record.embeds_LD)
        assert record.embeds_LD.shape == (len(item.caption.split()) + 1, 16)
    assert encoded.text(encoded.prompts[""]).embeds_LD.shape == (1, 16)


def test_a_native_vae_file_gives_the_same_latents(models: Path, source: Path, tmp_path: Path):
    from safetensors.torch import load_file

    stored = load_file(models / "vae/diffusion_pytorch_model.safetensors")
    native = {WAN.vaes[0].keys.to_native(name).name: tensor for name, tensor in stored.items()}
    save_file(native, tmp_path / "wan_2.1_vae.safetensors")
    encoder = Watched(models, vae=tmp_path / "wan_2.1_vae.safetensors")
    dataset = scan_folder(source)
    from_file = encode_dataset(dataset, Geometry(48, 32, 9), encoder, tmp_path / "file").encoded
    from_folder = encode_dataset(dataset, Geometry(48, 32, 9), Watched(models), tmp_path / "folder").encoded
    assert from_file is not None
    assert from_folder is not None
    for one, other in zip(from_file.items, from_folder.items, strict=True):
        assert torch.equal(from_file.latents_CFHW(one), from_folder.latents_CFHW(other))


def test_every_missing_part_is_named_at_once(tmp_path: Path):
    with pytest.raises(CheckpointError) as caught:
        EncoderFiles.find()
    assert [problem.value for problem in caught.value.problems] == [
        "no vae is given",
        "no text_encoder is given",
        "no tokenizer is given",
    ]
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError) as caught:
        EncoderFiles.find(tmp_path, text_encoder=tmp_path / "file")
    values = [problem.value for problem in caught.value.problems]
    assert len(values) == 3
    assert "vae does not exist" in values[0]
    assert "file is a file" in values[1]
