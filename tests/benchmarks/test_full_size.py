"""The benchmark for a card runs from end to end on a CPU, with tiny models: so it will run when there is a card."""

from __future__ import annotations

import json
from pathlib import Path

import full_size  # first: it says where the others are
import pytest
import torch
from cases import CASES, case_of
from full_size_files import full_size as model_of
from full_size_files import model_names
from gauges import profile_of
from peers import musubi_command, write_musubi_clips

from trainers.checkpoint import Checkpoint
from trainers.load import load_transformer


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def results(tmp_path, monkeypatch):
    """What the script finds of some cases."""
    for name in ("go_offline", "use_memory_without_gaps"):  # they change the whole process
        monkeypatch.setattr(f"trainers.environment.{name}", lambda: None)

    def run(names: str) -> list[dict]:
        out = tmp_path / "result.json"
        arguments = ["--device", "cpu", "--tiny", "--in-process", "--folder", str(tmp_path / "made"), "--cases", names, "--out", str(out)]
        full_size.main(arguments)
        return json.loads(out.read_text())["cases"]

    return run


def test_cases_on_the_cpu(results):
    alone, compared, mixed = results("512x512x33 streamed,wan-14b mapped beside,eight sizes")
    assert "error" not in alone, alone
    assert "error" not in compared, compared
    assert alone["streamed_share"] >= 0.8
    assert alone["slots"] == 2
    streamed, slots = 4, 2
    assert alone["bytes_of_a_step"]["weights_to_device"] == 2 * (streamed - slots) / streamed * alone["streamed_bytes"]
    assert alone["step_seconds"] > 0
    assert "FOLDER" not in json.dumps(alone)
    assert "error" not in mixed, mixed
    assert len({tuple(size) for size in mixed["sizes"]}) == 8, "nine sizes, without the one of the very first step"
    assert len(mixed["first_step_seconds_each"]) == len(mixed["second_step_seconds_each"]) == 8
    assert compared["ratio_median"] == pytest.approx(compared["step_seconds"] / compared["plain_step_seconds"])


def test_a_case_that_fails_is_told_and_the_next_one_runs(results, monkeypatch):
    import measure

    def failing(case, *rest):
        raise RuntimeError("out of memory in /somewhere")

    monkeypatch.setattr(measure, "measure", failing)
    found = results("256x256x33,streamed beside")
    assert [case["error"] for case in found] == ["RuntimeError: out of memory in /somewhere"] * 2


@pytest.mark.parametrize("name", model_names())
def test_random_files_are_models_that_answer(name, tmp_path):
    """Each dtype of each model loads strictly, and holds finite numbers that are not all the same."""
    model = model_of(name, tiny=True)
    for dtype in ("bfloat16", "fp8_scaled"):
        path = model.write(tmp_path, dtype)
        checkpoint = Checkpoint.open(path)
        assert checkpoint.quantisation == ("fp8_scaled" if dtype == "fp8_scaled" else None)
        transformer = load_transformer(checkpoint, model.detection(path), "cpu", torch.float32, keep_stored=False)
        for tensor in transformer.state_dict().values():
            assert torch.isfinite(tensor).all()
            assert tensor.numel() < 2 or tensor.std() > 0
        assert len({round(float(tensor.float().sum()), 6) for tensor in transformer.state_dict().values() if tensor.numel() > 64}) > 10


def test_sizes_of_cases_fit_their_models():
    for case in CASES:
        model = model_of(case.model)
        for size in (case.size, *case.sizes):
            assert not model.family.latent(model.variant).problems(*size), case.name
        stored = sum(torch.Size(shape).numel() * dtype.itemsize for dtype, shape in model.entries(case.dtype).values())
        assert stored < 30e9
    assert len({case.name for case in CASES}) == len(CASES)


def test_what_a_profile_says():
    """Kernels at 0-10 and 5-20 and 30-40 of 50 microseconds: idle for 20; a copy beside them, one back."""
    events = [{"ph": "X", "cat": "kernel", "name": "k", "ts": start, "dur": stop - start} for start, stop in ((0, 10), (5, 20), (30, 40))]
    events += [
        {"ph": "X", "cat": "gpu_memcpy", "name": "Memcpy HtoD (Pinned -> Device)", "ts": 12, "dur": 20, "args": {"bytes": 100}},
        {"ph": "X", "cat": "gpu_memcpy", "name": "Memcpy DtoH (Device -> Pinned)", "ts": 45, "dur": 5, "args": {"bytes": 8}},
        {"ph": "X", "cat": "cpu_op", "name": "aten::mm", "ts": 0, "dur": 900},
    ]
    found = profile_of(events)
    assert found["seconds"] == pytest.approx(50e-6)
    assert found["idle_share"] == pytest.approx(0.4)
    assert found["copy_seconds"] == pytest.approx(25e-6)
    assert found["copied_bytes"] == {"HtoD": 100, "DtoH": 8, "DtoD": 0}


def test_a_peers_files_and_arguments(tmp_path):
    case = case_of("musubi 512x512x81 in 12 GiB")
    config = write_musubi_clips(tmp_path, (9, 64, 96), clips=1)
    assert sorted(path.name for path in (tmp_path / "musubi_cache").iterdir()) == [
        "clip0_00000-009_0096x0064_wan.safetensors",
        "clip0_wan_te.safetensors",
    ]
    command = musubi_command(Path("musubi"), tmp_path / "wan.safetensors", config, tmp_path, case.settings[0], 5)
    assert {"--block_swap_h2d_only", "--fp8_scaled", "--use_pinned_memory_for_block_swap"} <= set(command)
