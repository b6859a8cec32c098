"""Graphs that were saved by earlier versions of the pack: a page opens them with every value in its place, what is new at its default."""

from __future__ import annotations

from typing import Any

import pytest

SAVED: dict[str, Any] = {
    "name": "old",
    "trigger_words": "one, two",
    "steps": 1234,
    "rank": 8,
    "learning_rate": 3e-4,
    "batch_size": 2,
    "save_every": 77,
    "seed": 5,
    "comfyui_memory": "keep its models loaded",
    "epochs": 3,
    "accumulation": 4,
    "alpha": 6.0,
    "targets": "attention",
    "lora_dropout": 0.1,
    "optimizer": "prodigy",
    "schedule": "cosine",
    "warmup_steps": 11,
    "weight_decay": 0.2,
    "noise": "shift",
    "noise_shift": 2.5,
    "caption_dropout": 0.3,
    "held_out_every": 12,
    "keep_last": 9,
    "gradient_checkpointing": False,
    "precision": "fp32",
    "device": "cpu",
    "deterministic": True,
    "initial_lora": "a.safetensors",
    "extends": "kitten@7",
    "experts": "low",
    "expert_turn_steps": 13,
    "expert_overlap": 0.1,
    "learning_rate_low_noise": 2e-4,
    "dora": True,
    "first_frame_probability": 0.5,
    "guidance": 2.0,
}
"""Widgets of Train LoRA in the order that saved graphs rely on, for ever; none has its default."""

NEW = {"vram_gib": 0, "ram_gib": 0, "quantise": "none", "stream": "auto", "attention": "auto", "compile": False}

OPENED = """async (graph) => {
  await app.loadGraphData(graph);
  return [(await app.graphToPrompt()).output[1].inputs, app.graph.serialize()];
}"""

BEFORE_DORA = 33
"""So many values of them the first version saved."""


def _saved(values: list[Any]) -> dict[str, Any]:
    node = {"id": 1, "type": "VideoTrainer_TrainLoRA", "pos": [100, 100], "size": [360, 400], "widgets_values": values}
    return {"last_node_id": 1, "last_link_id": 0, "nodes": [node], "links": [], "version": 0.4}


@pytest.mark.parametrize("front_end", [pytest.param("server", marks=pytest.mark.slow), "newest_server"])
def test_every_value_is_where_it_was_and_what_is_new_has_its_default(front_end: str, request: pytest.FixtureRequest, pages):
    server = request.getfixturevalue(front_end)
    with pages.open(server) as page:
        values, kept = page.evaluate(OPENED, _saved(list(SAVED.values())))
        assert values == SAVED | NEW
        assert kept["nodes"][0]["widgets_values"] == [*(SAVED | NEW).values()], "and saved anew, what is new stands last"
        older, _ = page.evaluate(OPENED, _saved(list(SAVED.values())[:BEFORE_DORA]))
        assert older == SAVED | {"dora": False, "first_frame_probability": -1, "guidance": 0} | NEW
        assert page.errors == []
