"""LoRAs of every kind and form in ComfyUI: Apply LoRA counts their layers, and core reads a DoRA as it was trained."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from installation import PACK, ComfyUI
from safetensors.torch import load_file, save_file
from test_native_model import Case, questions, relative, velocity
from tiny import WAN, TinyShape, tiny_job

from trainers.adapter import Adapter
from trainers.checkpoint import Checkpoint
from trainers.family import Conditions, TextRecord, detect
from trainers.job import LoraSpec
from trainers.load import load_transformer
from trainers.lora import inject, load_adapter_state
from trainers.lora_format import Form, convert, native_tensors, read_lora, write_lora
from trainers.run import Run
from trainers.trainer import train
from trainers.training import lora_path

SPEC = LoraSpec(rank=4, alpha=2.0, dora=True)
TOLERANCE = 1e-4
FORMS: tuple[Form, ...] = ("native", "diffusers", "kohya")


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A DoRA trained for some steps at a high learning rate, so that its directions and magnitudes have moved far."""
    folder = tmp_path_factory.mktemp("dora")
    job = tiny_job(folder, TinyShape(text_dim=4096), steps=6, lora=SPEC.model_dump(), optimizer={"learning_rate": 5e-2})
    run = Run.create(job)
    assert train(run) == "done"
    save_file(questions(), folder / "inputs.safetensors")
    return Case(Path(job.base.transformer), lora_path(run, 6), folder / "inputs.safetensors")


@pytest.fixture(scope="module")
def trained(case: Case) -> Any:
    checkpoint = Checkpoint.open(case.transformer)
    transformer = load_transformer(checkpoint, detect(checkpoint), "cpu", torch.float32)
    inject(transformer, WAN, SPEC, seed=0)
    load_adapter_state(transformer, read_lora(case.lora, WAN))
    return transformer


def our_velocity(case: Case, transformer: Any) -> torch.Tensor:
    given = load_file(case.inputs)
    variant = detect(Checkpoint.open(case.transformer)).variant
    inputs = WAN.prepare(variant, given["noisy_BCFHW"], given["sigma_B"], Conditions())
    text = WAN.collate_text([TextRecord(text_LD) for text_LD in given["text_BLD"]], torch.device("cpu"), torch.float32)
    with torch.no_grad():
        return WAN.predict(transformer, inputs, text)


@pytest.fixture(scope="module")
def told(comfyui: ComfyUI, case: Case, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one ComfyUI answers to all of it; "folder" is where its tensors lie."""
    folder = tmp_path_factory.mktemp("answers")
    answers = [velocity(case, folder / "bare"), velocity(case, folder / "patched", case.lora)]
    files = {name: str(path) for name, path in all_files(folder, case).items()}
    given = {"pack": str(PACK), "transformer": str(case.transformer), "files": files, "lora": str(case.lora)}
    return comfyui.call("lora_fits.py", **given, weights=str(folder / "weights"), tasks=answers) | {"folder": folder}


def test_core_makes_of_a_dora_the_weights_and_the_answers_that_were_trained(told: dict[str, Any], case: Case, trained: Any) -> None:
    bare, patched, weights = (told["folder"] / name for name in ("bare", "patched", "weights"))
    patching = told["answers"][1]
    found, expected = load_file(weights), merged(trained)
    stored = load_file(case.transformer)
    figures = {
        "weights": max(relative(found[name], weight) for name, weight in expected.items()),
        "answer": relative(load_file(patched)["velocity"], our_velocity(case, trained)),
        "effect": relative(load_file(patched)["velocity"], load_file(bare)["velocity"]),
        "magnitudes taken as peft's": max(relative(weight * length_ratio(trained, name), weight) for name, weight in expected.items()),
    }
    print(json.dumps(figures))
    assert found.keys() == expected.keys() <= stored.keys()
    assert figures["weights"] < TOLERANCE
    assert figures["answer"] < TOLERANCE
    assert figures["effect"] > 100 * TOLERANCE
    assert figures["magnitudes taken as peft's"] > 10 * TOLERANCE
    assert patching["patched"] == len(found) == len(load_file(case.lora)) // 3
    assert not [line for line in patching["log"] if "not loaded" in line.lower() or "error" in line.lower()]


def merged(transformer: Any) -> dict[str, torch.Tensor]:
    """The adapted weights by native name, by peft's own merging."""
    found = {}
    for name, layer in adapted(transformer).items():
        weight = layer.get_base_layer().weight.detach()
        delta = layer.get_delta_weight("default").detach()
        magnitude = layer.lora_magnitude_vector["default"].weight.detach()
        found[WAN.keys.to_native(f"{name}.weight").name] = (weight + delta) * (magnitude / (weight + delta).norm(dim=1)).unsqueeze(1)
    return found


def length_ratio(transformer: Any, native: str) -> torch.Tensor:
    """|W + sBA| / |W|: by how much ComfyUI would be off if it were given peft's magnitudes."""
    layer = adapted(transformer)[WAN.keys.to_diffusers(native)[0].name.removesuffix(".weight")]
    weight = layer.get_base_layer().weight.detach()
    return ((weight + layer.get_delta_weight("default").detach()).norm(dim=1) / weight.norm(dim=1)).unsqueeze(1)


def adapted(transformer: Any) -> dict[str, Any]:
    return {name: layer for name, layer in transformer.named_modules() if hasattr(layer, "lora_magnitude_vector")}


def test_every_form_and_kind_is_counted(told: dict[str, Any], case: Case) -> None:
    found, layers = told["files"], len(load_file(case.lora)) // 3
    for name in ("native", "dora_kohya", "native plain", "kohya plain", "diffusers plain", "peft plain", "bare plain"):
        assert found[name] == [f"{layers} of {layers} layers matched, strength 1"], name
    assert "ComfyUI divides rows by their length in the base" in found["dora_peft"]
    for name in ("lokr", "loha"):
        assert found[name] == ["2 of 2 layers matched, strength 1"], name
    assert found["half"][0] == "1 of 2 layers matched, strength 1"
    assert "lokr_large.safetensors is for a model of another size" in found["lokr_large"]


def all_files(folder: Path, case: Case) -> dict[str, Path]:
    files = {"native": case.lora, **lycoris(folder), **plain_forms(folder, case)}
    convert(case.lora, folder / "dora_kohya.safetensors", "kohya")
    convert(case.lora, folder / "dora_peft.safetensors", "diffusers", case.transformer)
    return files | {name: folder / f"{name}.safetensors" for name in ("dora_kohya", "dora_peft")}


def lycoris(folder: Path) -> dict[str, Path]:
    """LoKr as diffusion-pipe and musubi write it, LoHa, one with a layer that is not there, one of another size."""
    at = "diffusion_model.blocks.0.self_attn"
    lokr = {f"{at}.q.lokr_w1": torch.rand(8, 8), f"{at}.q.lokr_w2_a": torch.rand(16, 4), f"{at}.q.lokr_w2_b": torch.rand(4, 16)}
    lokr |= {"lora_unet_blocks_0_self_attn_k.lokr_w1": torch.rand(8, 8), "lora_unet_blocks_0_self_attn_k.lokr_w2": torch.rand(16, 16)}
    loha = {f"{at}.{m}.hada_w{n}_{x}": torch.rand(*s) for m in "qk" for n in "12" for x, s in (("a", (128, 4)), ("b", (4, 128)))}
    half = {key.replace(".k.", ".nothing."): tensor for key, tensor in loha.items()}
    large = {f"{at}.q.lokr_w1": torch.rand(8, 8), f"{at}.q.lokr_w2": torch.rand(32, 32)}
    files = {"lokr": lokr, "loha": loha, "half": half, "lokr_large": large}
    for name, tensors in files.items():
        save_file(tensors, folder / f"{name}.safetensors")
    return {name: folder / f"{name}.safetensors" for name in files}


def plain_forms(folder: Path, case: Case) -> dict[str, Path]:
    """The same plain LoRA in forms that core reads, and in three that it does not."""
    adapter = read_lora(case.lora, WAN)
    plain = Adapter({name: replace(pair, magnitude=None) for name, pair in adapter.modules.items()})
    for form in FORMS:
        write_lora(folder / f"{form}.safetensors", plain, WAN, form)
    peft = {key.replace("transformer.", "base_model.model.", 1): t for key, t in load_file(folder / "diffusers.safetensors").items()}
    save_file(peft, folder / "peft.safetensors")
    bare = {key.removeprefix("diffusion_model."): t for key, t in native_tensors(folder / "native.safetensors").items()}
    save_file(bare, folder / "bare.safetensors")
    return {f"{name} plain": folder / f"{name}.safetensors" for name in (*FORMS, "peft", "bare")}
