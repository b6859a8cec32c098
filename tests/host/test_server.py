"""The tests' own way to a running ComfyUI: what others rest on."""

from __future__ import annotations

import pytest
from comfy_server import GraphError
from installation import NoComfyUI, find_comfyui


def _graph(transformer="tiny Wan (built in)"):
    choices = {"transformer": transformer, "variant": "read from the file", "vae": "none", "text_encoder": "none"}
    return {
        "1": {"class_type": "VideoTrainer_BaseModel", "inputs": choices},
        "2": {"class_type": "PreviewAny", "inputs": {"source": ["1", 1]}},
    }


def test_a_graph_runs(server):
    entry = server.prompt(_graph())
    assert entry["outputs"]["2"]["text"][0].startswith("Wan 2.1")


def test_a_refused_graph_tells_the_input(server):
    with pytest.raises(GraphError, match="transformer"):
        server.queue(_graph("nothing.safetensors"))


def test_a_failing_graph_tells_the_sentence(server):
    (server.base_directory / "models" / "diffusion_models").mkdir(exist_ok=True)
    (server.base_directory / "models" / "diffusion_models" / "broken.safetensors").write_bytes(b"no model")
    server.object_info("VideoTrainer_BaseModel")
    with pytest.raises(GraphError, match=r"broken\.safetensors"):
        server.prompt(_graph("broken.safetensors"))


@pytest.mark.slow
def test_it_comes_back_with_what_it_had(newest_server):
    loras = newest_server.base_directory / "output" / "loras"
    loras.mkdir(exist_ok=True)
    (loras / "kept.safetensors").write_bytes(b"")
    newest_server.restart()
    assert "kept.safetensors" in newest_server.choices("LoraLoaderModelOnly", "lora_name")


@pytest.mark.parametrize(("variable", "sentence"), [("COMFYUI_PATH", "which has no main.py"), ("COMFYUI_PYTHON", "which is not there")])
def test_a_wrong_variable_is_told(monkeypatch, tmp_path, variable, sentence):
    monkeypatch.setenv(variable, str(tmp_path))
    with pytest.raises(NoComfyUI, match=sentence):
        find_comfyui()
