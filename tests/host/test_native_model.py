"""ComfyUI's model and the trainer's transformer answer alike, without and with a LoRA by core's own loader."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import assert_near
from installation import ComfyUI
from questions import ask, relative
from safetensors.torch import load_file, save_file
from tiny import VARIANT, WAN, TinyShape, as_fp8_scaled, random_transformer, tiny_job, write_transformer

from trainers.checkpoint import Checkpoint
from trainers.demo import demo
from trainers.family import Conditions, TextRecord, detect, detect_vae
from trainers.flow import noised
from trainers.job import LoraSpec
from trainers.load import load_transformer, load_vae, native_state
from trainers.lora import inject, load_adapter_state
from trainers.lora_format import read_lora
from trainers.run import Run
from trainers.trainer import train
from trainers.training import lora_path

TOLERANCE = 1e-4
RANK = 4
SIZES = {
    "tiny Wan": None,
    "one layer of 1.3B": TinyShape(layers=1, width=1536, ffn=8960, text_dim=4096),
}
"""None: the tiny base itself."""


@dataclass(frozen=True)
class Case:
    """A transformer's native file, a LoRA that was trained on it, and what both models are asked."""

    transformer: Path
    lora: Path
    inputs: Path

    @property
    def base(self) -> dict[str, Any]:
        return {"family": "wan", "variant": VARIANT, "transformer": str(self.transformer)}


@pytest.fixture(scope="module", params=SIZES.values(), ids=SIZES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("native")
    job = tiny_job(
        folder,
        request.param or TinyShape(text_dim=4096),
        steps=3,
        lora={"rank": RANK},
        optimizer={"learning_rate": 1e-2},
        **({} if request.param else {"base": {"transformer": str(demo.TRANSFORMER)}}),
    )
    run = Run.create(job)
    assert train(run) == "done"
    save_file(questions(), folder / "inputs.safetensors")
    return Case(Path(job.base.transformer), lora_path(run, 3), folder / "inputs.safetensors")


def questions() -> dict[str, torch.Tensor]:
    """Two noisy clips at two noise levels, with captions of two lengths."""
    chance = torch.Generator().manual_seed(0)
    records = [TextRecord(torch.randn(length, 4096, generator=chance)) for length in (5, 9)]
    text = WAN.collate_text(records, torch.device("cpu"), torch.float32)
    noisy = torch.randn(2, 16, 3, 8, 6, generator=chance)
    return {"noisy_BCFHW": noisy, "sigma_B": torch.tensor([0.3, 0.9]), "text_BLD": text.embeds_BLD}


def trainers_velocity(case: Case, lora: Path | None) -> torch.Tensor:
    checkpoint = Checkpoint.open(case.transformer)
    detection = detect(checkpoint)
    transformer = load_transformer(checkpoint, detection, "cpu", torch.float32)
    if lora:
        inject(transformer, WAN, LoraSpec(rank=RANK), seed=0)
        load_adapter_state(transformer, read_lora(lora, WAN))
    given = load_file(case.inputs)
    inputs = WAN.prepare(detection.variant, given["noisy_BCFHW"], given["sigma_B"], Conditions())
    records = [TextRecord(text_LD) for text_LD in given["text_BLD"]]
    with torch.no_grad():
        return WAN.predict(transformer, inputs, WAN.collate_text(records, torch.device("cpu"), torch.float32))


def velocity(case: Case, output: Path, lora: Path | None = None, weight_dtype: str | None = None) -> dict[str, Any]:
    files = {"inputs": str(case.inputs), "output": str(output), "lora": str(lora) if lora else None}
    return {"task": "velocity", "base": case.base, "weight_dtype": weight_dtype, **files}


def test_they_agree_in_float32_without_and_with_a_lora(comfyui: ComfyUI, case: Case, tmp_path: Path):
    files = tmp_path / "bare", tmp_path / "patched"
    told, told_with_lora = ask(comfyui, velocity(case, files[0]), velocity(case, files[1], case.lora))
    bare, patched = (load_file(file)["velocity"] for file in files)
    ours, ours_with_lora = trainers_velocity(case, None), trainers_velocity(case, case.lora)
    figures = {"bare": relative(bare, ours), "with LoRA": relative(patched, ours_with_lora), "LoRA's effect": relative(patched, bare)}
    print(json.dumps(figures))
    assert (told["class"], told["dtype"]) == ("WAN21", "torch.float32")
    assert figures["bare"] < TOLERANCE
    assert figures["with LoRA"] < TOLERANCE
    assert figures["LoRA's effect"] > 100 * TOLERANCE
    assert told_with_lora["patched"] == len(load_file(case.lora)) // 2
    assert not [line for line in told_with_lora["log"] if "not loaded" in line.lower()]


def test_one_step_of_its_sampler_is_our_velocity(comfyui: ComfyUI, case: Case, tmp_path: Path):
    """The way that every variant is compared by: noising, conditioning and masks are ComfyUI's own."""
    given = questions()
    clean, noise = given["noisy_BCFHW"][:1], given["noisy_BCFHW"][1:]
    question = {"clean_BCFHW": clean, "noise_BCFHW": noise, "sigma": torch.tensor(0.7), "text_BLD": given["text_BLD"][:1]}
    save_file({name: tensor.clone() for name, tensor in question.items()}, tmp_path / "question")
    ask(comfyui, {"task": "denoise", "base": case.base, "inputs": str(tmp_path / "question"), "output": str(tmp_path / "answer")})
    answer = load_file(tmp_path / "answer")
    assert_near(answer["noisy"], noised(clean, noise, question["sigma"].reshape(1)))
    asked = {"noisy_BCFHW": answer["noisy"], "sigma_B": question["sigma"].reshape(1), "text_BLD": question["text_BLD"]}
    save_file(asked, tmp_path / "inputs")
    ours = trainers_velocity(replace(case, inputs=tmp_path / "inputs"), None)
    assert relative(answer["velocity"], ours) < TOLERANCE


# Other forms of the same model


SMALL = TinyShape(text_dim=4096)


def weights(comfyui: ComfyUI, folder: Path, *bases: dict[str, str]) -> list[dict[str, torch.Tensor]]:
    """What LoadTransformer and LoadEncoders give of each base."""
    files = [folder / f"weights{index}" for index in range(len(bases))]
    known = {"family": "wan", "variant": VARIANT}
    ask(comfyui, *({"task": "weights", "base": known | base, "output": str(file)} for base, file in zip(bases, files, strict=True)))
    return [load_file(file) for file in files]


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_a_diffusers_folder_and_native_shards_give_the_same_objects(comfyui: ComfyUI, tmp_path: Path):
    single = {"transformer": str(write_transformer(tmp_path / "wan2.1.safetensors", SMALL)), "vae": str(demo.VAE)}
    random_transformer(SMALL).save_pretrained(tmp_path / "model" / "transformer", max_shard_size="2MB")
    vae = Checkpoint.open(demo.VAE, "vae")
    load_vae(vae, detect_vae(vae, WAN), "cpu").save_pretrained(tmp_path / "model" / "vae")
    assert len(list((tmp_path / "model" / "transformer").glob("*.safetensors"))) > 1
    folder = dict.fromkeys(("transformer", "vae"), str(tmp_path / "model"))
    shards = {"transformer": str(write_shards(tmp_path / "shards")), "vae": str(demo.VAE)}
    expected, *found = weights(comfyui, tmp_path, single, folder, shards)
    assert len(expected) > 100
    assert all(equal(objects, expected) for objects in found)


def write_shards(folder: Path) -> Path:
    state = native_state(random_transformer(SMALL).state_dict(), WAN.keys)
    folder.mkdir()
    for number in (1, 2):
        save_file(dict(list(state.items())[number - 1 :: 2]), folder / f"model-{number:05}-of-00002.safetensors")
    return folder


def test_precisions_are_core_s(comfyui: ComfyUI, tmp_path: Path):
    transformer, scaled = (write_transformer(tmp_path / f"wan2.1_{name}.safetensors", SMALL) for name in ("float32", "fp8_scaled"))
    as_fp8_scaled(scaled)
    save_file(questions(), tmp_path / "inputs.safetensors")
    cases = [Case(path, path, tmp_path / "inputs.safetensors") for path in (transformer, transformer, scaled)]
    dtypes = ("default", "fp8_e4m3fn", "default")
    files = [tmp_path / f"velocity{index}" for index in range(3)]
    told = ask(comfyui, *(velocity(case, file, weight_dtype=name) for case, file, name in zip(cases, files, dtypes, strict=True)))
    as_stored, in_fp8, as_scaled = (
        relative(load_file(file)["velocity"], trainers_velocity(case, None)) for case, file in zip(cases, files, strict=True)
    )
    print(json.dumps({"as stored": as_stored, "in fp8": in_fp8, "fp8_scaled": as_scaled, "dtypes": [item["dtype"] for item in told]}))
    assert as_stored < TOLERANCE
    assert told[1]["dtype"] == "torch.float8_e4m3fn"
    assert 1e-3 < in_fp8 < 0.2
    assert as_scaled < TOLERANCE
