"""How videos fit their prompts, by real (tiny) models of transformers; and folders that are none."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_clip import write_clip

from trainers.adherence import MOST_FRAMES, adherence, find_clip_problems, pick_frames

FRAMES = np.random.default_rng(0).integers(0, 255, (5, 40, 60, 3), np.uint8)
VIDEOS = [("a cat", FRAMES), ("a dog that runs and runs " * 20, FRAMES[:2, :, ::-1])]


@pytest.fixture(params=["clip", "siglip"], scope="module")
def folder(request, tmp_path_factory) -> Path:
    return write_clip(tmp_path_factory.mktemp(request.param), request.param)


def test_it_is_the_cosine_that_the_models_logits_are_made_of(folder):
    from transformers import AutoModel, AutoProcessor

    model, processor = AutoModel.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    expected = []
    for prompt, frames in VIDEOS:
        inputs = processor(text=prompt, images=[*frames], truncation=True, padding="max_length", max_length=16, return_tensors="pt")
        with torch.no_grad():
            logits = model(**inputs).logits_per_image
            bias = getattr(model, "logit_bias", 0.0)
            expected.append(((logits - bias) / model.logit_scale.exp()).mean().item())
    values = adherence(folder, VIDEOS)
    assert values == pytest.approx(expected, abs=1e-5)
    assert len({round(value, 4) for value in values}) == 2, "prompts and frames must count"
    assert all(-1 <= value <= 1 for value in values)


def test_a_good_folder_has_no_problems(folder):
    assert list(find_clip_problems("previews.clip_folder", folder)) == []


def test_a_few_frames_from_the_first_to_the_last_are_looked_at():
    picked = pick_frames(np.arange(81, dtype=np.uint8)[:, None, None, None])[:, 0, 0, 0]
    assert [int(picked[0]), int(picked[-1]), len(picked)] == [0, 80, MOST_FRAMES]
    assert len(pick_frames(FRAMES)) == 5


def test_a_wrong_folder_is_told_with_what_is_wrong(tmp_path):
    def told(folder: Path) -> str:
        (problem,) = find_clip_problems("previews.clip_folder", folder)
        assert "CLIP or SigLIP" in problem.rule
        return problem.value

    assert told(tmp_path / "nowhere").endswith("there is no such folder")
    assert told(tmp_path).endswith("it has no config.json that can be read")
    (tmp_path / "config.json").write_text("{")
    assert told(tmp_path).endswith("it has no config.json that can be read")
    for config, found in (
        ([], "a model of type None"),
        ({"model_type": "t5"}, "a model of type 't5'"),
        ({"model_type": "clip_text_model"}, "a model of type 'clip_text_model'"),
        ({"model_type": "clip", "text_config": {}}, "one half of a clip model"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert told(tmp_path).endswith(found)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip", "text_config": {}, "vision_config": {}}))
    (tmp_path / "model-00001-of-00002.safetensors").touch()
    assert told(tmp_path).endswith("it lacks tokenizer, preprocessor_config.json")
