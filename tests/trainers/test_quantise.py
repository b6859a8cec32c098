from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from live_bytes import LiveBytes
from tiny import WAN, TinyShape, as_fp8_scaled, tiny_job, write_transformer
from torch import nn

from trainers.checkpoint import Checkpoint
from trainers.errors import JobError
from trainers.family import detect
from trainers.job import Job, LoraSpec, parse_job
from trainers.load import load_transformer
from trainers.lora import inject
from trainers.offload.linear import FrozenLinear
from trainers.preflight import check
from trainers.quantise import Quantise, fp8_by_rows, quantised, stored_nbytes
from trainers.run import Run
from trainers.trainer import train

CPU = torch.device("cpu")
HOW: tuple[Quantise, ...] = ("fp8", "nf4")


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7))


def error(linear: FrozenLinear, weight_OI: torch.Tensor) -> float:
    """Of the weight, relative, by the Frobenius norm."""
    return float((linear.dense_weight(torch.float32) - weight_OI).norm() / weight_OI.norm())


# One weight


@pytest.mark.parametrize(("how", "expected"), [("fp8", 0.0264), ("nf4", 0.0920)])
def test_relative_error_of_normal_weights(how: Quantise, expected: float) -> None:
    weight = normal(512, 1024) * torch.logspace(-3, 0, 512).unsqueeze(1)
    linear = quantised(weight, None, how, CPU)
    errors = [(row - dense).norm() / dense.norm() for row, dense in zip(linear.dense_weight(torch.float32), weight, strict=True)]
    assert float(torch.stack(errors).mean()) == pytest.approx(expected, rel=0.02)
    assert error(linear, weight) == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fp8_uses_the_range_of_each_row(dtype: torch.dtype) -> None:
    weight = (normal(6, 40) * torch.tensor([1e-6, 1e-3, 1.0, 100.0, 0.0, 1.0]).unsqueeze(1)).to(dtype)
    stored, scale = fp8_by_rows(weight)
    assert (stored.dtype, stored.shape, scale.dtype, scale.shape) == (torch.float8_e4m3fn, (6, 40), torch.float32, (6, 1))
    assert bool(stored.float().isfinite().all())
    used = weight.float().abs().amax(1) > 0
    assert torch.equal(stored[used].float().abs().amax(1), torch.full((int(used.sum()),), 448.0))
    assert bool((stored[4].float() == 0).all())
    torch.testing.assert_close(stored.float() * scale, weight.float(), rtol=2**-4, atol=1e-3)


@pytest.mark.parametrize("shape", [(3, 5), (7, 13), (1, 1), (16, 64), (40, 100)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nf4_is_what_bitsandbytes_makes_of_the_whole(shape: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    monkeypatch.setattr("trainers.quantise._AT_ONCE", 128)
    weight = normal(*shape)
    linear = quantised(weight, None, "nf4", CPU)
    packed, state = quantize_4bit(weight, blocksize=64, quant_type="nf4")
    state.dtype = dtype
    assert torch.equal(linear.weight, packed.view(-1))
    assert torch.equal(linear.dense_weight(dtype), dequantize_4bit(packed, state).view(shape))


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("shape", [(24, 40), (3, 5)])
def test_the_stored_bytes_are_those_told_beforehand(how: Quantise, shape: tuple[int, int]) -> None:
    linear = quantised(normal(*shape), None, how, CPU)
    assert sum(tensor.nbytes for tensor in linear.stored_tensors().values()) == stored_nbytes(*shape, how, 2)


@pytest.mark.parametrize("how", HOW)
def test_a_quantised_linear_decodes_on_the_meta_device(how: Quantise) -> None:
    linear = quantised(normal(24, 40), torch.zeros(24), how, CPU).to("meta")
    output = linear(torch.empty(3, 40, dtype=torch.bfloat16, device="meta", requires_grad=True))
    output.sum().backward()
    assert (output.shape, output.dtype, output.is_meta) == ((3, 24), torch.bfloat16, True)


# A transformer


def load(path: Path, how: Quantise, dtype: torch.dtype = torch.float32) -> nn.Module:
    checkpoint = Checkpoint.open(path)
    return load_transformer(checkpoint, detect(checkpoint), "cpu", dtype, quantise=how)


@pytest.fixture(scope="module")
def bf16_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_transformer(tmp_path_factory.mktemp("bf16") / "wan.safetensors", TinyShape(), torch.bfloat16)


@pytest.mark.parametrize("how", HOW)
def test_only_the_linears_of_the_blocks_are_quantised(bf16_file: Path, how: Quantise) -> None:
    dense, module = load(bf16_file, "none"), load(bf16_file, how)
    for name, child in dense.named_modules():
        if isinstance(child, nn.Linear):
            found = module.get_submodule(name)
            if not name.startswith("blocks."):
                assert type(found) is nn.Linear
                continue
            assert isinstance(found, FrozenLinear)
            assert torch.equal(found.dense_weight(torch.float32), quantised(child.weight, None, how, CPU).dense_weight(torch.float32))
    packed = {f"{name}.weight" for name, child in module.named_modules() if isinstance(child, FrozenLinear)}
    assert all(torch.equal(tensor, dense.get_parameter(name)) for name, tensor in module.named_parameters() if name not in packed)
    assert not any(parameter.requires_grad for parameter in module.parameters())


def test_what_is_fp8_in_the_file_stays_so_and_becomes_nf4_when_asked(tmp_path: Path) -> None:
    path = write_transformer(tmp_path / "wan.safetensors", TinyShape())
    as_fp8_scaled(path)
    stored, kept, packed = load(path, "none"), load(path, "fp8"), load(path, "nf4")
    for name, linear in stored.named_modules():
        if isinstance(linear, FrozenLinear):
            same, other = kept.get_submodule(name), packed.get_submodule(name)
            assert isinstance(same, FrozenLinear)
            assert isinstance(other, FrozenLinear)
            assert torch.equal(same.weight.float(), linear.weight.float())
            assert same.scale == linear.scale
            expected = quantised(linear.dense_weight(torch.float32), None, "nf4", CPU)
            assert torch.equal(other.weight, expected.weight)


@pytest.mark.parametrize("how", HOW)
def test_while_loading_one_linear_at_a_time_is_dense(tmp_path: Path, how: Quantise) -> None:
    """Beside what stays, the most at once are four float32 copies of the largest Linear, whatever the number of blocks."""
    shape = TinyShape(layers=12, width=256, ffn=1024)
    path = write_transformer(tmp_path / "wan.safetensors", shape, torch.bfloat16)
    with LiveBytes() as count:
        module = load(path, how, torch.bfloat16)
    linears = [linear for linear in module.modules() if isinstance(linear, FrozenLinear)]
    stays = sum(tensor.nbytes for linear in linears for tensor in linear.stored_tensors().values())
    copies = 4 * max(linear.in_features * linear.out_features for linear in linears) * 4
    dense = sum(linear.in_features * linear.out_features for linear in linears) * 2
    others = sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()) if tensor.dtype.itemsize >= 4)
    assert stays <= count.now <= stays + others + 4096
    assert count.peak - count.now <= copies < dense / 4


def step(module: nn.Module, parameters: list[nn.Parameter]) -> None:
    """One optimizer step over a few tokens, as small as can be beside the weights."""
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    latents_BCFHW, text_BLD = normal(1, 16, 1, 4, 4).bfloat16(), normal(1, 4, 64).bfloat16()
    module(latents_BCFHW, torch.tensor([500.0]), text_BLD).sample.float().square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("how", ["none", *HOW])
def test_a_step_holds_one_dense_weight_at_a_time(tmp_path: Path, how: Quantise) -> None:
    """fp8_scaled as it is stored, and what was quantised while loading: no dense copy outlives its product."""
    path = write_transformer(tmp_path / "wan.safetensors", TinyShape(layers=4, width=512, ffn=1024))
    if how == "none":
        as_fp8_scaled(path)
    module = load(path, how, torch.bfloat16)
    linears = [linear for linear in module.modules() if isinstance(linear, FrozenLinear)]
    largest = 2 * max(linear.in_features * linear.out_features for linear in linears)
    parameters = inject(module, WAN, LoraSpec(rank=1), 0)
    with LiveBytes() as count:
        step(module, parameters)
    assert len(linears) == 4 * 10
    assert count.largest == largest
    assert largest < count.peak < 2 * largest
    assert count.now < 0.1 * largest


# A job


@pytest.mark.parametrize("how", HOW)
def test_a_job_trains_on_quantised_weights(tmp_path: Path, how: Quantise) -> None:
    job = tiny_job(tmp_path, steps=3, memory={"quantise": how}, optimizer={"learning_rate": 1e-2})
    run = Run.create(job)
    assert train(run) == "done"
    assert all(0 < line["loss"] < 10 for line in run.read_metrics())


def refused(job: Job) -> str:
    with pytest.raises(JobError) as caught:
        check(job)
    return str(caught.value)


def changed(job: Job, **fields: object) -> Job:
    return parse_job(job.model_dump(mode="json") | fields)


def test_a_dense_base_is_asked_for_by_dora_and_by_full_training(tmp_path: Path) -> None:
    job = tiny_job(tmp_path, memory={"quantise": "fp8"})
    check(job)
    dora = refused(changed(job, lora={"dora": True}))
    assert "memory.quantise is fp8 and lora.dora is true; DoRA measures every row of the base, so the base must be dense. Use one" in dora
    full = refused(changed(job, method="full"))
    assert "memory.quantise is fp8 and method is full; the weights themselves are trained, so the base must be dense" in full


def test_bitsandbytes_is_asked_for_before_anything_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    job = tiny_job(tmp_path, memory={"quantise": "nf4"})
    told = refused(job)
    assert "memory.quantise is 'nf4'; it needs the package bitsandbytes" in told
    assert "pip install bitsandbytes" in told
    check(changed(job, memory={"quantise": "fp8"}))
