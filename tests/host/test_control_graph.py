"""Apply Control LoRA in a running ComfyUI: a whole graph with the built-in model, and what its node says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from comfy_server import GraphError, Server
from control_files import EMBEDDING, pair, write_lora
from graphs import base_graph, node

WIDTH = 256
"""Of the built-in model."""


@pytest.fixture(scope="module")
def loras(server: Server) -> Path:
    folder = server.base_directory / "models" / "loras"
    folder.mkdir(parents=True, exist_ok=True)
    pairs = {EMBEDDING: pair(WIDTH, [32, 1, 2, 2], 0), "blocks.0.self_attn.q": pair(WIDTH, [WIDTH], 1)}
    write_lora(folder / "control.safetensors", pairs, {f"{EMBEDDING}.reshape_weight": torch.tensor([WIDTH, 32, 1, 2, 2])})
    write_lora(folder / "ordinary.safetensors", {"blocks.0.self_attn.q": pair(WIDTH, [WIDTH], 1)})
    return folder


def graph(lora: str, kind: str = "from the file") -> dict[str, Any]:
    """From a control of 70 x 70 pixels and 11 frames to frames that are looked at."""
    wires = {"model": ["model", 0], "positive": ["words", 0], "negative": ["words", 0], "vae": ["encoders", 1], "control": ["control", 0]}
    numbers = {"seed": 1, "steps": 1, "cfg": 2.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
    sampled = {"model": ["controlled", 0], "positive": ["controlled", 1], "negative": ["controlled", 2], "latent_image": ["controlled", 3]}
    return base_graph() | {
        "model": node("VideoTrainer_LoadTransformer", base=["base", 0], weight_dtype="default"),
        "words": node("CLIPTextEncode", clip=["encoders", 0], text="a red circle moving left"),
        "control": node("EmptyImage", width=70, height=70, batch_size=11, color=0xFF0000),
        "controlled": {"class_type": "VideoTrainer_ApplyControlLoRA", "inputs": {**wires, "lora": lora, "strength": 1.0, "kind": kind}},
        "sampled": node("KSampler", **numbers, **sampled),
        "decoded": node("VAEDecode", samples=["sampled", 0], vae=["encoders", 1]),
        "shown": node("PreviewImage", images=["decoded", 0]),
    }


def test_a_graph_with_a_control_runs_and_its_node_says_what_was_done(server: Server, loras: Path):
    assert {"none", "control.safetensors"} <= set(server.choices("VideoTrainer_ApplyControlLoRA", "lora"))
    outputs = server.prompt(graph("control.safetensors"))["outputs"]
    assert outputs["controlled"]["text"][0].splitlines() == [
        "control.safetensors: control by input channels for Wan (patch_embedding has 32 input channels)",
        "2 of 2 layers matched, strength 1",
        "control: 70 x 70, 11 frames -> 64 x 64, 9 frames (multiples of 16 pixels, 4n+1 frames)",
        "video: 64 x 64, 9 frames",
    ]
    assert len(outputs["shown"]["images"]) == 9


def test_without_a_lora_the_graph_runs_too(server: Server):
    outputs = server.prompt(graph("none"))["outputs"]
    assert outputs["controlled"]["text"] == ["no control LoRA chosen: nothing is controlled"]
    assert len(outputs["shown"]["images"]) == 9


def test_an_ordinary_lora_is_refused(server: Server, loras: Path):
    with pytest.raises(GraphError, match=r"ordinary\.safetensors is a LoRA for Wan without a control.*Use Apply LoRA"):
        server.prompt(graph("ordinary.safetensors"))
