from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from trainers.adapter import Adapter, LoraPair
from trainers.errors import LoraError
from trainers.family import LoraTargets
from trainers.job import LoraSpec
from trainers.lora import MasterLinear, adapter_state, inject, load_adapter_state, set_enabled, without_lora
from trainers.offload.linear import FrozenLinear

FAMILY: Any = SimpleNamespace(
    title="Small",
    targets=LoraTargets(attention=(r"blocks\.\d+\.attn1\.to_[qkv]",), feed_forward=(r"blocks\.\d+\.ffn\.net\.2",)),
)
SPEC = LoraSpec(rank=4, alpha=2.0)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn1 = nn.ModuleDict({name: nn.Linear(8, 8) for name in ("to_q", "to_k", "to_v", "to_out")})
        self.ffn = nn.Module()
        self.ffn.net = nn.ModuleList([nn.Linear(8, 16), nn.Identity(), nn.Linear(16, 8)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for name in ("to_q", "to_k", "to_v", "to_out"):
            x = x + self.attn1[name](x)
        for layer in self.ffn.net:
            x = layer(x)
        return x


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.to_q = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        out: torch.Tensor = self.to_q(x)
        return out


@pytest.fixture(autouse=True)
def _one_seed() -> None:
    torch.manual_seed(7)


def _stir(parameters: list[nn.Parameter]) -> None:
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(torch.randn_like(parameter))


def test_only_the_targets_get_a_lora_and_only_it_is_trained() -> None:
    model = Small()
    parameters = inject(model, FAMILY, SPEC, seed=0)
    assert sorted(adapter_state(model, SPEC).modules) == sorted(
        [f"blocks.{i}.attn1.to_{letter}" for i in range(2) for letter in "qkv"] + [f"blocks.{i}.ffn.net.2" for i in range(2)]
    )
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in parameters}
    assert len(parameters) == 16


def test_attention_alone_can_be_the_target() -> None:
    model = Small()
    inject(model, FAMILY, LoraSpec(rank=2, targets="attention"), seed=0)
    assert len(adapter_state(model, SPEC).modules) == 6


def test_a_fresh_lora_changes_nothing() -> None:
    model, x = Small(), torch.randn(3, 8)
    before = model(x)
    inject(model, FAMILY, SPEC, seed=0)
    assert torch.equal(model(x), before)


def test_the_branch_is_scaled_by_alpha_over_rank() -> None:
    model, x = Small(), torch.randn(3, 8)
    _stir(inject(model, FAMILY, SPEC, seed=0))
    pair = adapter_state(model, SPEC).modules["blocks.1.attn1.to_q"]
    layer: Any = model.get_submodule("blocks.1.attn1.to_q")
    expected = F.linear(x, layer.base_layer.weight + 0.5 * pair.up_OR @ pair.down_RI, layer.base_layer.bias)
    torch.testing.assert_close(layer(x), expected)


def test_the_same_seed_gives_the_same_bits_whatever_else_is_drawn() -> None:
    first, second = Small(), Small()
    inject(first, FAMILY, SPEC, seed=3)
    torch.manual_seed(99)
    inject(second, FAMILY, LoraSpec(rank=4, targets="attention"), seed=3)
    one, two = adapter_state(first, SPEC).modules, adapter_state(second, SPEC).modules
    assert all(torch.equal(one[name].down_RI, two[name].down_RI) for name in two)
    third = Small()
    inject(third, FAMILY, SPEC, seed=4)
    three = adapter_state(third, SPEC).modules
    assert not any(torch.equal(one[name].down_RI, three[name].down_RI) for name in one)
    downs = [pair.down_RI for name, pair in one.items() if "attn1" in name]
    assert not any(torch.equal(downs[0], other) for other in downs[1:])


def test_the_initial_bits_are_these() -> None:
    """Pinned: a run started with one version of this program goes on with the next."""
    model = Small()
    inject(model, FAMILY, SPEC, seed=0)
    down = adapter_state(model, SPEC).modules["blocks.0.attn1.to_q"].down_RI
    assert down.abs().max() <= 8**-0.5
    assert down[0, :3].tolist() == [0.21998311579227448, -0.23535116016864777, 0.14319732785224915]


def test_the_global_generator_is_left_alone() -> None:
    model = Small()
    before = torch.get_rng_state()
    inject(model, FAMILY, SPEC, seed=0)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_masters_are_float32_and_activations_keep_their_dtype(dtype: torch.dtype) -> None:
    model = Small().to(dtype)
    parameters = inject(model, FAMILY, SPEC, seed=0)
    seen: list[torch.dtype] = []
    for module in model.modules():
        if isinstance(module, MasterLinear):
            module.register_forward_hook(lambda _, inputs, output: seen.extend([inputs[0].dtype, output.dtype]))
    model(torch.randn(3, 8, dtype=dtype)).float().square().mean().backward()
    assert set(seen) == {dtype}
    assert len(seen) == 32
    assert all(p.dtype == torch.float32 and p.grad is not None and p.grad.dtype == torch.float32 for p in parameters)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_eight_bit_base_gets_float32_masters(dtype: torch.dtype) -> None:
    model = Small().to(dtype)
    for block in model.blocks:
        for name, linear in list(block.attn1.items()):
            stored = (linear.weight.detach() / 0.01).to(torch.float8_e4m3fn)
            block.attn1[name] = FrozenLinear(stored, linear.bias.detach(), torch.tensor(0.01))
    x = torch.randn(3, 8, dtype=dtype)
    before = model(x)
    parameters = inject(model, FAMILY, SPEC, seed=0)
    assert len(parameters) == 16
    assert {p.dtype for p in parameters} == {torch.float32}
    assert torch.equal(model(x), before)
    model(x).float().square().mean().backward()
    assert all(p.grad is not None for p in parameters)


def test_casting_the_transformer_does_not_reach_the_masters() -> None:
    model = Small()
    parameters = inject(model, FAMILY, SPEC, seed=0)
    before = [parameter.detach().clone() for parameter in parameters]
    model.to(torch.bfloat16).float().half()
    assert next(model.blocks[0].ffn.net[0].parameters()).dtype == torch.float16
    assert all(torch.equal(parameter, old) for parameter, old in zip(parameters, before, strict=True))
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in parameters}


def test_a_base_on_meta_gets_masters_on_the_cpu() -> None:
    with torch.device("meta"):
        model = Small()
    assert {p.device.type for p in inject(model, FAMILY, SPEC, seed=0)} == {"cpu"}


def test_dropout_follows_the_global_generator() -> None:
    model, x = Small(), torch.randn(64, 8)
    _stir(inject(model, FAMILY, LoraSpec(rank=4, dropout=0.5), seed=0))
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(model(x))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])
    model.eval()
    assert torch.equal(model(x), model(x))


@pytest.mark.parametrize("alpha", [None, 2.0, 0.1, 3.3])
def test_a_state_comes_back_bit_for_bit(alpha: float | None) -> None:
    model, other, x = Small(), Small(), torch.randn(3, 8)
    spec = LoraSpec(rank=4, alpha=alpha)
    other.load_state_dict(model.state_dict())
    _stir(inject(model, FAMILY, spec, seed=0))
    state = adapter_state(model, spec)
    inject(other, FAMILY, spec, seed=1)
    load_adapter_state(other, state)
    assert torch.equal(model(x), other(x))


def test_the_state_is_a_copy() -> None:
    model = Small()
    parameters = inject(model, FAMILY, SPEC, seed=0)
    state = adapter_state(model, SPEC)
    before = {name: pair.down_RI.clone() for name, pair in state.modules.items()}
    _stir(parameters)
    assert all(torch.equal(state.modules[name].down_RI, before[name]) for name in before)


def test_another_alpha_keeps_the_effect() -> None:
    model, other, x = Small(), Small(), torch.randn(3, 8)
    other.load_state_dict(model.state_dict())
    _stir(inject(model, FAMILY, SPEC, seed=0))
    inject(other, FAMILY, LoraSpec(rank=4, alpha=8.0), seed=1)
    load_adapter_state(other, adapter_state(model, SPEC))
    torch.testing.assert_close(model(x), other(x))


def test_every_difference_of_a_foreign_state_is_named() -> None:
    model = Small()
    inject(model, FAMILY, SPEC, seed=0)
    state = dict(adapter_state(model, SPEC).modules)
    state["blocks.9.attn1.to_q"] = state.pop("blocks.0.attn1.to_q")
    state["blocks.0.attn1.to_k"] = LoraPair(torch.zeros(8, 8), torch.zeros(8, 8), 8.0)
    with pytest.raises(LoraError) as error:
        load_adapter_state(model, Adapter(state))
    assert re.search(r"lacks blocks\.0\.attn1\.to_q;.*\n.*also has blocks\.9\.attn1\.to_q;.*\n.*to_k.*rank 8.*rank 4", str(error.value))


def test_the_base_alone_answers_within_without_lora() -> None:
    model, x = Small(), torch.randn(3, 8)
    base = model(x)
    parameters = inject(model, FAMILY, SPEC, seed=0)
    _stir(parameters)
    with_lora = model(x)

    def fail_on_the_base() -> None:
        with without_lora(model):
            assert torch.equal(model(x), base)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_on_the_base()
    assert torch.equal(model(x), with_lora)
    assert not torch.equal(with_lora, base)
    assert all(p.requires_grad for p in parameters)
    set_enabled(model, False)
    with without_lora(model):
        pass
    assert torch.equal(model(x), base)


def test_a_second_lora_and_a_model_without_targets_are_refused() -> None:
    model = Small()
    inject(model, FAMILY, SPEC, seed=0)
    with pytest.raises(LoraError, match="has a LoRA already"):
        inject(model, FAMILY, SPEC, seed=0)
    with pytest.raises(LoraError, match="no Linear of Sequential is a target of Small"):
        inject(nn.Sequential(nn.Linear(2, 2)), FAMILY, SPEC, seed=0)
