from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from trainers.data.cache import Cache
from trainers.errors import DatasetError
from trainers.family import TextRecord

WINDOW = {"file_hash": "f", "start_seconds": 0.5, "num_frames": 5, "fps": 16.0, "height": 64, "width": 96, "encoder_identity": "v"}
OTHER = {"file_hash": "g", "start_seconds": 0.25, "num_frames": 9, "fps": 24.0, "height": 80, "width": 64, "encoder_identity": "w"}


def test_every_part_of_a_window_makes_another_key():
    keys = {Cache.latents_key(**WINDOW)} | {Cache.latents_key(**{**WINDOW, name: value}) for name, value in OTHER.items()}
    assert len(keys) == 1 + len(OTHER)
    assert Cache.latents_key(**WINDOW) == Cache.latents_key(**dict(reversed(WINDOW.items())))
    assert Cache.text_key("a", "v") != Cache.text_key("a", "w") != Cache.text_key("b", "w")


def test_what_is_written_is_read_back_bit_for_bit(tmp_path: Path):
    cache = Cache(tmp_path)
    latents = torch.randn(4, 2, 3, 5).transpose(1, 2)
    record = TextRecord(torch.randn(7, 8).bfloat16(), torch.randn(3))
    assert not cache.has_latents("ab1")
    assert not cache.has_text("ab1")
    cache.write_latents("ab1", latents)
    cache.write_text("ab1", record)
    assert torch.equal(cache.read_latents("ab1"), latents)
    read = cache.read_text("ab1")
    assert read.embeds_LD.dtype is torch.bfloat16
    assert torch.equal(read.embeds_LD, record.embeds_LD)
    assert read.pooled_D is not None
    assert torch.equal(read.pooled_D, record.pooled_D)
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.*")) == [
        "latents/ab/ab1.safetensors",
        "text/ab/ab1.safetensors",
    ]


def test_a_missing_and_a_damaged_file_say_what_to_do(tmp_path: Path):
    cache = Cache(tmp_path)
    with pytest.raises(DatasetError, match="is missing"):
        cache.read_latents("abc")
    cache.write_latents("abc", torch.zeros(1, 1, 1, 1))
    path = tmp_path / "latents/ab/abc.safetensors"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(DatasetError, match=r"damaged.*Delete it"):
        cache.read_latents("abc")


def test_a_file_is_hashed_once_until_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import hashlib

    reads = []
    digest = hashlib.file_digest
    monkeypatch.setattr("hashlib.file_digest", lambda file, name: reads.append(file.name) or digest(file, name))
    clip = tmp_path / "clip ü.mp4"
    clip.write_bytes(b"one")
    first = Cache(tmp_path / "cache").file_hash(clip)
    assert first == hashlib.sha256(b"one").hexdigest()
    assert Cache(tmp_path / "cache").file_hash(clip) == first
    assert len(reads) == 1
    clip.write_bytes(b"other")
    assert Cache(tmp_path / "cache").file_hash(clip) == hashlib.sha256(b"other").hexdigest()
    assert len(reads) == 2


def test_a_torn_line_of_remembered_hashes_is_passed_over(tmp_path: Path):
    clip = tmp_path / "clip"
    clip.write_bytes(b"one")
    cache = Cache(tmp_path)
    right = cache.file_hash(clip)
    lines = tmp_path / "hashes.jsonl"
    lines.write_bytes(b'{"torn\n5\n\n' + lines.read_bytes() + b'{"path": "x"')
    again = Cache(tmp_path)
    assert again.file_hash(clip) == right
    (tmp_path / "new").write_bytes(b"two")
    again.file_hash(tmp_path / "new")
    assert len(Cache(tmp_path)._known_hashes()) == 2


WRITER = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from trainers.data.cache import Cache
cache = Cache(sys.argv[2])
for index in range(60):
    cache.write_latents(f"{index % 5}k", torch.full((4, 4, 16, 16), float(index % 5)))
"""


def test_two_processes_may_write_the_same_files(tmp_path: Path):
    root = Path(__file__).parents[3]
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(root), str(tmp_path)])
    cache = Cache(tmp_path)
    rounds = 0
    while writer.poll() is None or not rounds:
        for index in range(5):
            content = torch.full((4, 4, 16, 16), float(index))
            cache.write_latents(f"{index}k", content)
            assert torch.equal(cache.read_latents(f"{index}k"), content)
        rounds += 1
    assert writer.wait() == 0
    assert all(cache.has_latents(f"{index}k") for index in range(5))
    assert not list(tmp_path.rglob("*.partial"))


def test_hashes_of_files_with_odd_names_are_remembered(tmp_path: Path):
    for name in ("new\nline.mp4", "\udcff.mp4"):
        (tmp_path / name).write_bytes(b"one")
        Cache(tmp_path).file_hash(tmp_path / name)
    assert len(Cache(tmp_path)._known_hashes()) == 2
