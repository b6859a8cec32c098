"""The published archive, as a user gets it, does the whole training in ComfyUI and is afterwards as it was."""

from __future__ import annotations

import pytest
from comfy_server import PACK_FOLDER
from graphs import node, training_graph
from packed import pack

from trainers.demo import world


def _files(folder):
    return {path.relative_to(folder): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc"}


@pytest.mark.slow
def test_the_published_pack_trains_and_nothing_is_written_into_it(make_server, tmp_path):
    pytest.importorskip("comfy_cli", reason="packing needs comfy-cli (requirements-test.txt)")
    packed = pack(tmp_path / "packed")
    before = _files(packed)
    server = make_server(packs={PACK_FOLDER: packed})
    world.write_clips(tmp_path / "clips", world.random_scenes(2, seed=3))
    graph = training_graph(str(tmp_path / "clips"), name="packed", steps=2, batch_size=1, rank=2, held_out_every=0, save_every=2)
    server.prompt(graph | {"wait": node("VideoTrainer_WaitForRun", run=["train", 0])})
    assert "packed/packed-000002.safetensors" in [name.replace("\\", "/") for name in server.choices("LoraLoader", "lora_name")]
    server.kill()
    assert _files(packed) == before
