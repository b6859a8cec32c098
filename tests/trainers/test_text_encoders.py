"""A text encoder of another model is told by its header, before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from model_files import write_header_only
from tiny import WAN, TinyShape, tiny_job, write_encoded

from trainers.errors import JobError
from trainers.preflight import check
from trainers.tensor_files import open_tensor_file
from trainers.text_encoders import encoder_problem, row_width

VARIANT = WAN.variants[0]
CONFIG = {"text_dim": 4096}
T5, LLAMA, CLIP_L = ("shared.weight", 4096), ("model.embed_tokens.weight", 4096), ("text_model.embeddings.token_embedding.weight", 768)


def encoder(folder: Path, name: str, words: tuple[str, int]) -> Path:
    key, width = words
    tensors = {key: (torch.bfloat16, (1000, width)), "final_layer_norm.weight": (torch.bfloat16, (width,))}
    return write_header_only(folder / f"{name}.safetensors", tensors)


@pytest.mark.parametrize("words", [T5, LLAMA, CLIP_L, ("token_embedding.weight", 4096), ("encoder.embed_tokens.weight", 512)])
def test_the_table_of_words_tells_the_width(tmp_path: Path, words: tuple[str, int]) -> None:
    assert row_width(encoder(tmp_path, "encoder", words)) == words[1]


def test_what_the_header_does_not_tell_is_no_problem(tmp_path: Path) -> None:
    path = encoder(tmp_path, "unknown", ("blocks.0.weight", 4096))
    (tmp_path / "encoder.gguf").write_bytes(b"GGUF")
    assert row_width(path) is None
    assert row_width(tmp_path / "encoder.gguf") is None
    assert encoder_problem([path], WAN, VARIANT, CONFIG) is None
    assert encoder_problem([], WAN, VARIANT, CONFIG) is None


def test_one_of_the_encoders_must_fit(tmp_path: Path) -> None:
    clip_l, llama = encoder(tmp_path, "clip_l", CLIP_L), encoder(tmp_path, "llama", LLAMA)
    assert encoder_problem([clip_l, llama], WAN, VARIANT, CONFIG) is None
    problem = encoder_problem([clip_l], WAN, VARIANT, CONFIG)
    told = "clip_l.safetensors gives text rows 768 wide; Wan 2.1 T2V 1.3B takes 4096. Choose the model's own text encoder."
    assert str(problem) == told


def test_captions_of_another_width_are_told_before_training(tmp_path: Path) -> None:
    job = tiny_job(tmp_path, TinyShape(text_dim=64))
    check(job)
    other = write_encoded(tmp_path / "other", TinyShape(text_dim=48))
    with pytest.raises(JobError, match=r"the captions were encoded as rows 48 wide; .* takes 64\. Encode it again"):
        check(job.model_copy(update={"encoded": str(other)}))


def test_the_command_line_tells_it_before_it_encodes(tmp_path: Path) -> None:
    from trainers.cli.files import _check_text_encoder
    from trainers.errors import CheckpointError

    transformer = tiny_job(tmp_path, TinyShape(text_dim=64)).base.transformer
    files = SimpleNamespace(text_encoder=encoder(tmp_path, "t5", T5), text_encoder_2=None)
    with pytest.raises(CheckpointError, match=r"t5\.safetensors gives text rows 4096 wide; .* takes 64"):
        _check_text_encoder(SimpleNamespace(transformer=transformer, variant=None), files)
    assert "shared.weight" in open_tensor_file(files.text_encoder).tensors
