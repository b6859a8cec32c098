"""A control LoRA by our node in ComfyUI's models answers as diffusers' models do with the same control."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import control_files as files
import pytest
import torch
from control_answers import SIGMA
from installation import PACK, ComfyUI
from questions import relative
from safetensors.torch import load_file

from trainers.demo import demo

TOLERANCE = 1e-4

DEPTH = {"path": "depth"}
STYLE = {"path": "style", "by": "core", "strength": 0.5, "control": ""}
TILE = {"path": "tile", "control": "other"}
NONE = {"path": "depth", "strength": 0.0}
IC_LORA = {"path": "comfyui"}
STYLED = {"style": 0.5, "depth": 1.0}

BETWEEN = [STYLE, DEPTH, TILE, {"path": "style", "by": "apply", "strength": 0.25}]

EXPECTED: dict[str, tuple[list[dict[str, Any]], dict[str, float], tuple[str, ...]]] = {
    "depth": ([DEPTH], {"depth": 1.0}, ("control",)),
    "half": ([{**DEPTH, "strength": 0.5}], {"depth": 0.5}, ("control",)),
    "none": ([NONE], {}, ()),
    "bare": ([{"path": "bare"}], {"depth": 1.0}, ("control",)),
    "an ordinary one before": ([STYLE, DEPTH], STYLED, ("control",)),
    "an ordinary one after": ([DEPTH, STYLE], STYLED, ("control",)),
    "two controls": ([STYLE, DEPTH, TILE], {**STYLED, "tile": 1.0}, ("control", "other")),
}
"""{what: (steps in ComfyUI, what is merged into diffusers' model, its controls)} for Wan."""


@dataclass(frozen=True)
class Answers:
    """What ComfyUI said to each task, and the tensors it wrote."""

    folder: Path
    told: dict[str, Any]
    wan: dict[str, torch.Tensor]
    ltx: dict[str, torch.Tensor]

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        return load_file(self.folder / name)

    def velocity(self, name: str, of: str = "x0") -> torch.Tensor:
        """Of the video alone, from where one step to a clean video has led."""
        noise = (self.ltx if name.startswith("ltx") else self.wan)["noise"]
        return (SIGMA * noise - self.tensors(name)[of][:, :, : noise.shape[2]]) / SIGMA


def tasks() -> dict[str, dict[str, Any]]:
    asked = {name: {"steps": steps} for name, (steps, _, _) in EXPECTED.items()}
    asked |= {f"{name}, tight": {**task, "tight": True} for name, task in asked.items()}
    asked |= {
        "sampled between": {"steps": BETWEEN, "between": True},
        "sampled between, tight": {"steps": BETWEEN, "between": True, "tight": True},
        "another branch": {"steps": [STYLE, DEPTH, {**TILE, "back": 1}], "between": True},
        "core": {"steps": [{**DEPTH, "by": "core"}]},
        "core, tight": {"steps": [{**DEPTH, "by": "core"}], "tight": True, "refused": True},
        "fp8": {"steps": [{"path": "tile"}], "dtype": "float8_e4m3fn"},
        "fp8, tight": {"steps": [{"path": "tile"}], "dtype": "float8_e4m3fn", "tight": True},
        "fp8, none": {"steps": [{"path": "tile", "strength": 0.0}], "dtype": "float8_e4m3fn"},
        "resized": {"steps": [{**DEPTH, "control": "large"}]},
        "to a latent": {"steps": [{**DEPTH, "control": "large"}], "latent": [1, 16, 3, 8, 6]},
        "too short": {"steps": [DEPTH], "latent": [1, 16, 5, 8, 6], "refused": True},
        "no control": {"steps": [{"path": "style"}], "refused": True},
        "of LTX": {"steps": [{"path": "comfyui"}], "refused": True},
        "ltx": {"steps": [IC_LORA]},
        "ltx, tight": {"steps": [IC_LORA], "tight": True},
        "ltx, half": {"steps": [{**IC_LORA, "strength": 0.5}]},
        "ltx, diffusers": {"steps": [{"path": "diffusers"}]},
        "ltx, renamed": {"steps": [{"path": "renamed", "kind": "IC-LoRA"}]},
        "ltx, short": {"steps": [{**IC_LORA, "control": "short"}], "latent": list(files.LTX_NOISE)},
        "ltx, batch": {"steps": [IC_LORA], "latent": [2, *files.LTX_NOISE[1:]], "refused": True},
        "ltx, unnamed": {"steps": [{"path": "renamed"}], "refused": True},
        "ltx, twice": {"steps": [IC_LORA, IC_LORA], "refused": True},
        "ltx, of Wan": {"steps": [{"path": "depth"}], "refused": True},
    }
    return asked


@pytest.fixture(scope="module")
def answers(comfyui: ComfyUI, tmp_path_factory: pytest.TempPathFactory) -> Answers:
    """All tasks in one process."""
    folder = tmp_path_factory.mktemp("control")
    wan, ltx = files.write_wan(folder), files.write_ltx(folder)
    loras = {**wan, **ltx}
    asked = []
    for name, task in tasks().items():
        family = "ltx" if name.startswith("ltx") else "wan"
        own = (
            {"transformer": str(loras["transformer"])}
            if family == "ltx"
            else {"transformer": str(wan["transformer"]), "vae": str(demo.VAE)}
        )
        steps = [{**step, "path": str(loras[step["path"]])} for step in task["steps"]]
        inputs = str((ltx if family == "ltx" else wan)["inputs"])
        asked.append({**task, **own, "family": family, "inputs": inputs, "steps": steps, "output": str(folder / name)})
    told = comfyui.call("control_answers.py", pack=str(PACK), tasks=asked)
    return Answers(folder, dict(zip(tasks(), told, strict=True)), load_file(wan["inputs"]), load_file(ltx["inputs"]))


@pytest.mark.parametrize("name", EXPECTED)
def test_wan_answers_as_diffusers_does_also_when_nothing_fits_into_memory(answers: Answers, name: str):
    _, loras, controls = EXPECTED[name]
    expected = files.wan_velocity(answers.wan, loras, *controls)
    figures = {where: relative(answers.velocity(where), expected) for where in (name, f"{name}, tight")}
    print(json.dumps(figures))
    assert max(figures.values()) < TOLERANCE
    loaded, tight = (answers.told[where] for where in figures)
    assert (loaded["partial"], tight["partial"]) == (False, True)
    assert loaded["log"] == tight["log"] == []
    assert all("21 of 21 layers matched" in report or "1 of 1" in report for report in loaded["reports"])


def test_the_control_is_what_diffusers_vae_makes_of_it_and_matters(answers: Answers):
    found, expected = answers.tensors("depth")["control"], files.control_latents(answers.wan["control"])
    assert relative(found, expected) < TOLERANCE
    assert relative(answers.velocity("depth"), files.wan_velocity(answers.wan, {"depth": 1.0})) > 1000 * TOLERANCE


def test_core_alone_agrees_but_cannot_when_nothing_fits_into_memory(answers: Answers):
    """What the node is for: once the second half fails, ComfyUI has learnt it."""
    assert relative(answers.velocity("core"), files.wan_velocity(answers.wan, {"depth": 1.0}, "control")) < TOLERANCE
    assert "channels" in answers.told["core, tight"]["error"]


@pytest.mark.parametrize("name", ["sampled between", "sampled between, tight"])
def test_models_that_share_their_weights_do_not_disturb_each_other(answers: Answers, name: str):
    """Each LoRA is applied to a model whose weights are patched at that moment; the bare model is the bare model again."""
    _, loras, controls = EXPECTED["two controls"]
    loras = {**loras, "style": 0.75}
    assert relative(answers.velocity(name), files.wan_velocity(answers.wan, loras, *controls)) < TOLERANCE
    assert relative(answers.velocity(name, "bare"), files.wan_velocity(answers.wan, {})) < TOLERANCE


def test_a_control_is_applied_to_a_model_while_another_control_of_it_is_in_memory(answers: Answers):
    expected = files.wan_velocity(answers.wan, {"style": 0.5, "tile": 1.0}, "other")
    assert relative(answers.velocity("another branch"), expected) < TOLERANCE


def test_over_an_fp8_base_the_control_is_in_full_precision(answers: Answers):
    """What it adds is what it adds to a base in float32, but for what fp8 does to the blocks behind it."""
    added = files.wan_velocity(answers.wan, {"tile": 1.0}, "control") - files.wan_velocity(answers.wan, {})
    found = answers.velocity("fp8") - answers.velocity("fp8, none")
    figures = {"added": relative(found, added), "tight": relative(answers.velocity("fp8, tight"), answers.velocity("fp8"))}
    print(json.dumps(figures))
    assert "torch.float8_e4m3fn" in answers.told["fp8"]["dtypes"]
    assert figures["added"] < 0.1
    assert figures["tight"] < TOLERANCE


def test_the_control_is_resized_by_the_rules_of_wan_and_it_is_said(answers: Answers):
    report = answers.told["resized"]["reports"][0].splitlines()
    assert report == [
        "depth.safetensors: control by input channels for Wan (patch_embedding has 32 input channels)",
        "21 of 21 layers matched, strength 1",
        "control: 63 x 79, 12 frames -> 48 x 64, 9 frames (multiples of 16 pixels, 4n+1 frames)",
        "video: 48 x 64, 9 frames",
    ]
    assert torch.equal(answers.tensors("resized")["control"], answers.tensors("to a latent")["control"])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("too short", "the control has 9 frames, the video 17; a control for Wan goes with every frame. Make the video 9 frames long"),
        ("no control", "the model has 16 input channels, style.safetensors makes them 16; the control has 16"),
        ("of LTX", "is a control LoRA for LTX-Video, the model is WAN21"),
        ("ltx, unnamed", "neither the name of my_depth.safetensors nor its metadata say that it is an IC-LoRA"),
        ("ltx, batch", "the latent holds 2 videos; a reference goes with one"),
        ("ltx, twice", "the conditioning has a guide already"),
        ("ltx, of Wan", "is a control LoRA for Wan, the model is LTXV"),
    ],
)
def test_what_cannot_be_is_refused(answers: Answers, name: str, words: str):
    assert words in answers.told[name]["error"]


@pytest.mark.parametrize("name", ["ltx", "ltx, tight", "ltx, half", "ltx, diffusers", "ltx, renamed", "ltx, short"])
def test_ltx_answers_as_diffusers_does_with_the_reference_before_the_video(answers: Answers, name: str):
    video = files.LTX_NOISE[2]
    guide, strength = answers.tensors(name)["guide"][:, :, video:], 0.5 if name == "ltx, half" else 1.0
    figures = {
        "velocity": relative(answers.velocity(name), files.ltx_velocity(answers.ltx, strength, guide)),
        "effect": relative(files.ltx_velocity(answers.ltx, strength, 0 * guide), files.ltx_velocity(answers.ltx, strength, guide)),
    }
    print(json.dumps(figures))
    assert figures["velocity"] < TOLERANCE
    assert figures["effect"] > 10 * TOLERANCE
    told = answers.told[name]
    assert told["log"] == []
    assert told["partial"] == (name == "ltx, tight")
    assert "20 of 20 layers matched" in told["reports"][0]
    assert guide.shape[2] == (2 if name == "ltx, short" else 3)


def test_what_is_sampled_by_ltx_is_cropped_to_the_video(answers: Answers):
    found = answers.tensors("ltx")
    assert torch.equal(found["cropped"], found["x0"][:, :, : files.LTX_NOISE[2]])
    assert not answers.told["ltx"]["guides left"]


def test_the_control_is_resized_by_the_rules_of_ltx_and_it_is_said(answers: Answers):
    assert answers.told["ltx"]["reports"][0].splitlines() == [
        "ltxv-097-ic-lora-depth-control-comfyui.safetensors: IC-LoRA for LTX-Video (its name)",
        "20 of 20 layers matched, strength 1",
        "control: 100 x 70, 20 frames -> 96 x 64, 17 frames (multiples of 32 pixels, 8n+1 frames)",
        "video: 96 x 64, 17 frames",
        "behind the sampler: LTXVCropGuides",
    ]
    short = answers.told["ltx, short"]["reports"][0].splitlines()
    assert short[2:4] == [
        "control: 96 x 64, 11 frames -> 96 x 64, 9 frames (multiples of 32 pixels, 8n+1 frames)",
        "video: 96 x 64, 17 frames",
    ]
