"""Adding a family touches one file: this one is put into `trainers/families/`, and goes all the way."""

from __future__ import annotations

import ast
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import trainers.families
from trainers.checkpoint import Checkpoint
from trainers.data.buckets import Geometry
from trainers.data.encoded import Encoded
from trainers.data.scan import scan_folder
from trainers.data.video_file import write_video
from trainers.encoders import encode_dataset
from trainers.errors import CheckpointError
from trainers.family import Family, VaeDetection, detect, detect_vae, families, family_of
from trainers.folder_encoder import EncoderFiles, FolderEncoder
from trainers.inspection import inspect_file
from trainers.job import parse_job
from trainers.load import native_state
from trainers.lora_format import read_lora
from trainers.run import Run
from trainers.stable_file import save_file
from trainers.trainer import train
from trainers.training import lora_path

ROOT = Path(__file__).parents[3]
TEXT_DIM = 16


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Family]:
    """The registered family: its file lies in a folder of the package `trainers.families`, and that is all."""
    folder = tmp_path / "more_families"
    folder.mkdir()
    shutil.copy(Path(__file__).with_name("toy_family.py"), folder / "toy.py")
    monkeypatch.setattr(trainers.families, "__path__", [*trainers.families.__path__, str(folder)])
    families.cache_clear()
    yield families()["toy"]
    families.cache_clear()
    sys.modules.pop("trainers.families.toy")


@pytest.fixture
def files(tmp_path: Path, toy: Family) -> Path:
    """A base in native files, a text encoder, and clips with captions."""
    torch.manual_seed(0)
    config = {"width": 16, "channels": 6, "text_dim": TEXT_DIM, "layers": 2}
    vae = VaeDetection(toy, toy.vaes[0], {"channels": 6})
    for name, module, table in (
        ("transformer", toy.build(config), toy.keys),
        ("vae", toy.build_vae(vae), toy.vaes[0].keys),
    ):
        state = {key: 0.2 * torch.randn(tensor.shape) for key, tensor in module.state_dict().items()}
        save_file(native_state(state, table), tmp_path / f"{name}.safetensors")
    write_text_encoder(tmp_path)
    for index in range(3):
        frames_FHWC = np.broadcast_to(np.uint8(40 * index) + np.arange(8, dtype=np.uint8)[:, None, None, None], (8, 32, 32, 3))
        write_video(tmp_path / "clips" / f"{index}.mp4", frames_FHWC, fps=8)
        (tmp_path / "clips" / f"{index}.txt").write_text(f"a circle {index}")
    return tmp_path


def write_text_encoder(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    (folder / "clips").mkdir()
    words = {word: index for index, word in enumerate(("<pad>", "</s>", "<unk>", "a", "circle", "0", "1", "2"))}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    fast.save_pretrained(folder / "tokenizer")
    config = T5Config(vocab_size=len(words), d_model=TEXT_DIM, num_layers=1, num_heads=2, d_kv=4, d_ff=8)
    T5EncoderModel(config).save_pretrained(folder / "text_encoder")


def test_it_is_detected_encoded_trained_and_previewed(files: Path, toy: Family) -> None:
    transformer, vae = files / "transformer.safetensors", files / "vae.safetensors"
    assert detect(Checkpoint.open(transformer)).variant == toy.variants[0]
    assert inspect_file(transformer).family == inspect_file(vae).family == "toy"
    family, variant = family_of("toy-1")
    encoder = FolderEncoder(family, variant, EncoderFiles.find(files, vae=vae), "cpu")
    dataset = scan_folder(files / "clips")
    encode_dataset(dataset, Geometry(width=32, height=32, num_frames=5), encoder, files / "encoded", prompts=["a circle"])
    assert {item.num_frames for item in Encoded.open(files / "encoded").items} == {5}
    previews = {"every_steps": 20, "prompts": ["a circle"], "width": 32, "height": 32, "num_frames": 5, "before_training": False}
    job = parse_job(
        {
            "name": "toy",
            "base": {"transformer": str(transformer), "vae": str(vae)},
            "encoded": str(files / "encoded"),
            "runs_folder": str(files / "runs"),
            "loras_folder": str(files / "loras"),
            "device": "cpu",
            "steps": 20,
            "lora": {"rank": 2, "targets": "attention"},
            "optimizer": {"learning_rate": 1e-2},
            "gradient_checkpointing": False,
            "tensorboard": False,
            "held_out": {"every_steps": 0},
            "previews": previews,
        }
    )
    run = Run.create(job)
    assert train(run) == "done"
    losses = [line["loss"] for line in run.read_metrics()]
    assert sum(losses[-5:]) < sum(losses[:5])
    adapter = read_lora(lora_path(run, 20))
    assert set(adapter.modules) == {f"blocks.{index}.to_{name}" for index in (0, 1) for name in ("q", "k", "v", "out")}
    assert all(bool(pair.up_OR.any()) for pair in adapter.modules.values())
    assert "LoRA for Toy" in str(inspect_file(lora_path(run, 20)))
    assert (run.samples_folder / "step-000020-0.mp4").stat().st_size > 500


def test_its_files_and_those_of_others_are_told_apart(files: Path, toy: Family) -> None:
    for other in families().values():
        if other is not toy:
            assert other.detect(Checkpoint.open(files / "transformer.safetensors")) is None
            with pytest.raises(CheckpointError, match=f"is the Toy VAE; {other.title} needs its own VAE"):
                detect_vae(Checkpoint.open(files / "vae.safetensors", "vae"), other)
    assert [str(problem) for problem in toy.latent(toy.variants[0]).problems(80, 32, 32)] == [
        "num_frames is 80; this model needs 2n+1. Use 79 or 81."
    ]


# Nothing else knows a family


IDS = sorted(families())
EXAMPLES = {"trainers/cli/files.py": ["wan2.1-t2v-1.3b"]}
"""The model that `dataset` reports for when the user names none."""
SOURCES = [
    path
    for folder in ("trainers", "nodes")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if not path.relative_to(ROOT).as_posix().startswith(("trainers/families/", "trainers/demo/"))
]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_other_source_names_a_family(path: Path) -> None:
    """Prose may: docstrings, and what users read. Code may not: no id of a family or a variant, no module of theirs."""
    assert named_in(path.read_text("utf-8")) == EXAMPLES.get(path.relative_to(ROOT).as_posix(), [])


def test_the_search_finds_them() -> None:
    found = named_in('import comfy.ldm.wan.model\nfrom .families.mochi import KEYS\nif family.id == "wan": x = "mochi-1-preview"\n')
    assert sorted(found) == ["comfy.ldm.wan.model", "families.mochi", "mochi-1-preview", "wan"]
    assert named_in('"""Of Wan."""\nx = "such as wan2.1-t2v", "tiny Wan (built in)"\n') == []


def named_in(source: str) -> list[str]:
    is_id = re.compile(rf"({'|'.join(IDS)})(video|v)?([-_.\d].*)?", re.IGNORECASE)
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and is_id.fullmatch(node.value.strip()):
            found.append(node.value)
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        found += [name for name in names if set(name.split(".")) & set(IDS)]
        if isinstance(node, ast.Attribute) and node.attr in IDS:
            found.append(node.attr)
    return found
