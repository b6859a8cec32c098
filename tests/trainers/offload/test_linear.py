from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence

import pytest
import torch
from pairwise import pairwise
from torch import nn
from torch.utils.checkpoint import checkpoint

from trainers.offload.linear import FrozenLinear
from trainers.offload.packing import Packing, dequantise

STORED = [torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16, torch.float16, torch.float32]
SCALES = {"none": None, "number": torch.tensor(0.0137), "rows": torch.rand(24, 1, generator=torch.Generator().manual_seed(1))}


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pair(stored: torch.dtype, compute: torch.dtype, scale: str = "none", bias: bool = True) -> tuple[FrozenLinear, nn.Linear]:
    """A FrozenLinear and the nn.Linear that holds its dequantised weight in the compute dtype."""
    weight_OI, bias_O = random(24, 40).to(stored), random(24, seed=2).to(compute) if bias else None
    frozen = FrozenLinear(weight_OI, bias_O, SCALES[scale])
    dense = nn.Linear(40, 24, bias=bias, dtype=compute).requires_grad_(False)
    with torch.no_grad():
        dense.weight.copy_(weight_OI.float() if SCALES[scale] is None else weight_OI.float() * SCALES[scale])
        if bias_O is not None:
            dense.bias.copy_(bias_O)
    return frozen, dense


def run(module: nn.Module, input: torch.Tensor, recompute: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and gradient of the input, through something that needs both."""
    input = input.clone().requires_grad_(True)
    output = checkpoint(module, input.sin(), use_reentrant=False) if recompute else module(input.sin())
    output.float().square().sum().backward()
    assert input.grad is not None
    return output.detach(), input.grad


@pairwise("stored, compute, scale, recompute", STORED, [torch.float32, torch.bfloat16, torch.float16], SCALES, [False, True])
def test_output_and_gradient_are_those_of_a_linear_bit_for_bit(
    stored: torch.dtype, compute: torch.dtype, scale: str, recompute: bool
) -> None:
    frozen, dense = pair(stored, compute, scale)
    input = random(2, 5, 40, seed=3).to(compute)
    for ours, theirs in zip(run(frozen, input, recompute), run(dense, input), strict=True):
        assert ours.dtype == theirs.dtype == compute
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(40,), (7, 40), (2, 3, 5, 40)])
def test_any_leading_shape(shape: tuple[int, ...], bias: bool) -> None:
    frozen, dense = pair(torch.float8_e4m3fn, torch.float32, bias=bias)
    for ours, theirs in zip(run(frozen, random(*shape)), run(dense, random(*shape)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_transposed_input_and_gradient() -> None:
    frozen, dense = pair(torch.float16, torch.float32)
    input = random(2, 40, 5).transpose(1, 2)
    for ours, theirs in zip(run(frozen, input), run(dense, input), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_autocast_computes_in_its_dtype() -> None:
    frozen, dense = pair(torch.float8_e4m3fn, torch.float32)
    dense.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        output = frozen(random(3, 40))
    assert output.dtype == torch.bfloat16
    assert torch.equal(output, dense(random(3, 40).bfloat16()))


def test_nothing_is_saved_for_the_backward_pass() -> None:
    frozen, _ = pair(torch.float8_e4m3fn, torch.float32)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        hidden = random(3, 40).requires_grad_(True) * 1.0
        saved.clear()
        output = frozen(hidden)
    alive = weakref.ref(hidden)
    del hidden
    gc.collect()
    assert saved == []
    assert alive() is None
    assert output.requires_grad


def test_the_gradient_reads_the_weight_of_the_moment() -> None:
    """A streamed weight may leave after the forward pass and come back for the backward pass as another tensor."""
    frozen, dense = pair(torch.float8_e4m3fn, torch.float32)
    input = random(3, 40).requires_grad_(True)
    output = frozen(input)
    weight = frozen.weight
    frozen.weight = nn.Parameter(torch.empty(0, 40, dtype=weight.dtype), requires_grad=False)
    frozen.weight = nn.Parameter(weight.clone(), requires_grad=False)
    (gradient,) = torch.autograd.grad(output.sum(), input)
    assert torch.equal(gradient, torch.ones(3, 24) @ dense.weight)


@pytest.mark.parametrize(
    "convert", [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.float(), lambda m: m.to("cpu", torch.float64)]
)
def test_conversions_leave_the_stored_weight(convert: object) -> None:
    frozen, _ = pair(torch.float8_e4m3fn, torch.float32, "rows")
    weight, scale = frozen.weight, frozen.scale
    nn.Sequential(nn.Linear(4, 4), frozen).apply(lambda module: None)
    parent = convert(nn.Sequential(nn.Linear(4, 4), frozen))  # type: ignore[operator]
    assert parent[1].weight is weight
    assert parent[1].scale is scale
    assert parent[1].bias.dtype == parent[0].bias.dtype
    assert [name for name, _ in frozen.named_parameters()] == ["weight", "bias"]


def test_moves_between_devices_in_its_dtype() -> None:
    frozen, _ = pair(torch.float8_e5m2, torch.float32, "rows")
    frozen.to("meta", torch.bfloat16)
    assert (frozen.weight.device.type, frozen.weight.dtype) == ("meta", torch.float8_e5m2)
    assert (frozen.bias.device.type, frozen.bias.dtype) == ("meta", torch.bfloat16)
    frozen.to_empty(device="cpu")
    assert (frozen.weight.device.type, frozen.weight.dtype, frozen.weight.requires_grad) == ("cpu", torch.float8_e5m2, False)
    assert (frozen.scale.device.type, frozen.scale.shape, frozen.scale.dtype) == ("cpu", (24, 1), torch.float32)


def nibbles(tensors: Sequence[torch.Tensor], shape_OI: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """Two weights in a byte, from -8 to 7, and a factor for each row."""
    packed, factor_O1 = tensors
    both = torch.stack([packed >> 4, packed & 15], 1).to(dtype)
    return (both.view(shape_OI) - 8) * factor_O1.to(dtype)


def packed_pair(dtype: torch.dtype = torch.float32) -> tuple[FrozenLinear, nn.Linear]:
    chance = torch.Generator().manual_seed(4)
    tensors = {"weight": torch.randint(0, 256, (24 * 20,), dtype=torch.uint8, generator=chance), "factors": SCALES["rows"]}
    frozen = FrozenLinear.packed(tensors, (24, 40), Packing("nibbles", nibbles), random(24, seed=2).to(dtype))
    dense = nn.Linear(40, 24, dtype=dtype).requires_grad_(False)
    dense.weight.copy_(nibbles(list(tensors.values()), (24, 40), dtype))
    dense.bias.copy_(frozen.bias)
    return frozen, dense


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_a_packed_one_is_its_decoded_linear_bit_for_bit(compute: torch.dtype, recompute: bool) -> None:
    frozen, dense = packed_pair(compute)
    assert (frozen.in_features, frozen.out_features, frozen.weight.dtype) == (40, 24, torch.uint8)
    input = random(2, 5, 40).to(compute)
    for ours, theirs in zip(run(frozen, input, recompute), run(dense, input, recompute), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("scale", SCALES)
def test_stored_tensors_are_the_tensors_themselves(scale: str) -> None:
    frozen, _ = pair(torch.float8_e4m3fn, torch.float32, scale)
    tensors = frozen.stored_tensors()
    assert list(tensors) == (["weight", "scale"] if scale == "rows" else ["weight"])
    assert tensors["weight"].data_ptr() == frozen.weight.data_ptr()
    assert tensors.get("scale") is (SCALES["rows"] if scale == "rows" else None)
    assert list(packed_pair()[0].stored_tensors()) == ["weight", "factors"]


def in_a_slot(frozen: FrozenLinear) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The stored tensors copied into one run of bytes, each at a multiple of 16, and their views there."""
    tensors = frozen.stored_tensors()
    slot, start, views = torch.zeros(8192, dtype=torch.uint8), 16, {}
    for name, tensor in tensors.items():
        views[name] = slot[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        views[name].copy_(tensor)
        start += -(-tensor.nbytes // 16) * 16
    return slot, views


@pytest.mark.parametrize("kind", ["number", "rows", "packed"])
def test_bound_to_views_into_a_slot_it_computes_the_same(kind: str) -> None:
    frozen, dense = packed_pair() if kind == "packed" else pair(torch.float8_e4m3fn, torch.float32, kind)
    expected = run(dense, random(3, 40))
    before = [tensor.data_ptr() for tensor in frozen.stored_tensors().values()]
    _, views = in_a_slot(frozen)
    frozen.bind(views)
    after = frozen.stored_tensors()
    assert [tensor.data_ptr() for tensor in after.values()] == [view.data_ptr() for view in views.values()] != before
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    for ours, theirs in zip(run(frozen, random(3, 40)), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_writes_to_other_parts_of_a_slot_are_no_change_of_the_bound_tensors() -> None:
    """Autograd counts the writes to a tensor and all its views: bound tensors must have counts of their own."""
    frozen, _ = pair(torch.float8_e4m3fn, torch.float32, "rows")
    slot, views = in_a_slot(frozen)
    frozen.bind(views)
    versions = [tensor._version for tensor in (frozen.weight, *frozen.operands())]
    slot[:16].fill_(1)
    assert [tensor._version for tensor in (frozen.weight, *frozen.operands())] == versions


def test_takes_its_tensors_without_a_copy() -> None:
    weight, bias = random(24, 40).half(), random(24)
    frozen = FrozenLinear(weight, bias)
    assert (frozen.weight.data_ptr(), frozen.bias.data_ptr()) == (weight.data_ptr(), bias.data_ptr())
    assert frozen.dense_weight(torch.float16).data_ptr() == weight.data_ptr()
    assert not frozen.weight.requires_grad
    assert not frozen.bias.requires_grad


def test_dequantise_rounds_once() -> None:
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    every = every[~every.float().isnan()].view(1, -1)
    for scale in (1e-4, 0.0137, 1.7):
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            number = float(torch.tensor(scale))
            assert torch.equal(dequantise(every, number, dtype), (every.float() * number).to(dtype))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # raised inside torch.compile
def test_compiles_without_a_break() -> None:
    frozen, _ = pair(torch.float8_e4m3fn, torch.float32, "number")
    compiled = torch.compile(frozen, backend="aot_eager", fullgraph=True)
    input = random(3, 40).requires_grad_(True)
    outputs = compiled(input), frozen(input)
    gradients = [torch.autograd.grad(output.square().sum(), input)[0] for output in outputs]
    assert torch.equal(*outputs)
    assert torch.equal(*gradients)


# As the base of a LoRA


def lora_of(base: nn.Linear, dtype: torch.dtype) -> nn.Module:
    """A LoRA of peft around a base, as float32 masters made the same for every base."""
    from peft import LoraConfig, inject_adapter_in_model

    model = inject_adapter_in_model(LoraConfig(r=4, lora_alpha=8, target_modules=["0"]), nn.Sequential(base))
    for seed, (name, parameter) in enumerate(model.named_parameters()):
        if "lora_" in name:
            parameter.data = random(*parameter.shape, seed=seed).to(dtype)
    return model


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stored", [torch.float8_e4m3fn, torch.float16])
def test_a_lora_on_it_trains_as_on_a_linear(stored: torch.dtype, compute: torch.dtype, recompute: bool) -> None:
    gradients = []
    for base in pair(stored, compute, "number"):
        model = lora_of(base, torch.float32)
        outputs = run(model, random(2, 5, 40).to(compute), recompute)
        lora = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert len(lora) == 2
        assert all(parameter.dtype == parameter.grad.dtype == torch.float32 for parameter in lora.values())
        gradients.append([*outputs, *(parameter.grad for parameter in lora.values())])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*gradients, strict=True))


def test_peft_takes_it_for_a_linear_and_copies_its_dtype() -> None:
    """The trap the docstring names: adapters come out in the base's dtype, so whoever injects makes them float32."""
    from peft import LoraConfig, inject_adapter_in_model

    frozen, _ = pair(torch.float8_e4m3fn, torch.float32)
    model = inject_adapter_in_model(LoraConfig(r=4, target_modules=["0"]), nn.Sequential(frozen))
    assert model[0].base_layer is frozen
    assert model[0].lora_A["default"].weight.dtype == torch.float8_e4m3fn
