"""A file of weights that is mapped and read: by both ways the same bytes, whatever becomes of its name."""

from __future__ import annotations

import gc
import os
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainers.tiny import TinyShape, as_fp8_scaled, write_transformer
from trainers.checkpoint import Checkpoint
from trainers.family import detect, families
from trainers.load import load_transformer
from trainers.offload.host import Filling
from trainers.offload.layout import BlockLayout
from trainers.offload.mapped_file import MappedFile, range_of
from trainers.offload.pinned import Buffer
from trainers.residency import blocks_of
from trainers.stable_file import save_file
from trainers.tensor_files import open_tensor_file

CPU = torch.device("cpu")


@pytest.fixture(params=["preadv", "seek and read"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Windows has no reading at a position."""
    if request.param == "seek and read":
        monkeypatch.delattr(os, "preadv")
    return str(request.param)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    chance = torch.Generator().manual_seed(1)
    tensors = {"wide": torch.randn(60, 40, generator=chance), "half": torch.randn(8, 6, generator=chance).half()}
    save_file(tensors, tmp_path / "weights.safetensors")
    return tmp_path / "weights.safetensors"


def read(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's bytes, from its file."""
    found = range_of(tensor)
    assert found is not None
    target = torch.zeros(tensor.nbytes, dtype=torch.uint8)
    found.read_into(target)
    return target.view(tensor.dtype).view(tensor.shape)


@pytest.mark.usefixtures("way")
def test_what_is_read_is_what_is_mapped(weights: Path) -> None:
    file = open_tensor_file(weights)
    wide = file.load("wide")
    for tensor in (wide, file.load("half"), wide[15:30], wide.view(120, 20), wide[0]):
        assert torch.equal(read(tensor), tensor)


def test_what_is_no_run_of_bytes_in_the_file_is_not_read(weights: Path) -> None:
    wide = open_tensor_file(weights).load("wide")
    swapped = torch.cat(wide.chunk(2)[::-1])
    for tensor in (wide.clone(), wide.half(), wide.T, wide[:, :3], swapped, torch.empty(0), torch.empty(3, device="meta")):
        assert range_of(tensor) is None


@pytest.mark.usefixtures("way")
def test_a_file_that_takes_the_name_changes_no_weight(weights: Path) -> None:
    """A download over the model in the middle of a run: half of the weights would be another model's."""
    wide = open_tensor_file(weights).load("wide")
    before = wide.clone()
    other = weights.with_name("other.safetensors")
    save_file({"wide": torch.zeros(60, 40), "half": torch.zeros(8, 6).half()}, other)
    os.replace(other, weights)
    assert torch.equal(read(wide), before)


@pytest.mark.usefixtures("way")
def test_a_file_that_was_cut_short_is_an_error(tmp_path: Path) -> None:
    """Of a mapped one the process dies at once (SIGBUS)."""
    path = tmp_path / "weights.bin"
    path.write_bytes(bytes(100_000))
    file = MappedFile(path)
    os.truncate(path, 50_000)
    with pytest.raises(OSError, match=r"weights\.bin ends at byte 50000: it was cut short"):
        file.read_into(40_000, torch.zeros(20_000, dtype=torch.uint8))


@pytest.mark.usefixtures("way")
def test_threads_do_not_move_each_other_s_position(tmp_path: Path) -> None:
    content = torch.randint(256, (200_000,), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    (tmp_path / "weights.bin").write_bytes(content.numpy().tobytes())
    file, together = MappedFile(tmp_path / "weights.bin"), threading.Barrier(4)

    def reads(seed: int) -> bool:
        together.wait()
        chance = random.Random(seed)
        for _ in range(200):
            start, target = chance.randrange(100_000), torch.zeros(chance.randrange(1, 100_000), dtype=torch.uint8)
            file.read_into(start, target)
            if not torch.equal(target, content[start : start + len(target)]):
                return False
        return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(reads, range(4)))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts what is open")
def test_a_model_that_nobody_uses_is_closed(weights: Path) -> None:
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    tensor = open_tensor_file(weights).load("wide")
    found = range_of(tensor)
    assert len(os.listdir("/proc/self/fd")) > before
    del tensor, found
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


def layouts_of(
    path: Path, dtype: torch.dtype = torch.float32, keep_stored: bool | None = None, quantise: str = "none"
) -> list[BlockLayout]:
    checkpoint = Checkpoint.open(path)
    detection = detect(checkpoint, None)
    how: dict[str, Any] = {"resident": False, "all_frozen": True, "quantise": quantise}
    transformer = load_transformer(checkpoint, detection, CPU, dtype, keep_stored, **how)
    return [BlockLayout.of(block) for block in blocks_of(transformer, families()["wan"])]


@pytest.mark.parametrize(
    ("stored", "options", "in_file"),
    [
        ("fp32", {}, True),
        ("fp8 scaled", {}, True),
        ("fp32", {"quantise": "fp8"}, False),
        ("fp32", {"dtype": torch.bfloat16, "keep_stored": False}, False),
    ],
    ids=["as stored", "fp8 with scales", "quantised while loading", "converted while loading"],
)
def test_blocks_are_the_same_bytes_by_both_ways(tmp_path: Path, stored: str, options: dict[str, object], in_file: bool) -> None:
    path = write_transformer(tmp_path / "wan.safetensors", TinyShape())
    if stored == "fp8 scaled":
        as_fp8_scaled(path)
    for layout in layouts_of(path, **options):  # type: ignore[arg-type]
        copied, from_file = (torch.zeros(layout.nbytes, dtype=torch.uint8) for _ in range(2))
        layout.write(copied)
        layout.write(from_file, True)
        assert layout.in_file is in_file
        assert torch.equal(copied, from_file)


@pytest.mark.parametrize("slow", [True, False], ids=["reading is slower", "copying is slower"])
def test_both_ways_are_tried_and_the_quicker_one_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slow: bool) -> None:
    layout = layouts_of(write_transformer(tmp_path / "wan.safetensors", TinyShape()))[0]
    clock, seen, write = [0.0], [], BlockLayout.write

    def timed(block: BlockLayout, run: torch.Tensor, from_file: bool = False) -> None:
        write(block, run, from_file)
        clock[0] += 2.0 if from_file is slow else 1.0
        seen.append(from_file)

    monkeypatch.setattr(BlockLayout, "write", timed)
    monkeypatch.setattr("trainers.offload.host.time.perf_counter", lambda: clock[0])
    filling, buffer = Filling(), Buffer(layout.nbytes, CPU)
    for _ in range(12):
        filling.fill(buffer, layout)
    assert sorted(seen[:8]) == [False] * 4 + [True] * 4
    assert seen[8:] == [not slow] * 4
