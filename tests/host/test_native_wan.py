"""Every variant of Wan: ComfyUI's model, VAE, image encoder and sampler answer as the family does, LoRAs and first frames included."""

from __future__ import annotations

import gc
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import assert_near
from installation import ComfyUI
from questions import ask, relative
from safetensors.torch import load_file, save_file
from tiny import TinyShape
from wan_models import SMALL, VARIANTS, Question, config_of, open_variant, write_variant

from trainers.demo import demo
from trainers.families.wan import FAMILY
from trainers.family import TextRecord
from trainers.flow import noised
from trainers.job import LoraSpec
from trainers.load import native_state
from trainers.lora import adapter_state, inject, load_adapter_state
from trainers.lora_format import read_lora, write_lora
from trainers.sample import Solver, sample_latents

TOLERANCE = 1e-4
STEPS = 4
_5B, _14B = TinyShape(layers=1, width=3072, ffn=14336, text_dim=4096), TinyShape(layers=1, width=5120, ffn=13824, text_dim=4096)
CLASSES = {"wan2.2-ti2v": "WAN22"}


@dataclass(frozen=True)
class Case:
    """A variant at a size. `first_frame` False: TI2V as text to video."""

    variant: str
    shape: TinyShape = SMALL
    first_frame: bool = True

    @property
    def name(self) -> str:
        return f"{self.variant} {self.shape.width}{'' if self.first_frame else ' without first frame'}"

    @property
    def question(self) -> Question:
        return Question.of(self.variant, self.first_frame)


TINY = [Case(variant) for variant in ("wan2.1-i2v", "wan2.2-t2v", "wan2.2-i2v", "wan2.2-ti2v")]
TINY.append(Case("wan2.2-ti2v", first_frame=False))
WIDE = [Case("wan2.2-ti2v", _5B), Case("wan2.1-i2v", _14B)]
"""2.1 I2V 14B has every layer of the other 14B models, and the image layers: these need no gigabytes of their own here."""


def prepared(case: Case, folder: Path) -> list[dict[str, Any]]:
    """Writes a model, a random LoRA on it and a question; the tasks that ask ComfyUI without and with the LoRA."""
    folder.mkdir()
    stored = torch.float32 if case.shape is SMALL else torch.bfloat16
    path = write_variant(folder, case.variant, case.shape, stored)
    transformer, spec = FAMILY.build(config_of(case.variant, case.shape)), LoraSpec(rank=4)
    with torch.no_grad():
        for parameter in inject(transformer, FAMILY, spec, seed=0):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())))
    write_lora(folder / "lora.safetensors", adapter_state(transformer, spec), FAMILY)
    save_file(case.question.for_comfyui(), folder / "question")
    task = {"task": "denoise", "base": {"family": "wan", "variant": case.variant, "transformer": str(path)}}
    task["inputs"] = str(folder / "question")
    bare = task | {"output": str(folder / "bare")}
    return [bare, task | {"output": str(folder / "patched"), "lora": str(folder / "lora.safetensors")}]


def check(case: Case, folder: Path, tasks: list[dict[str, Any]], told: list[Any]) -> None:
    """ComfyUI's two answers are the family's."""
    answers = [load_file(task["output"]) for task in tasks]
    question = case.question
    first = 1 if question.in_place else 0  # the frames that are predicted
    noisy = answers[0]["noisy"]
    expected = noised(question.clean_BCFHW, question.noise_BCFHW, torch.tensor([question.sigma]))
    assert_near(noisy[:, :, first:], expected[:, :, first:])

    detection, transformer = open_variant(Path(tasks[0]["base"]["transformer"]))
    assert detection.variant.id == case.variant
    bare = question.velocity(transformer, noisy)[:, :, first:]
    layers = inject(transformer, FAMILY, LoraSpec(rank=4), seed=0)
    load_adapter_state(transformer, read_lora(folder / "lora.safetensors", FAMILY))
    patched = question.velocity(transformer, noisy)[:, :, first:]
    native_bare, native_patched = (answer["velocity"][:, :, first:] for answer in answers)
    figures = {"bare": relative(native_bare, bare), "with LoRA": relative(native_patched, patched)}
    figures["LoRA's effect"] = relative(native_patched, native_bare)
    print(json.dumps({case.name: figures}))
    assert max(figures["bare"], figures["with LoRA"]) < TOLERANCE
    assert figures["LoRA's effect"] > 100 * TOLERANCE
    assert {answer["class"] for answer in told} == {CLASSES.get(case.variant, "WAN21")}
    assert (told[0]["patched"], told[1]["patched"]) == (0, len(layers) // 2)
    assert not [line for answer in told for line in answer["log"] if "not loaded" in line.lower()]


@pytest.mark.parametrize("cases", [TINY, pytest.param(WIDE, marks=pytest.mark.slow)], ids=["tiny", "one layer at true width"])
def test_every_variant_answers_alike_without_and_with_a_lora(comfyui: ComfyUI, tmp_path: Path, cases: list[Case]):
    tasks = []
    for number, case in enumerate(cases):
        tasks.append(prepared(case, tmp_path / str(number)))
        gc.collect()
    told = ask(comfyui, *(task for pair in tasks for task in pair))
    for number, case in enumerate(cases):
        check(case, tmp_path / str(number), tasks[number], told[2 * number : 2 * number + 2])
        gc.collect()


def sampled(question: Question, transformer: torch.nn.Module) -> tuple[torch.Tensor, list[float]]:
    """What a preview makes of the question's noise."""
    solver = Solver.of(FAMILY, question.variant, STEPS, None, None, tokens=36)
    prompt, negative = (TextRecord(text_BLD[0]) for text_BLD in (question.text_BLD, question.negative_BLD))
    noise, conditions = question.noise_BCFHW, question.conditions
    found = sample_latents(
        FAMILY, question.variant, lambda _: transformer, noise, [prompt], negative, solver, torch.float32, conditions=conditions
    )
    return found, list(solver.sigmas)


def test_previews_are_what_the_native_graph_makes_of_the_same_noise(comfyui: ComfyUI, tmp_path: Path):
    """Load Diffusion Model -> Model Sampling SD3 (shift 8) -> KSampler (euler, simple), with the family's cfg."""
    cases = [Case("wan2.1-t2v"), *TINY]
    tasks = []
    for number, case in enumerate(cases):
        folder = tmp_path / str(number)
        folder.mkdir()
        inputs = case.question.for_comfyui()
        if not case.question.in_place:
            inputs.pop("clean_BCFHW")
        save_file(inputs, folder / "question")
        base = {"family": "wan", "variant": case.variant, "transformer": str(write_variant(folder, case.variant))}
        default = FAMILY.sampling(VARIANTS[case.variant])
        files = {"inputs": str(folder / "question"), "output": str(folder / "answer")}
        tasks.append({"task": "sample", "base": base, "steps": STEPS, "cfg": default.cfg, "shift": default.shift} | files)
    ask(comfyui, *tasks)
    figures = {}
    for case, task in zip(cases, tasks, strict=True):
        _, transformer = open_variant(Path(task["base"]["transformer"]))
        found, sigmas = sampled(case.question, transformer)
        answer = load_file(task["output"])
        torch.testing.assert_close(torch.tensor(sigmas), answer["sigmas"], rtol=1e-5, atol=1e-7)
        figures[case.name] = relative(found, answer["latents"])
        if case.question.in_place:
            torch.testing.assert_close(found[:, :, 0], case.question.clean_BCFHW[:, :, 0], rtol=0, atol=0)
    print(json.dumps(figures))
    assert max(figures.values()) < TOLERANCE


VAES = {
    "wan2.1": ("comfy.ldm.wan.vae:WanVAE", {"dim": 8, "z_dim": 16}, {"base_dim": 8}, (3, 5, 16, 24)),
    "wan2.2": (
        "comfy.ldm.wan.vae2_2:WanVAE",
        {"dim": 8, "dec_dim": 12, "z_dim": 48},
        {"base_dim": 8, "decoder_base_dim": 12, "z_dim": 48, "is_residual": True, "in_channels": 12, "out_channels": 12}
        | {"patch_size": 2, "scale_factor_spatial": 16},
        (3, 5, 32, 64),
    ),
}


def test_vaes_encode_and_decode_alike(comfyui: ComfyUI, tmp_path: Path):
    from diffusers import AutoencoderKLWan

    tasks, ours = [], {}
    for name, (kind, arguments, config, size) in VAES.items():
        torch.manual_seed(0)
        vae = AutoencoderKLWan(**config).requires_grad_(False).eval()
        table = next(found.keys for found in FAMILY.vaes if found.id == name)
        save_file({key: tensor.clone() for key, tensor in native_state(vae.state_dict(), table).items()}, tmp_path / f"{name} weights")
        pixels, spec = torch.rand(1, *size) * 2 - 1, FAMILY.latent(VARIANTS["wan2.2-ti2v" if name == "wan2.2" else "wan2.1-t2v"])
        latents = torch.randn(1, *spec.shape(*size[1:]))
        mean, std = (torch.tensor(values).view(1, -1, 1, 1, 1) for values in (spec.mean, spec.std))
        save_file({"pixels_BCFHW": pixels, "latents_BCFHW": latents * std + mean}, tmp_path / f"{name} inputs")
        ours[name] = (FAMILY.encode_video(vae, pixels) * std + mean, FAMILY.decode_video(vae, latents))
        files = {file: str(tmp_path / f"{name} {file}") for file in ("weights", "inputs", "output")}
        arguments = arguments | {"temperal_downsample": [False, True, True]}
        tasks.append({"task": "bare_vae", "kind": kind, "arguments": arguments} | files)
    ask(comfyui, *tasks)
    for name, (moments, pixels) in ours.items():
        answer = load_file(tmp_path / f"{name} output")
        figures = {"encoded": relative(moments, answer["moments"]), "decoded": relative(pixels, answer["pixels"].clamp(-1, 1))}
        print(json.dumps({name: figures}))
        assert max(figures.values()) < TOLERANCE
        assert float(answer["pixels"].std()) > 0.01


def test_an_image_is_seen_as_clip_vision_encode_sees_it(comfyui: ComfyUI, tmp_path: Path):
    """Of a small CLIP vision model; the square of 224 pixels and the patches of 14 are those of the real one."""
    from types import SimpleNamespace

    from transformers import CLIPVisionConfig, CLIPVisionModel
    from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = CLIPVisionConfig(**sizes, patch_size=14, image_size=224, hidden_act="gelu")
    encoder = CLIPVisionModel(config).half().float().eval()  # ComfyUI holds the weights in float16, and computes in float32
    weights = {f"vision_model.{name.removeprefix('vision_model.')}": tensor for name, tensor in encoder.state_dict().items()}
    save_file(weights, tmp_path / "weights")
    image_HWC = torch.rand(90, 160, 3)
    save_file({"image_HWC": image_HWC}, tmp_path / "image")
    (tmp_path / "config.json").write_text(config.to_json_string(), "utf-8")
    files = {"config": "config.json", "weights": "weights", "image": "image", "output": "rows"}
    base = {"family": "wan", "variant": "wan2.1-t2v", "transformer": "", "vae": str(demo.VAE)}
    told, refused = ask(
        comfyui,
        {"task": "clip_vision"} | {name: str(tmp_path / file) for name, file in files.items()},
        {"task": "vae_of_another_variant", "base": base, "variant": "wan2.2-ti2v"},
    )
    processor = SimpleNamespace(image_mean=OPENAI_CLIP_MEAN, image_std=OPENAI_CLIP_STD)
    folder = SimpleNamespace(image_processor=lambda: processor, image_encoder=lambda: encoder)
    rows, expected = FAMILY.encode_image(folder, image_HWC), load_file(tmp_path / "rows")["rows"]
    print(json.dumps({"rows": relative(rows, expected)}))
    assert (told["missing"], told["unexpected"]) == (["visual_projection.weight"], []), "what only its other outputs need is not there"
    assert rows.shape == expected.shape == (257, 32)
    assert relative(rows, expected) < TOLERANCE
    assert "the VAE gives 16 channels; Wan 2.2 TI2V (other size) has 48. Wire the model's VAE" in refused
