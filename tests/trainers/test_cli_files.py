"""From clips to a LoRA by verbs alone: real clips, real (tiny, random) models, the real worker without a network."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from trainers import launch
from trainers.cli import main
from trainers.run import find_run

sys.path.insert(0, str(Path(__file__).parent / "data"))
from clip_files import write_caption, write_video
from encoder_files import write_models
from tiny import TinyShape, write_transformer

GEOMETRY = ["--size", "32x32", "--frames", "5"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips (one without a caption), the encoders in a diffusers folder, and a transformer in a native file."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "clips").mkdir()
    for index in range(3):
        write_caption(write_video(folder / "clips" / f"{index}.mp4", 10, 16), f"a cat {index}")
    write_video(folder / "clips" / "silent.mp4", 10, 16)
    write_models(folder / "models")
    write_transformer(folder / "tiny_wan2.1_t2v.safetensors", TinyShape(layers=1, text_dim=16))
    return folder


@pytest.fixture(scope="module")
def encoded(place: Path) -> Path:
    base = ["--base", str(place / "models"), "--variant", "wan2.1-t2v-1.3b"]
    assert main(["encode", str(place / "clips"), *base, *GEOMETRY, "--prompt", "a cat walks", "--out", str(place / "encoded")]) == 0
    return place / "encoded"


@pytest.fixture
def job_file(place: Path, encoded: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A job over them, run by the guarded worker under a device lock of this test."""
    monkeypatch.setattr(launch, "WORKER", Path(__file__).with_name("guarded_worker.py"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    values = {
        "name": "cat",
        "base": {"transformer": "tiny_wan2.1_t2v.safetensors", "vae": "models/vae"},
        "encoded": "encoded",
        "epochs": 2,
        "lora": {"rank": 4},
        "device": "cpu",
        "previews": {"every_steps": 3, "prompts": ["a cat walks"], "width": 32, "height": 32, "num_frames": 5, "sampling_steps": 2},
    }
    (place / "job.json").write_text(json.dumps(values))
    return place / "job.json"


def test_dataset_tells_what_is_used_and_what_is_not(place, capsys):
    assert main(["dataset", str(place / "clips"), *GEOMETRY]) == 0
    printed = capsys.readouterr().out
    assert "for Wan 2.1" in printed
    assert "3 videos" in printed
    assert "silent.mp4" in printed


def test_dataset_tells_all_problems_of_the_numbers(place, capsys):
    assert main(["dataset", str(place / "clips"), "--size", "33x32", "--frames", "8"]) == 1
    printed = capsys.readouterr().err
    assert "num_frames is 8; this model needs 4n+1. Use 5 or 9." in printed
    assert "width is 33" in printed


def test_encode_needs_a_model(place, capsys):
    parts = [f"--{name}={place / 'models' / name.replace('-', '_')}" for name in ("vae", "text-encoder", "tokenizer")]
    assert main(["encode", str(place / "clips"), *parts, "--out", str(place / "other")]) == 1
    assert "no model is given; clips are encoded for one model. Give --base, --transformer or --variant." in capsys.readouterr().err


def test_inspect_tells_a_transformer(place, capsys):
    assert main(["inspect", str(place / "tiny_wan2.1_t2v.safetensors")]) == 0
    assert "wan2.1-t2v" in capsys.readouterr().out


def test_inspect_refuses_what_is_no_model(tmp_path, capsys):
    (tmp_path / "x.safetensors").write_bytes(b"no header")
    assert main(["inspect", str(tmp_path / "x.safetensors")]) == 1
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize("key", ["strange.weight", "strange.lora_A.weight"])
def test_inspect_ends_with_1_for_a_file_that_cannot_be_used(tmp_path, capsys, key):
    save_file({key: torch.zeros(4, 4)}, tmp_path / "x.safetensors")
    assert main(["inspect", str(tmp_path / "x.safetensors")]) == 1
    assert "  problem " in capsys.readouterr().out


def test_plan_then_train_without_a_network_then_convert(job_file, place, capsys):
    assert main(["plan", str(job_file)]) == 0
    planned = capsys.readouterr().out
    assert "3 x 32x32, 5 frames: 8 tokens each" in planned
    assert "steps    6 of 1 clips; 3.0 are an epoch" in planned

    assert main(["train", str(job_file)]) == 0, capsys.readouterr().out
    run = find_run(place / "output" / "runs", "cat")
    assert [line["step"] for line in run.read_metrics()] == [1, 2, 3, 4, 5, 6]
    assert run.job.encoded_identity
    lora = place / "output" / "loras" / "cat" / "cat-000006.safetensors"
    assert "NETWORK" not in launch.last_log_lines(run, 1000)
    # 10 Linears of 128 x 128 or 128 x 256 (and 16 x 128 in a text projection that is no target), rank 4
    assert f"LoRA     rank 4 on 10 layers (attention+feed forward): {_parameters(lora) / 1e6:.2f} million parameters" in planned

    assert main(["convert", str(lora), str(place / "kohya.safetensors"), "--format", "kohya"]) == 0
    assert main(["convert", str(place / "kohya.safetensors"), str(place / "native.safetensors"), "--format", "native"]) == 0
    assert (place / "native.safetensors").read_bytes() == lora.read_bytes()


def test_changed_data_is_a_new_run(job_file, place, capsys):
    from trainers.job import read_job
    from trainers.plan import hand_over

    first = hand_over(read_job(job_file))
    changed = json.loads((place / "encoded" / "encoded.json").read_text())
    changed["items"] = changed["items"][:2]
    (place / "encoded" / "encoded.json").write_text(json.dumps(changed))
    assert hand_over(read_job(job_file)).encoded_identity != first.encoded_identity


def _parameters(lora: Path) -> int:
    from safetensors import safe_open

    with safe_open(lora, "pt") as file:
        return sum(file.get_tensor(key).numel() for key in file.keys())  # noqa: SIM118  it is no dict
