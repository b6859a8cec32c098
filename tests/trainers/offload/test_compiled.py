"""Blocks with a LoRA over frozen weights, compiled by backends that run the traced graphs as they are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from live_bytes import LiveBytes
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from trainers.masters import MasterLinear
from trainers.offload.blocks import Blocks
from trainers.offload.chunks import ChunkedForward, in_chunks
from trainers.offload.compiled import compiled
from trainers.offload.linear import FrozenLinear
from trainers.quantise import quantised

WIDTH = 64
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # raised inside torch.compile


class FeedForward(nn.Module):
    def __init__(self, chance: torch.Generator, how: Any) -> None:
        super().__init__()
        weights = torch.randn(2, WIDTH, WIDTH, generator=chance) / 8
        bias = torch.randn(WIDTH, generator=chance)
        if how == "fp8 with a number":  # of another value in each Linear
            scale = weights[0].abs().max() / 448
            self.up = FrozenLinear((weights[0] / scale).to(torch.float8_e4m3fn), bias, scale)
        else:
            self.up = quantised(weights[0], bias, how, torch.device("cpu"))
        self.lora = nn.Sequential(*(MasterLinear(torch.randn(shape, generator=chance) / 8) for shape in ((4, WIDTH), (WIDTH, 4))))

    def forward(self, x):
        return torch.tanh(self.up(x) + self.lora(x))


class Block(nn.Module):
    def __init__(self, chance: torch.Generator, how: Any) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH).requires_grad_(False)
        self.ff = FeedForward(chance, how)

    def forward(self, x, scale=None):
        return x + self.ff(self.norm(x)) * scale


def blocks_of(how: str, count: int = 4) -> nn.ModuleList:
    chance = torch.Generator().manual_seed(3)
    return nn.ModuleList(Block(chance, how) for _ in range(count))


def linears_of(blocks: nn.Module) -> list[FrozenLinear]:
    return [module for module in blocks.modules() if isinstance(module, FrozenLinear)]


def gradients(blocks: nn.ModuleList, steps: int = 3, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Of the LoRAs, with the stored tensors of every block in other memory at each step."""
    parameters = [parameter for parameter in blocks.parameters() if parameter.requires_grad]
    for step in range(steps):
        for linear in linears_of(blocks):
            linear.bind({name: tensor.clone() for name, tensor in linear.stored_tensors().items()})
        x = torch.randn(2, 6, WIDTH, generator=torch.Generator().manual_seed(step)).to(dtype)
        for block in blocks:
            x = block(x, scale=torch.tensor(0.7, dtype=dtype))
        x.float().square().sum().backward()
    found = [parameter.grad for parameter in parameters if parameter.grad is not None]
    assert len(found) == len(parameters)
    blocks.zero_grad()
    return found


@pytest.fixture(autouse=True)
def nothing_compiled_yet() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(("backend", "how"), [("eager", "fp8 with a number"), ("aot_eager", "fp8"), ("aot_eager", "nf4")])
def test_blocks_of_a_class_share_graphs_and_give_the_same_bits(backend: str, how: str) -> None:
    """Three graphs for four blocks and any step: the first forward, the first block's gradients (its input has none), the others'."""
    blocks = blocks_of(how)
    wrapped = Blocks(list(blocks))
    wanted = gradients(blocks)
    counter = CompileCounterWithBackend(backend)
    wrapped.run_with([compiled(block, counter) for block in blocks])
    found = gradients(blocks)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert counter.frame_count == 3
    with torch._dynamo.config.patch(error_on_recompile=True):
        again = gradients(blocks)
    assert all(torch.equal(a, b) for a, b in zip(again, wanted, strict=True))
    assert counter.frame_count == 3
    assert not torch._dynamo.utils.counters["graph_break"]


def chunked_forward(block: Any, chunks: Any, x: torch.Tensor, scale: Any = None) -> Any:
    def stretch(x: torch.Tensor) -> torch.Tensor:
        return x + block.ff(block.norm(x)) * scale

    return chunks.last(stretch, chunks.linear(lambda x: x * 1, x))


def test_chunks_are_no_reason_to_compile_each_block() -> None:
    blocks = blocks_of("fp8")
    in_chunks(blocks, [ChunkedForward("Block", {"": ("norm", "ff")}, chunked_forward)], 2)
    wrapped = Blocks(list(blocks))
    wanted = gradients(blocks)
    counter = CompileCounterWithBackend("aot_eager")
    wrapped.run_with([compiled(block, counter) for block in blocks])
    assert all(torch.equal(a, b) for a, b in zip(gradients(blocks), wanted, strict=True))
    assert counter.frame_count == 3


def test_the_compiled_graph_keeps_no_dense_weight_for_the_backward_pass() -> None:
    (block,) = blocks_of("fp8", count=1)
    call = compiled(block, "aot_eager")
    x = torch.randn(1, 2, WIDTH, requires_grad=True)
    call(x, scale=torch.tensor(0.7)).sum().backward()
    with LiveBytes() as count:
        output = call(x, scale=torch.tensor(0.7))
    assert count.largest == WIDTH * WIDTH * 4
    assert count.now < count.largest / 2
    output.sum().backward()


def test_without_gradients_an_input_that_would_have_them_is_no_other_case() -> None:
    (block,) = blocks_of("fp8", count=1)
    counter = CompileCounterWithBackend("eager")
    call = compiled(block, counter)
    with torch.no_grad():
        for needs in (False, True):
            call(torch.randn(1, 2, WIDTH, requires_grad=needs), scale=torch.tensor(0.7))
    assert counter.frame_count == 1
