"""Base Model, with the files of the training workflows: each is read as the model that the workflow is for.

The files have the names of the published ones, real headers and no weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from comfy_server import Server
from downloads import Models
from graphs import node
from make_workflows import ROOT
from model_files import entries, shapes_of, write_header_only
from tiny_families import TINY
from training_graphs import TRAINING

VARIANTS = {
    "wan21_train": "wan2.1-t2v-1.3b",
    "wan21_train_i2v": "wan2.1-i2v-14b",
    "wan22_5b_train": "wan2.2-ti2v-5b",
    "wan22_a14b_train": "wan2.2-t2v-a14b",
    "wan22_a14b_train_i2v": "wan2.2-i2v-a14b",
    "ltx_train": "ltxv-2b-0.9.5",
    "hunyuan_train": "hunyuan-t2v",
    "hunyuan_train_i2v": "hunyuan-i2v-v2",
    "mochi_train": "mochi-1-preview",
}
VAES = {
    "wan_2.1_vae.safetensors": "vae_wan2.1",
    "wan2.2_vae.safetensors": "vae_wan2.2",
    "ltx-video-2b-v0.9.5.safetensors": "vae_ltx_0.9.5",
    "hunyuan_video_vae_bf16.safetensors": "vae_hunyuan_video",
    "mochi_vae.safetensors": "vae_mochi",
}
PUBLISHED = {model.variant: model for family in TINY.values() for model in family.published}


@pytest.fixture(scope="module")
def reports(server: Server) -> Mapping[str, str]:
    """What Base Model says, by the workflow."""
    graph = {}
    for name, variant in VARIANTS.items():
        write_files(server.base_directory / "models", TRAINING[name].models, variant)
        graph[name] = node("VideoTrainer_BaseModel", **chosen(name))
        graph[f"{name} report"] = node("PreviewAny", source=[name, 1])
    outputs = server.prompt(graph)["outputs"]
    return {name: outputs[f"{name} report"]["text"][0] for name in VARIANTS}


def chosen(name: str) -> dict[str, str]:
    """The values of a workflow's Base Model, by the names of its inputs."""
    nodes = json.loads((ROOT / "workflows" / f"{name}.json").read_text("utf-8"))["nodes"]
    (base,) = (node for node in nodes if node["type"] == "VideoTrainer_BaseModel")
    inputs = ("transformer", "variant", "vae", "text_encoder", "text_encoder_2", "transformer_low_noise", "clip_vision")
    return dict(zip(inputs, base["widgets_values"], strict=True))


def write_files(models_folder: Path, models: Models, variant: str) -> None:
    """The model's files where a user would put them; encoders, which Base Model does not open, are empty."""
    for file in models.files:
        path = models_folder / file["directory"] / file["name"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        parts = {}
        if file in models.transformers:
            parts |= entries(shapes_of(PUBLISHED[variant].keys), torch.bfloat16, "" if models.vae else "model.diffusion_model.")
        if file["name"] in VAES:
            parts |= entries(shapes_of(VAES[file["name"]]), torch.bfloat16, "" if models.vae else "vae.")
        if parts:
            write_header_only(path, parts, PUBLISHED[variant].metadata)


@pytest.mark.parametrize("name", TRAINING)
def test_the_file_is_the_model_that_the_workflow_is_for(reports: Mapping[str, str], name: str):
    assert f"({VARIANTS[name]})" in reports[name].splitlines()[0]
    assert "no VAE" not in reports[name]
    assert "one of two experts" not in reports[name]
