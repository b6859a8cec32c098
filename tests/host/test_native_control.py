"""A control LoRA by our node in ComfyUI's models answers as diffusers' models do with the same control."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from control_answers import FPS, SIGMA
from installation import PACK, ComfyUI
from safetensors.torch import load_file, save_file
from tiny import WAN, TinyShape, random_transformer, write_transformer

from trainers.checkpoint import Checkpoint
from trainers.demo import demo
from trainers.load import load_vae

TOLERANCE = 1e-4
RANK = 4
SHAPE = TinyShape(text_dim=4096)
EMBEDDING = "patch_embedding"
FRAMES, HEIGHT, WIDTH = 9, 64, 48


def ask(comfyui: ComfyUI, *tasks: dict[str, Any]) -> list[Any]:
    return comfyui.call("control_answers.py", pack=str(PACK), tasks=list(tasks))


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def chance(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# Files in the layouts that people exchange, with random values


def write_lora(path: Path, modules: dict[str, tuple[torch.Tensor, torch.Tensor]], **more: torch.Tensor) -> Path:
    """{native module: (A, B)} in the native form; `more` are further tensors, with dots as double underscores."""
    state = {f"diffusion_model.{name.replace('__', '.')}": tensor for name, tensor in more.items()}
    for name, (down, up) in modules.items():
        state |= {f"diffusion_model.{name}.lora_A.weight": down, f"diffusion_model.{name}.lora_B.weight": up}
    save_file(state, path)
    return path


def pair(out: int, inputs: Sequence[int], seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A (rank, *inputs) and B of a layer, of a size that shows in the answer."""
    down = torch.randn(RANK, *inputs, generator=chance(seed)) / math.sqrt(math.prod(inputs))
    up = torch.randn(out, RANK, *(1 for _ in inputs[1:]), generator=chance(seed + 1000)) / math.sqrt(RANK)
    return down, up


def wan_modules(seed: int, channels: int = 0) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Every Linear of the blocks; with `channels` also the patch embedding, of so many input channels."""
    width, ffn = SHAPE.width, SHAPE.ffn
    sizes = {f"{attention}.{part}": (width, width) for attention in ("self_attn", "cross_attn") for part in "qkvo"}
    sizes |= {"ffn.0": (ffn, width), "ffn.2": (width, ffn)}
    made = {}
    for block in range(SHAPE.layers):
        for name, (out, inputs) in sizes.items():
            made[f"blocks.{block}.{name}"] = pair(out, [inputs], seed + len(made))
    return made | ({EMBEDDING: pair(width, [channels, 1, 2, 2], seed + len(made))} if channels else {})


@dataclass(frozen=True)
class WanCase:
    """Files of a tiny Wan, its inputs, and LoRAs: two with a control, one without that also adapts the patch embedding."""

    folder: Path
    transformer: Path
    loras: dict[str, Path] = field(default_factory=dict)

    def task(self, name: str, *steps: dict[str, Any], **more: Any) -> dict[str, Any]:
        files = {"transformer": str(self.transformer), "vae": str(demo.VAE), "inputs": str(self.folder / "inputs")}
        named = [{**step, "path": str(self.loras[step["path"]])} for step in steps]
        return {"family": "wan", **files, "steps": named, "output": str(self.folder / name), **more}

    def found(self, name: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(velocity, the control in the conditioning) of a task."""
        found, noise = load_file(self.folder / name), load_file(self.folder / "inputs")["noise"]
        return (SIGMA * noise - found["x0"]) / SIGMA, found.get("control")


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> WanCase:
    folder = tmp_path_factory.mktemp("wan_control")
    shape = [SHAPE.width, 32, 1, 2, 2]
    grown = {"patch_embedding__reshape_weight": torch.tensor(shape)}
    loras = {
        "depth": write_lora(folder / "depth.safetensors", wan_modules(1, 32), **grown),
        "tile": write_lora(folder / "tile.safetensors", {EMBEDDING: pair(SHAPE.width, shape[1:], 500)}, **grown),
        "style": write_lora(
            folder / "style.safetensors",
            wan_modules(2000, 16),
            patch_embedding__diff_b=0.1 * torch.randn(SHAPE.width, generator=chance(8)),
        ),
        "bare": folder / "bare.safetensors",
    }
    bare = {key.removeprefix("diffusion_model."): tensor for key, tensor in load_file(loras["depth"]).items() if "reshape" not in key}
    save_file(bare, loras["bare"])
    inputs = {
        "noise": torch.randn(1, 16, (FRAMES - 1) // 4 + 1, HEIGHT // 8, WIDTH // 8, generator=chance(0)),
        "text": torch.nn.functional.pad(torch.randn(1, 7, 4096, generator=chance(1)), (0, 0, 0, 505)),
        "control": torch.rand(FRAMES, HEIGHT, WIDTH, 3, generator=chance(2)),
        "other": torch.rand(FRAMES, HEIGHT, WIDTH, 3, generator=chance(3)),
    }
    save_file(inputs, folder / "inputs")
    return WanCase(folder, write_transformer(folder / "wan2.1.safetensors", SHAPE), loras)


def wan_velocity(case: WanCase, *loras: tuple[str, float], controls: Sequence[str] = ("control",)) -> torch.Tensor:
    """What diffusers' transformer answers, the LoRAs merged into it and the controls' latents behind the noisy ones."""
    given = load_file(case.folder / "inputs")
    vae = load_vae(Checkpoint.open(demo.VAE, "vae"), WAN, "cpu")
    pixels = [given[name].permute(3, 0, 1, 2)[None] * 2 - 1 for name in controls]
    with torch.no_grad():
        latents = [SIGMA * given["noise"], *(WAN.encode_video(vae, clip) for clip in pixels)]
        model = merged(case, dict(loras), 16 * len(latents))
        return model(torch.cat(latents, 1), torch.tensor([1000 * SIGMA]), given["text"], return_dict=False)[0]


def merged(case: WanCase, loras: dict[str, float], channels: int) -> torch.nn.Module:
    """The tiny transformer with `channels` input channels and the LoRAs; each further control LoRA has the next channels."""
    model = random_transformer(SHAPE)
    own = model.patch_embedding
    model.patch_embedding = torch.nn.Conv3d(channels, SHAPE.width, own.kernel_size, own.stride)
    model.patch_embedding.weight.copy_(torch.nn.functional.pad(own.weight, (0, 0) * 3 + (0, channels - 16)))
    model.patch_embedding.bias.copy_(own.bias)
    free = 16
    for name, strength in loras.items():
        state = {key.removeprefix("diffusion_model."): tensor for key, tensor in load_file(case.loras[name]).items()}
        for key in [key for key in state if key.endswith(".lora_A.weight")]:
            module = key.removesuffix(".lora_A.weight")
            down, up = state[key], state[f"{module}.lora_B.weight"]
            delta = strength * (up.flatten(1) @ down.flatten(1)).reshape(up.shape[0], *down.shape[1:])
            weight = model.get_submodule(WAN.keys.to_diffusers(module)[0].name).weight
            if module == EMBEDDING:
                weight[:, :16] += delta[:, :16]
                further = delta.shape[1] - 16
                weight[:, free : free + further] += delta[:, 16:]
                free += further
            else:
                weight += delta
        if f"{EMBEDDING}.diff_b" in state:
            model.patch_embedding.bias += strength * state[f"{EMBEDDING}.diff_b"]
    return model


DEPTH = {"path": "depth"}
STYLE = {"path": "style", "by": "core", "strength": 0.5, "control": ""}


def test_wan_answers_as_diffusers_does_also_when_nothing_fits_into_memory(comfyui: ComfyUI, wan: WanCase):
    told, tight = ask(comfyui, wan.task("full", DEPTH), wan.task("tight", DEPTH, tight=True))
    expected, uncontrolled = wan_velocity(wan, ("depth", 1.0)), wan_velocity(wan, controls=())
    (velocity, control), (partial, _) = wan.found("full"), wan.found("tight")
    vae = load_vae(Checkpoint.open(demo.VAE, "vae"), WAN, "cpu")
    with torch.no_grad():
        latents = WAN.encode_video(vae, load_file(wan.folder / "inputs")["control"].permute(3, 0, 1, 2)[None] * 2 - 1)
    figures = {"full": relative(velocity, expected), "tight": relative(partial, expected), "effect": relative(uncontrolled, expected)}
    print(json.dumps({**figures, "control": relative(control, latents)}))
    assert max(figures["full"], figures["tight"], relative(control, latents)) < TOLERANCE
    assert figures["effect"] > 1000 * TOLERANCE
    assert told["log"] == tight["log"] == []
    assert (told["partial"], tight["partial"]) == (False, True)
    assert told["latent"] == list(load_file(wan.folder / "inputs")["noise"].shape)
    assert told["reports"][0].splitlines() == [
        "depth.safetensors: control by input channels for Wan (patch_embedding has 32 input channels)",
        "21 of 21 layers matched, strength 1",
        "control: 48 x 64, 9 frames",
        "video: 48 x 64, 9 frames",
    ]


def test_core_alone_agrees_but_cannot_when_nothing_fits_into_memory(comfyui: ComfyUI, wan: WanCase):
    """What the node is for: once the second half fails, ComfyUI has learnt it."""
    core = {"path": "depth", "by": "core"}
    _, tight = ask(comfyui, wan.task("core", core), wan.task("core tight", core, tight=True, refused=True))
    assert relative(wan.found("core")[0], wan_velocity(wan, ("depth", 1.0))) < TOLERANCE
    assert "channels" in tight["error"]


@pytest.mark.parametrize("tight", [False, True], ids=["loaded", "tight"])
def test_wan_control_loras_stack(comfyui: ComfyUI, wan: WanCase, tight: bool):
    """With an ordinary LoRA before and after that adapts the patch embedding too, with strengths, and with one another."""
    half, second = {"path": "depth", "strength": 0.5}, {"path": "tile", "control": "other"}
    asked = {
        "before": [STYLE, DEPTH],
        "after": [DEPTH, STYLE],
        "half": [half],
        "none": [{"path": "depth", "strength": 0.0}],
        "two": [STYLE, DEPTH, second],
        "bare": [{"path": "bare"}],
    }
    told = ask(comfyui, *(wan.task(name, *steps, tight=tight) for name, steps in asked.items()))
    styled = wan_velocity(wan, ("style", 0.5), ("depth", 1.0))
    expected = {
        "before": styled,
        "after": styled,
        "half": wan_velocity(wan, ("depth", 0.5)),
        "none": wan_velocity(wan, controls=()),
        "two": wan_velocity(wan, ("style", 0.5), ("depth", 1.0), ("tile", 1.0), controls=("control", "other")),
        "bare": wan_velocity(wan, ("depth", 1.0)),
    }
    figures = {name: relative(wan.found(name)[0], expected[name]) for name in asked}
    print(json.dumps(figures))
    assert max(figures.values()) < TOLERANCE
    assert [task["log"] for task in told] == [[]] * len(asked)
    assert [task["partial"] for task in told] == [tight] * len(asked)


def test_wan_in_fp8_has_the_control_in_full_precision(comfyui: ComfyUI, wan: WanCase):
    """The base is as it is in fp8; what the control adds is what it adds to a base in float32 (fp8's own error aside)."""
    fp8 = {"options": {"dtype": "float8_e4m3fn"}}
    tile, none = {"path": "tile"}, {"path": "tile", "strength": 0.0}
    told, *_ = ask(comfyui, *(wan.task(f"fp8 {i}", step, **fp8, tight=tight) for i, (step, tight) in enumerate(
        ((tile, False), (none, False), (tile, True))
    )))  # fmt: skip
    (with_tile, _), (without, _), (tight, _) = (wan.found(f"fp8 {i}") for i in range(3))
    added = wan_velocity(wan, ("tile", 1.0)) - wan_velocity(wan, controls=())
    figures = {"added": relative(with_tile - without, added), "tight": relative(tight, with_tile)}
    print(json.dumps(figures))
    assert "torch.float8_e4m3fn" in told["dtypes"]
    assert figures["added"] < 0.2
    assert figures["tight"] < TOLERANCE
