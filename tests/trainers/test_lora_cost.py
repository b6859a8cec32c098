"""What an adapter costs beside its Linear: no pass over activations that need not be, none of them in float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_families import tiny_config
from torch.utils._python_dispatch import TorchDispatchMode

from trainers.family import families
from trainers.job import LoraSpec
from trainers.lora import ADAPTER, _layers, inject
from trainers.offload.linear import FrozenLinear

WAN = families()["wan"]
ROWS = 24
"""As many as no width of the tiny model has."""


class Operators(TorchDispatchMode):
    """Notes each operator that makes a tensor with a row for each token: its name and dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, torch.dtype]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if isinstance(result, torch.Tensor) and ROWS in result.shape and name not in ("view", "t", "detach", "_unsafe_view", "expand"):
            self.found.append((name, result.dtype))
        return result


def adapted(alpha: float | None = None, dtype: torch.dtype = torch.bfloat16, frozen: bool = False, dropout: float = 0.0) -> Any:
    """One adapted Linear of a tiny Wan, with a B that is not zero."""
    torch.manual_seed(0)
    transformer = WAN.build(tiny_config(WAN, WAN.variants[0]))
    first = transformer.blocks[0].ffn.net[0]  # type: ignore[union-attr, index]
    base = torch.nn.Linear(first.proj.in_features, first.proj.out_features, dtype=dtype)
    first.proj = FrozenLinear(base.weight.data, base.bias.data) if frozen else base
    inject(transformer, WAN, LoraSpec(rank=4, alpha=alpha, dropout=dropout), seed=0)
    layer = next(layer for name, layer in _layers(transformer) if name == "blocks.0.ffn.net.0.proj")
    torch.nn.init.normal_(layer.lora_B[ADAPTER].weight)
    return layer.train()


def gradients(layer: Any, dtype: torch.dtype, times: int = 1) -> list[torch.Tensor]:
    torch.manual_seed(1)
    input_1ND = torch.randn(1, ROWS, layer.in_features, dtype=dtype, requires_grad=True)
    layer.zero_grad()
    for _ in range(times):
        output_1NO = layer(input_1ND)
        output_1NO.float().square().sum().backward()
    assert input_1ND.grad is not None
    return [output_1NO, input_1ND.grad, layer.lora_A[ADAPTER].weight.grad, layer.lora_B[ADAPTER].weight.grad]


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("alpha", [4.0, 2.0, 16.0])
def test_it_is_peft_s_lora_bit_for_bit_where_the_scale_is_a_power_of_two(alpha: float, dtype: torch.dtype, frozen: bool) -> None:
    ours, theirs = adapted(alpha, dtype, frozen, dropout=0.3), adapted(alpha, dtype, frozen, dropout=0.3)
    del theirs.lora_variant[ADAPTER]
    for found, expected in zip(gradients(ours, dtype, times=2), gradients(theirs, dtype, times=2), strict=True):
        assert torch.equal(found, expected)


def test_any_other_scale_is_peft_s_to_rounding() -> None:
    ours, theirs = adapted(3.0, torch.float32), adapted(3.0, torch.float32)
    del theirs.lora_variant[ADAPTER]
    for found, expected in zip(gradients(ours, torch.float32), gradients(theirs, torch.float32), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


def operators(layer: Any) -> tuple[list[tuple[str, torch.dtype]], list[tuple[str, torch.dtype]]]:
    """Those of the forward pass, and of the backward pass."""
    input_ND = torch.randn(ROWS, layer.in_features, dtype=torch.bfloat16, requires_grad=True)
    with Operators() as forward:
        output_NO = layer(input_ND)
    gradient_NO = torch.ones_like(output_NO)
    with Operators() as backward:
        output_NO.backward(gradient_NO)
    return forward.found, backward.found


def test_three_products_and_one_sum_forward_and_no_activation_in_float32() -> None:
    forward, backward = operators(adapted(alpha=16.0))
    assert [name for name, _ in forward] == ["addmm", "mm", "mm", "add_"]
    assert sorted(name for name, _ in backward) == ["add", "mm", "mm", "mm"]
    assert {dtype for _, dtype in forward + backward} == {torch.bfloat16}


def test_what_it_spares_beside_peft() -> None:
    plain = adapted(alpha=16.0)
    del plain.lora_variant[ADAPTER]
    forward, backward = operators(plain)
    assert [name for name, _ in forward] == ["addmm", "mm", "mm", "mul", "add"]
    assert sorted(name for name, _ in backward) == ["add", "mm", "mm", "mm", "mul"]


def test_gradients_are_float32_and_add_up_in_it() -> None:
    once, often = gradients(adapted(), torch.bfloat16), gradients(adapted(), torch.bfloat16, times=3)
    for one, sum_of_three in zip(once[2:], often[2:], strict=True):
        assert one.dtype == torch.float32
        assert torch.equal(sum_of_three, one + one + one)
