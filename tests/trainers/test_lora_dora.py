"""DoRA: in the model, in files of every form, and in a run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file
from safetensors.torch import save_file as library_save_file
from test_lora import FAMILY, Small
from test_lora_format import FORMS, FUSED, FUSED_NAMES, _adapter, _same
from tiny import TinyShape, as_fp8_scaled, tiny_job

from trainers import lora_keys
from trainers.adapter import Adapter
from trainers.dora import as_dora, row_lengths, with_lengths
from trainers.errors import JobError, LoraError
from trainers.families.wan import FAMILY as WAN
from trainers.job import LoraSpec
from trainers.lora import adapter_state, base_weights, inject, load_adapter_state, target_pattern, without_lora
from trainers.lora_format import Form, convert, read_lora, write_lora
from trainers.offload.linear import FrozenLinear
from trainers.preflight import check
from trainers.run import Run
from trainers.trainer import train
from trainers.training import lora_path

SPEC = LoraSpec(rank=4, alpha=2.0, dora=True)
SHAPE = TinyShape(layers=1, width=128, ffn=128, height=32, width_pixels=32, num_frames=5, text_dim=64)


@pytest.fixture(autouse=True)
def _one_seed() -> None:
    torch.manual_seed(7)


def _stirred(spec: LoraSpec = SPEC, model: Small | None = None) -> tuple[Small, list[torch.nn.Parameter]]:
    model = model or Small()
    parameters = inject(model, FAMILY, spec, seed=0)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model, parameters


def _as_peft_has_it(model: Small, spec: LoraSpec = SPEC) -> Small:
    """The same DoRA in layers that are peft's own throughout."""
    theirs = Small()
    pattern = target_pattern(FAMILY.targets, spec.targets)
    config = LoraConfig(r=spec.rank, lora_alpha=spec.alpha, lora_dropout=spec.dropout, target_modules=pattern, use_dora=True)
    inject_adapter_in_model(config, theirs)
    assert theirs.load_state_dict(model.state_dict()).missing_keys == []
    return theirs


# In the model


def test_it_begins_at_the_base() -> None:
    model, x = Small(), torch.randn(3, 8)
    expected = model(x)
    parameters = inject(model, FAMILY, SPEC, seed=0)
    assert [tuple(parameter.shape) for parameter in parameters[:3]] == [(4, 8), (8, 4), (8,)]
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_answers_and_gradients_are_peft_s(dropout: float) -> None:
    spec = LoraSpec(rank=4, alpha=2.0, dora=True, dropout=dropout)
    model, _ = _stirred(spec)
    theirs, x = _as_peft_has_it(model, spec), torch.randn(3, 8)
    found = {}
    for name, each in (("ours", model), ("peft's", theirs)):
        torch.manual_seed(3)
        answer = each(x)
        answer.square().sum().backward()
        gradients = {key: parameter.grad for key, parameter in each.named_parameters() if parameter.grad is not None}
        found[name] = {key: gradient for key, gradient in gradients.items() if ".lora_" in key}, answer
    assert found["ours"][0].keys() == found["peft's"][0].keys()
    torch.testing.assert_close(found["ours"][1], found["peft's"][1])
    torch.testing.assert_close(found["ours"][0], found["peft's"][0])


def test_masters_stay_float32_and_a_bf16_model_answers_near_the_float32_one() -> None:
    model, parameters = _stirred()
    x = torch.randn(64, 8)
    expected = model(x)
    with without_lora(model):
        effect = (expected - model(x)).norm()
    model.to(torch.bfloat16)
    assert {parameter.dtype for parameter in parameters} == {torch.float32}
    answer = model(x.bfloat16())
    assert answer.dtype == torch.bfloat16
    assert (answer.float() - expected).norm() < 0.02 * effect


def test_the_adapter_goes_out_and_in() -> None:
    model, _ = _stirred()
    other, x = Small(), torch.randn(3, 8)
    other.load_state_dict({name.replace("base_layer.", ""): t for name, t in model.state_dict().items() if "lora_" not in name})
    inject(other, FAMILY, SPEC, seed=1)
    state = adapter_state(model, SPEC)
    load_adapter_state(other, state)
    assert torch.equal(other(x), model(x))
    load_adapter_state(other, with_lengths(state, "base", base_weights(model)))
    torch.testing.assert_close(other(x), model(x))


def test_a_plain_lora_becomes_a_dora_of_the_same_effect() -> None:
    model, _ = _stirred(LoraSpec(rank=4, alpha=2.0))
    other, x = Small(), torch.randn(3, 8)
    other.load_state_dict({name.replace("base_layer.", ""): t for name, t in model.state_dict().items() if "lora_" not in name})
    inject(other, FAMILY, SPEC, seed=1)
    load_adapter_state(other, adapter_state(model, LoraSpec(rank=4, alpha=2.0)))
    torch.testing.assert_close(other(x), model(x))


def test_what_cannot_be_taken_over_is_told() -> None:
    model, _ = _stirred()
    state = adapter_state(model, SPEC)
    plain = Small()
    inject(plain, FAMILY, LoraSpec(rank=4), seed=0)
    with pytest.raises(LoraError, match=r"is a DoRA; this job trains a plain LoRA. Set `lora.dora` to true"):
        load_adapter_state(plain, state)
    columns = Adapter({name: replace(pair, magnitude=torch.ones(1, pair.down_RI.shape[1])) for name, pair in state.modules.items()})
    columns = Adapter({name: pair for name, pair in columns.modules.items()}, {}, "base")
    with pytest.raises(LoraError, match=r"magnitudes \(1, 8\)"):
        load_adapter_state(model, columns)


def test_a_base_that_is_not_dense_is_refused() -> None:
    model = Small()
    linear = model.blocks[0].attn1["to_q"]
    model.blocks[0].attn1["to_q"] = FrozenLinear(linear.weight.detach().to(torch.float8_e4m3fn), linear.bias.detach())
    with pytest.raises(LoraError, match=r"blocks\.0\.attn1\.to_q are kept as they are stored; DoRA .* must be dense"):
        inject(model, FAMILY, SPEC, seed=0)


# In files


@pytest.fixture
def _two_families(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora_keys, "families", lambda: {"wan": WAN, "fused": FUSED})


def _dora(names: list[str] = FUSED_NAMES, alpha: float = 2.0) -> Adapter:
    """Random, with the magnitudes that ComfyUI reads; every member of a fused tensor has some."""
    names = [*names, "layers.12.attn.to_k"] if names is FUSED_NAMES else names
    plain = _adapter(names, 8, alpha)
    modules = {name: replace(pair, magnitude=1 + torch.rand(pair.up_OR.shape[0], 1)) for name, pair in plain.modules.items()}
    return Adapter(modules, plain.metadata, "base")


def _weights(adapter: Adapter) -> dict[str, torch.Tensor]:
    shapes = {name: (pair.up_OR.shape[0], pair.down_RI.shape[1]) for name, pair in adapter.modules.items()}
    chance = torch.Generator().manual_seed(11)
    return {name: torch.randn(shape, generator=chance) for name, shape in shapes.items()}


def _same_dora(left: Adapter, right: Adapter) -> bool:
    magnitudes = ((pair.magnitude, right.modules[name].magnitude) for name, pair in left.modules.items())
    return _same(left.modules, right.modules) and all(a is not None and b is not None and torch.equal(a, b) for a, b in magnitudes)


@pytest.mark.usefixtures("_two_families")
@pytest.mark.parametrize("form", FORMS)
def test_what_is_written_is_read_bit_for_bit(tmp_path: Path, form: Form) -> None:
    adapter = _dora()
    if form == "diffusers":
        adapter = with_lengths(adapter, "adapted", _weights(adapter).__getitem__)
    write_lora(tmp_path / "a.safetensors", adapter, FUSED, form)
    read = read_lora(tmp_path / "a.safetensors")
    assert _same_dora(read, adapter)
    assert read.lengths == adapter.lengths


@pytest.mark.usefixtures("_two_families")
def test_native_and_kohya_keep_every_byte(tmp_path: Path) -> None:
    write_lora(tmp_path / "native.safetensors", _dora(), FUSED)
    convert(tmp_path / "native.safetensors", tmp_path / "kohya.safetensors", "kohya")
    convert(tmp_path / "kohya.safetensors", tmp_path / "again.safetensors", "native")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "native.safetensors").read_bytes()


@pytest.mark.usefixtures("_two_families")
def test_a_fused_dora_scales_the_rows_of_the_stacked_weight(tmp_path: Path) -> None:
    """The native file, read as ComfyUI reads it, gives each member's rows as the member alone does."""
    adapter = _dora()
    weights = _weights(adapter)
    write_lora(tmp_path / "a.safetensors", adapter, FUSED)
    file = load_file(tmp_path / "a.safetensors")

    def as_comfyui(weight: torch.Tensor, down: torch.Tensor, up: torch.Tensor, magnitude: torch.Tensor) -> torch.Tensor:
        return (weight + up @ down) * (magnitude / weight.norm(dim=1, keepdim=True))

    def member(name: str) -> torch.Tensor:
        pair = adapter.modules[name]
        assert pair.magnitude is not None
        return as_comfyui(weights[name], pair.down_RI, pair.up_OR * pair.scale, pair.magnitude)

    def native(module: str, weight: torch.Tensor) -> torch.Tensor:
        parts = (file[f"diffusion_model.{module}.{part}"] for part in ("lora_A.weight", "lora_B.weight", "dora_scale"))
        return as_comfyui(weight, *parts)

    for module, names in (
        ("double.3.img_attn_qkv", [f"layers.3.attn.to_{letter}" for letter in "qkv"]),
        ("single.0.linear1", [f"single.0.{part}" for part in ("to_q", "to_k", "to_v", "mlp")]),
    ):
        found = native(module, torch.cat([weights[name] for name in names]))
        torch.testing.assert_close(found, torch.cat([member(name) for name in names]))
    swapped = "layers.3.ff.net.0.proj"
    torch.testing.assert_close(native("double.3.img_mlp.w1", weights[swapped].roll(6, 0)), member(swapped).roll(6, 0))


@pytest.mark.usefixtures("_two_families")
def test_what_a_form_cannot_hold_is_refused(tmp_path: Path) -> None:
    adapter = _dora()
    write_lora(tmp_path / "native.safetensors", adapter, FUSED)
    with pytest.raises(LoraError, match=r"diffusers form.*ComfyUI divides rows .*--base FILE"):
        convert(tmp_path / "native.safetensors", tmp_path / "diffusers.safetensors", "diffusers")
    some = {name: replace(pair, magnitude=None) if name.endswith("to_q") else pair for name, pair in adapter.modules.items()}
    with pytest.raises(LoraError, match="magnitudes of some members only"):
        write_lora(tmp_path / "some.safetensors", Adapter(some, {}, "base"), FUSED)
    name = "inner_layers.0.attn1.to_q"
    columns = Adapter({name: replace(adapter.modules[name], magnitude=torch.rand(1, 10))}, {}, "base")
    write_lora(tmp_path / "columns.safetensors", columns, FUSED)
    assert _same_dora(read_lora(tmp_path / "columns.safetensors"), columns)
    with pytest.raises(LoraError, match="those of columns"):
        write_lora(tmp_path / "b.safetensors", replace(columns, lengths="adapted"), FUSED, "diffusers")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["columns.safetensors", "native.safetensors"]


def test_a_folder_of_peft_goes_to_native_and_back_with_the_base(tmp_path: Path) -> None:
    """A PeftModel's own file; `convert` with the base gives what ComfyUI needs, and back the same magnitudes."""
    job = tiny_job(tmp_path, SHAPE)
    names = ["blocks.0.attn1.to_q", "blocks.0.ffn.net.2"]
    base = _diffusers_wan(Path(job.base.transformer))
    weights = {name: base.get_submodule(name).weight.detach().clone() for name in names}
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=names, use_dora=True, init_lora_weights=False))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1 + 0.5 * torch.rand_like(parameter))
    model.save_pretrained(tmp_path / "peft")
    source = tmp_path / "peft" / "adapter_model.safetensors"
    theirs = read_lora(source)
    assert {name: (pair.scale, pair.magnitude is not None and tuple(pair.magnitude.shape)) for name, pair in theirs.modules.items()} == {
        name: (2.0, (128, 1)) for name in names
    }
    with pytest.raises(LoraError, match="--base FILE"):
        convert(source, tmp_path / "no.safetensors", "native")
    convert(source, tmp_path / "native.safetensors", "native", Path(job.base.transformer))
    ours = read_lora(tmp_path / "native.safetensors")
    for name, pair in theirs.modules.items():
        adapted = row_lengths(weights[name], pair.down_RI, pair.up_OR, pair.scale)
        expected = pair.magnitude.squeeze(1) / adapted * weights[name].norm(dim=1)
        torch.testing.assert_close(ours.modules[name].magnitude.squeeze(1), expected)
    convert(tmp_path / "native.safetensors", tmp_path / "back.safetensors", "diffusers", Path(job.base.transformer))
    back = read_lora(tmp_path / "back.safetensors")
    for name, pair in theirs.modules.items():
        torch.testing.assert_close(back.modules[name].magnitude, pair.magnitude, rtol=1e-6, atol=0)
        assert torch.equal(back.modules[name].up_OR, pair.up_OR)
        assert back.modules[name].alpha == pair.alpha


def _diffusers_wan(path: Path) -> Any:
    from trainers.checkpoint import Checkpoint
    from trainers.family import detect
    from trainers.load import load_transformer

    checkpoint = Checkpoint.open(path)
    return load_transformer(checkpoint, detect(checkpoint), "cpu", torch.float32)


def test_diffusers_loads_the_diffusers_form_and_answers_the_same(tmp_path: Path) -> None:
    from diffusers import WanPipeline
    from test_lora_diffusers import _answer, _tiny_wan

    trained = _tiny_wan()
    with torch.no_grad():
        for parameter in inject(trained, WAN, SPEC, seed=0):
            parameter.add_(0.1 * torch.randn_like(parameter))
    write_lora(tmp_path / "a.safetensors", adapter_state(trained, SPEC), WAN, "diffusers")
    pipeline = WanPipeline(tokenizer=None, text_encoder=None, vae=None, scheduler=None, transformer=_tiny_wan())
    pipeline.load_lora_weights(str(tmp_path), weight_name="a.safetensors", local_files_only=True)
    torch.testing.assert_close(_answer(pipeline.transformer), _answer(trained))
    assert (_answer(_tiny_wan()) - _answer(trained)).abs().max() > 0.01


def test_a_plain_lora_has_no_magnitudes_to_convert() -> None:
    plain = _adapter(["blocks.0.attn1.to_q"])
    assert with_lengths(plain, "base", _weights(plain).__getitem__) is plain
    assert as_dora(plain, _weights(plain).__getitem__).is_dora


# In a run


def _job(folder: Path, **fields: Any) -> Any:
    folder.mkdir(exist_ok=True)
    optimizer = {"learning_rate": 1e-2, "weight_decay": 0.1}
    return tiny_job(folder, SHAPE, **{"lora": {"rank": 4, "alpha": 2.0, "dora": True}, "optimizer": optimizer, "steps": 4, **fields})


def test_a_run_trains_it_stops_and_goes_on_exactly(tmp_path: Path) -> None:
    checkpoints = {"every_steps": 2, "keep_last": 3}
    straight = Run.create(_job(tmp_path / "straight", checkpoints=checkpoints))
    assert train(straight) == "done"
    broken = Run.create(_job(tmp_path / "broken", checkpoints=checkpoints))
    assert train(broken) == "done"
    for path in (broken.checkpoint_folder(4), lora_path(broken, 4)):
        path.rename(path.with_name("gone")) if path.is_dir() else path.unlink()
    assert train(Run.open(broken.folder)) == "done"
    files = {name: lora_path(run, 4) for name, run in (("straight", straight), ("broken", broken))}
    assert files["straight"].read_bytes() == files["broken"].read_bytes()
    first, last = load_file(lora_path(straight, 2)), load_file(files["straight"])
    scales = [key for key in last if key.endswith(".dora_scale")]
    assert len(scales) == len(last) / 3 == 10
    assert {last[key].shape for key in scales} == {(128, 1)}
    assert all(not torch.equal(first[key], last[key]) for key in scales)


def test_magnitudes_do_not_decay() -> None:
    from trainers.job import OptimizerSpec
    from trainers.optimizers import build_optimizer

    vector, matrix = (torch.nn.Parameter(torch.ones(shape)) for shape in ((4,), (4, 4)))
    optimizer = build_optimizer(OptimizerSpec(weight_decay=0.5, learning_rate=0.1), [matrix, vector])
    vector.grad, matrix.grad = torch.zeros_like(vector), torch.zeros_like(matrix)
    optimizer.step()
    assert torch.equal(vector, torch.ones(4))
    assert bool((matrix < 1).all())


def test_fp8_is_refused_before_anything_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = _job(tmp_path / "fp8")
    as_fp8_scaled(Path(job.base.transformer))
    monkeypatch.setattr("trainers.training.load_transformer", lambda *_: pytest.fail("loaded"))
    with pytest.raises(JobError) as caught:
        check(job)
    told = str(caught.value)
    assert "stores 10 of the layers it trains as float8_e4m3fn; DoRA measures every row" in told
    assert "Give the bf16 or fp16 file of the model, or set lora.dora to false." in told
    check(job.model_copy(update={"lora": LoraSpec(rank=4)}))


def test_where_a_dora_job_may_begin(tmp_path: Path) -> None:
    run = Run.create(_job(tmp_path / "first"))
    assert train(run) == "done"
    dora = str(lora_path(run, 4))
    plain_job = _job(tmp_path / "second", lora={"rank": 4}, start={"initial_lora": dora})
    with pytest.raises(JobError, match=r"lora\.dora is false"):
        check(plain_job)
    again = Run.create(_job(tmp_path / "third", start={"initial_lora": dora}, steps=1, optimizer={"learning_rate": 1e-9}))
    assert train(again) == "done"
    torch.testing.assert_close(load_file(lora_path(again, 1)), load_file(dora), rtol=1e-5, atol=1e-6)
    extends = _job(tmp_path / "first", lora={"rank": 4, "alpha": 2.0}, start={"extends": "tiny@4"}, steps=8)
    with pytest.raises(JobError, match=r"lora\.dora is False, in tiny it is True"):
        check(extends)


def test_a_lora_of_another_kind_is_no_beginning(tmp_path: Path) -> None:
    stem = "diffusion_model.blocks.0.self_attn.q"
    library_save_file({f"{stem}.lokr_w1": torch.zeros(2, 2), f"{stem}.lokr_w2": torch.zeros(4, 4)}, tmp_path / "lokr.safetensors")
    with pytest.raises(JobError, match=r"lokr\.safetensors is LoKr; a run begins with a plain LoRA or DoRA"):
        check(_job(tmp_path / "job", start={"initial_lora": str(tmp_path / "lokr.safetensors")}))
