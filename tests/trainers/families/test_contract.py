"""The contract of a family (trainers/family.py), kept by every family and variant that is registered."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from model_files import ASSETS, entries, shapes_of, write_header_only
from safetensors.torch import load_file
from tiny_families import (
    TINY,
    Published,
    class_defaults,
    of_every_variant,
    tiny_conditions,
    tiny_config,
    tiny_job_of,
    tiny_latents,
    tiny_text,
    tiny_transformer_of,
    write_native,
    write_native_vae,
)

from trainers.adapter import Adapter, LoraPair
from trainers.checkpoint import Checkpoint
from trainers.errors import CheckpointError
from trainers.family import Conditions, Detection, Family, Vae, VaeDetection, Variant, detect, detect_vae, families
from trainers.flow import noised, velocity_loss
from trainers.job import LoraSpec
from trainers.load import _places, load_transformer, load_vae, native_state
from trainers.lora import adapter_state, inject
from trainers.lora_format import Form, read_lora, write_lora
from trainers.run import Run
from trainers.trainer import train

FAMILIES = list(families().values())
VARIANTS = [(family, variant) for family in FAMILIES for variant in family.variants]
VAES = [(family, vae) for family in FAMILIES for vae in family.vaes]
PUBLISHED = [(family, published) for family in FAMILIES for published in TINY[family.id].published]
KEY_LISTS = sorted(path.stem for path in (ASSETS / "keys").glob("*.json"))
SPEC = LoraSpec(rank=2, alpha=1.0)
CPU = torch.device("cpu")

of_every_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.id)
of_every_vae = pytest.mark.parametrize(("family", "vae"), VAES, ids=[vae.id for _, vae in VAES])
of_every_published = pytest.mark.parametrize(("family", "published"), PUBLISHED, ids=[published.file_name for _, published in PUBLISHED])


@pytest.fixture(scope="module")
def headers(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """A file of each list of keys, with a real header and no data, under a name that tells nothing."""
    folder = tmp_path_factory.mktemp("headers")
    return {
        name: write_header_only(folder / f"{number}.safetensors", entries(shapes_of(name), torch.bfloat16))
        for number, name in enumerate(KEY_LISTS)
    }


def is_of(family: Family, key_list: str) -> bool:
    return key_list.removeprefix("vae_").startswith(family.id)


# Files


def test_every_family_is_in_the_suite() -> None:
    assert TINY.keys() >= families().keys()
    for family in FAMILIES:
        assert TINY[family.id].vaes.keys() == {vae.id for vae in family.vaes}
        assert {item.variant for item in TINY[family.id].published} <= {variant.id for variant in family.variants}


def test_ids_are_of_one_family_each() -> None:
    ids = [variant.id for _, variant in VARIANTS]
    assert len(set(ids)) == len(ids)
    assert len({vae.id for _, vae in VAES}) == len(VAES)


@of_every_published
def test_detection_and_the_whole_config(tmp_path: Path, family: Family, published: Published) -> None:
    path = write_header_only(tmp_path / published.file_name, entries(shapes_of(published.keys), torch.bfloat16), published.metadata)
    checkpoint = Checkpoint.open(path)
    detection = detect(checkpoint)
    assert (detection.family, detection.variant.id) == (family, published.variant)
    defaults = class_defaults(family)
    assert as_json(defaults | dict(detection.config)) == as_json(defaults | published.config)
    assert _places(checkpoint, family.keys, family.build(detection.config)), "every tensor has its place, and no other"


def as_json(config: Mapping[str, Any]) -> Any:
    """Lists and tuples alike."""
    return json.loads(json.dumps(config))


@of_every_vae
def test_every_tensor_of_the_vae_has_its_place(headers: Mapping[str, Path], family: Family, vae: Vae) -> None:
    checkpoint = Checkpoint.open(headers[TINY[family.id].vaes[vae.id][0]], "vae")
    found = detect_vae(checkpoint, family, to_encode=True)
    assert found.vae is vae
    assert _places(checkpoint, vae.keys, family.build_vae(found))


@of_every_family
def test_other_models_are_not_taken_for_its_own(headers: Mapping[str, Path], family: Family) -> None:
    for name in KEY_LISTS:
        if not is_of(family, name):
            assert family.detect(Checkpoint.open(headers[name])) is None, name
            assert family.detect_vae(Checkpoint.open(headers[name], "vae")) is None, name


@of_every_family
def test_files_of_other_families_are_refused_by_name(headers: Mapping[str, Path], family: Family) -> None:
    for other in FAMILIES:
        if other is family:
            continue
        model = headers[TINY[other.id].published[0].keys]
        with pytest.raises(CheckpointError, match=r"variant is .*; .* can only be .*\. Leave the variant out or use one of these"):
            detect(Checkpoint.open(model), family.variants[0].id)
        for vae in other.vaes:
            checkpoint = Checkpoint.open(headers[TINY[other.id].vaes[vae.id][0]], "vae")
            with pytest.raises(CheckpointError, match=rf"is the {re.escape(vae.title)}; {family.title} needs its own VAE\. Give "):
                detect_vae(checkpoint, family)


@of_every_variant
def test_a_transformer_goes_to_diffusers_and_back_in_the_same_bytes(tmp_path: Path, family: Family, variant: Variant) -> None:
    path = write_native(tmp_path / "model.safetensors", family, variant)
    detection = Detection(family, (variant,), tiny_config(family, variant))
    back = native_state(load_transformer(Checkpoint.open(path), detection, "cpu", torch.float32).state_dict(), family.keys)
    assert_same_bytes(back, load_file(path))


@of_every_vae
def test_a_vae_goes_to_diffusers_and_back_in_the_same_bytes(tmp_path: Path, family: Family, vae: Vae) -> None:
    path = write_native_vae(tmp_path / "vae.safetensors", family, vae)
    detection = VaeDetection(family, vae, TINY[family.id].vaes[vae.id][1])
    back = native_state(load_vae(Checkpoint.open(path, "vae"), detection, "cpu").state_dict(), vae.keys)
    assert_same_bytes(back, load_file(path))


def assert_same_bytes(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    different = [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)]
    assert different == []


# Sizes


@of_every_variant
def test_sizes_that_are_not_allowed_have_a_value_a_rule_and_a_remedy(family: Family, variant: Variant) -> None:
    latent = family.latent(variant)
    stride, step = latent.temporal_stride, latent.spatial_step
    frames, height = latent.problems(80, 10 * step + 1, 10 * step)
    low = 79 // stride * stride + 1
    assert str(frames) == f"num_frames is 80; this model needs {stride}n+1. Use {low} or {low + stride}."
    assert str(height) == f"height is {10 * step + 1}; this model needs multiples of {step} pixels. Use {10 * step} or {11 * step}."
    assert latent.problems(low, 10 * step, 10 * step) == []
    assert latent.shape(low, 10 * step, step)[:2] == (latent.channels, 79 // stride + 1)


# What the model gets and gives


class Question:
    """Two clips at two noise levels with captions of two lengths; the first keeps its first frame, where it can."""

    def __init__(self, family: Family, variant: Variant) -> None:
        rule = family.first_frame(variant)
        self.keep = [True, rule is not None and rule.always]
        self.clean, self.noise = (tiny_latents(family, variant, 2, seed) for seed in (0, 1))
        self.sigma_B = torch.tensor([0.25, 0.9])
        self.noisy = noised(self.clean, self.noise, self.sigma_B)
        self.conditions = tiny_conditions(family, variant, self.clean, self.keep)
        self.inputs = family.prepare(variant, self.noisy, self.sigma_B, self.conditions)
        self.text = family.collate_text([tiny_text(family, 3), tiny_text(family, 5, seed=1)], CPU, torch.float32)

    def loss(self, family: Family, transformer: torch.nn.Module) -> torch.Tensor:
        velocity = family.predict(transformer, self.inputs, self.text)
        assert velocity.shape == self.clean.shape
        assert velocity.dtype == torch.float32
        return velocity_loss(velocity, self.noise - self.clean, self.inputs.loss_mask)


@of_every_variant
def test_ten_steps_lower_the_loss(family: Family, variant: Variant) -> None:
    transformer, question = tiny_transformer_of(family, variant).requires_grad_(True), Question(family, variant)
    optimizer = torch.optim.AdamW(transformer.parameters(), lr=2e-3)
    losses = []
    for _ in range(10):
        loss = question.loss(family, transformer)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


@of_every_variant
def test_given_frames_are_clean_and_nothing_is_predicted_there(family: Family, variant: Variant) -> None:
    question, channels = Question(family, variant), family.latent(variant).channels
    latents, mask = question.inputs.latents_BCFHW, question.inputs.loss_mask
    if family.first_frame(variant) is None:
        assert mask is None
        assert torch.equal(latents, question.noisy)
    elif mask is None:
        assert torch.equal(latents[:, :channels], question.noisy), "given beside the noise: everything is predicted"
        first = question.clean[:, :, 0]
        assert any(torch.equal(latents[:, start : start + channels, 0], first) for start in range(channels, latents.shape[1]))
    else:
        given_BF = torch.zeros(2, latents.shape[2], dtype=torch.bool)
        given_BF[:, 0] = torch.tensor(question.keep)
        given = given_BF[:, None, :, None, None].expand_as(latents)
        assert torch.equal(mask.expand_as(latents).bool(), ~given)
        assert torch.equal(latents, torch.where(given, question.clean, question.noisy))


@of_every_variant
def test_without_a_first_frame_everything_is_predicted(family: Family, variant: Variant) -> None:
    rule = family.first_frame(variant)
    if rule is not None and rule.always:
        assert family.required(variant) > {"latents"}, "it must be given what it always needs"
        return
    question = Question(family, variant)
    inputs = family.prepare(variant, question.noisy, question.sigma_B, Conditions())
    assert torch.equal(inputs.latents_BCFHW, question.noisy)
    assert inputs.loss_mask is None or bool(inputs.loss_mask.bool().all())


@of_every_family
def test_text_is_collated_to_one_shape(family: Family) -> None:
    records = [tiny_text(family, length, seed=length) for length in (1, 7, 4)]
    batch = family.collate_text(records, CPU, torch.bfloat16)
    count, rows, width = batch.embeds_BLD.shape
    assert (count, width, batch.embeds_BLD.dtype) == (3, TINY[family.id].text_dim, torch.bfloat16)
    assert rows >= 7
    for row, record in zip(batch.embeds_BLD, records, strict=True):
        length = len(record.embeds_LD)
        assert torch.equal(row[:length], record.embeds_LD.to(torch.bfloat16))
        assert not row[length:].any()
    assert batch.mask_BL is None or batch.mask_BL.sum(dim=1).tolist() == [1, 7, 4]
    assert (batch.pooled_BD is None) == (TINY[family.id].pooled_dim is None)


# LoRA


@of_every_variant
def test_targets_are_linears_of_the_blocks(family: Family, variant: Variant) -> None:
    transformer = family.build(tiny_config(family, variant))
    assert all(len(transformer.get_submodule(block)) for block in family.blocks)
    starts = tuple(f"{block}." for block in family.blocks)
    patterns = family.targets.attention + family.targets.feed_forward
    linears = [name for name, module in transformer.named_modules() if isinstance(module, torch.nn.Linear)]
    for pattern in patterns:
        found = [name for name in linears if re.fullmatch(pattern, name)]
        assert found, pattern
        assert all(name.startswith(starts) for name in found), pattern
    inside = {name for name, _ in inject_names(transformer, family)}
    assert inside == {name for name in linears if any(re.fullmatch(pattern, name) for pattern in patterns)}


def inject_names(transformer: torch.nn.Module, family: Family) -> Iterator[tuple[str, LoraPair]]:
    inject(transformer, family, SPEC, seed=0)
    yield from adapter_state(transformer, SPEC).modules.items()


@pytest.mark.parametrize("form", ["native", "diffusers", "kohya"])
@of_every_variant
def test_a_lora_is_read_as_it_was_written(tmp_path: Path, family: Family, variant: Variant, form: Form) -> None:
    chance = torch.Generator().manual_seed(0)
    transformer = family.build(tiny_config(family, variant))
    modules = {
        name: LoraPair(pair.down_RI, torch.randn(pair.up_OR.shape, generator=chance), pair.alpha)
        for name, pair in inject_names(transformer, family)
    }
    write_lora(tmp_path / "lora.safetensors", Adapter(modules), family, form)
    back = read_lora(tmp_path / "lora.safetensors").modules
    assert back.keys() == modules.keys()
    for name, pair in modules.items():
        assert torch.equal(back[name].down_RI, pair.down_RI), name
        assert torch.equal(back[name].up_OR * back[name].scale, pair.up_OR * pair.scale), name


@of_every_variant
def test_every_parameter_of_the_lora_learns_something_finite(family: Family, variant: Variant) -> None:
    transformer = tiny_transformer_of(family, variant)
    parameters = inject(transformer, family, SPEC, seed=0)
    Question(family, variant).loss(family, transformer).backward()
    assert all(parameter.grad is not None and bool(parameter.grad.isfinite().all()) for parameter in parameters)
    learning = [bool(parameter.grad.any()) for parameter in parameters[1::2]]  # of A nothing flows back yet: B is 0
    assert sum(learning) > 0.8 * len(learning)


# Runs


def run_of(folder: Path, family: Family, variant: Variant) -> Run:
    return Run.create(tiny_job_of(folder, family, variant, checkpoints={"every_steps": 10}))


def stop_after(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next training is asked to stop when it has measured that step."""
    from trainers import trainer

    report = trainer.report

    def report_and_stop(training: Any, metrics: dict[str, float]) -> None:
        report(training, metrics)
        if training.step == step:
            training.run.request("stop")

    monkeypatch.setattr(trainer, "report", report_and_stop)


@of_every_variant
def test_a_run_that_was_stopped_and_resumed_is_the_straight_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: Family, variant: Variant
) -> None:
    """The file of a variant that only its size tells is taken for it here: detection is tested above."""
    whole = Detection(family, (variant,), tiny_config(family, variant))
    monkeypatch.setattr(family, "detect", lambda checkpoint: whole, raising=True)
    straight, resumed = (run_of(tmp_path / name, family, variant) for name in ("straight", "resumed"))
    assert train(straight) == "done"
    with monkeypatch.context() as patch:
        stop_after(2, patch)
        assert train(resumed) == "stopped"
    resumed.clear("stop")
    assert resumed.latest_checkpoint() == 2
    assert train(resumed) == "done"
    files = [sorted(Path(run.job.loras_folder).rglob("*-000004.safetensors")) for run in (straight, resumed)]
    assert [len(found) for found in files] == [1, 1]
    assert_same_bytes(load_file(files[1][0]), load_file(files[0][0]))
    assert any(bool(tensor.any()) for name, tensor in load_file(files[0][0]).items() if "lora_B" in name)
