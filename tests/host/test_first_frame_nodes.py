"""First frames in ComfyUI: its own small objects through the graph's encoder, and what the nodes ask for, make and refuse."""

from __future__ import annotations

import json
from typing import Any

import pytest
from installation import PACK, ComfyUI

from trainers.demo import demo, world

CLIPS = 2
VISION = {
    **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2, "hidden_act": "gelu"},
    **{"image_size": 56, "patch_size": 14, "num_channels": 3, "projection_dim": 16, "model_type": "clip_vision_model"},
}
EVERYTHING = ["vae", "clip", "clip_vision"]


@pytest.fixture(scope="module")
def answers(comfyui: ComfyUI, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("first_frames")
    (folder / "vision.json").write_text(json.dumps(VISION))
    world.write_clips(folder / "clips", world.random_scenes(CLIPS, 1, ("left", "right")))
    (folder / "home").mkdir()
    files = {"vision": str(folder / "vision.json"), "clips": str(folder / "clips")}
    files |= {"text_encoder": str(demo.BASE), "vae": str(demo.VAE)}
    answer: dict[str, Any] = comfyui.call("first_frame_answers.py", pack=str(PACK), folder=str(folder / "home"), **files)
    assert {path.name for path in (folder / "home" / "user").iterdir()} == {"__video_trainer"}
    return answer


def test_rows_and_latents_are_those_of_core_s_nodes(answers: dict[str, Any]):
    """CLIP Vision Encode with crop "none", and what WanImageToVideo hands to the model."""
    found = answers["objects"]
    print(json.dumps(found))
    assert (found["rows"], found["clip"]) == ([17, 32], [1, 16, 3, 6, 8])
    assert found["rows_apart"] == 0.0
    assert found["clip_apart"] < 1e-6


def test_an_image_encoder_is_known_by_its_content(answers: dict[str, Any]):
    found = answers["identities"]
    assert found["used"] == found["again"]
    assert len({found[name] for name in ("used", "other weights", "another mean")}) == 3


def test_only_what_something_lacks_is_asked_for(answers: dict[str, Any]):
    found = answers["lazy"]
    assert found["before"] == EVERYTHING
    assert found["not wired"] == (
        "no clip_vision is wired; for Wan 2.1 I2V (other size) it looks at first frames. Wire Load CLIP Vision, or Load Encoders."
    )
    assert found["text to video"] == ["vae", "clip"]
    assert found["after"] == []
    assert found["text to video after"] == [], "the same latents and texts"
    assert found["another image encoder"] == ["clip_vision"]


def test_what_the_variant_requires_is_encoded(answers: dict[str, Any]):
    found = answers["encoded"]
    assert found["shapes"] == {"first_frame_clip": [16, 3, 8, 8], "image_embeds": [17, 32]}
    assert found["latents"] == [16, 3, 8, 8]
    assert found["problems"] == 0
    assert f"clips: 0 encoded, {CLIPS} already there" in found["told"]
    assert f"first frames: 0 encoded, {2 * CLIPS} already there" in found["told"]


def test_previews_hand_their_images_over(answers: dict[str, Any]):
    found = answers["previews"]
    assert "vae" in found["before"], "the image was never encoded"
    assert found["after"] == []
    assert found["files"] == [".png"]
    assert found["stays in the user's folder"]
    assert found["kinds"] == ["first_frame", "first_frame_clip", "image_embeds"]
    assert found["both"]
    assert found["problems"] == 0


def test_images_that_do_not_fit_are_told_before_anything_is_loaded(answers: dict[str, Any]):
    found = answers["refused"]
    assert "images has 1; Wan 2.1 T2V (other size) starts from text alone. Leave the images out." in found["images for text to video"]
    assert "images has 0 for 2 prompts; Wan 2.1 I2V (other size) always starts from one." in found["none for image to video"]
    assert "images has 3 for 2 prompts; each prompt has one." in found["three for two prompts"]
    assert "no vae is wired; for Wan 2.2 TI2V (other size) it encodes first frames." in found["nothing wired"]
