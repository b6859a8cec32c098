"""Blocks of two streams of tokens, a dropout and a LoRA of their own, run in every way: the gradients are those of plain autograd."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
from adversary import Adversary
from torch import nn

from trainers.offload.activations import Arena
from trainers.offload.blocks import Blocks
from trainers.offload.chunks import ChunkedForward, Chunks, in_chunks, rest_at_ends
from trainers.offload.copies import HostCopies
from trainers.offload.host import HostWeights
from trainers.offload.layout import BlockLayout
from trainers.offload.linear import FrozenLinear
from trainers.offload.pinned import PinnedMemory
from trainers.offload.placement import place
from trainers.offload.stream import Stream

CPU = torch.device("cpu")
WIDTH = 8


class Block(nn.Module):
    """Returns both streams, as the double blocks of Hunyuan and Mochi do; `scale` and `flag` are the same for all blocks."""

    def __init__(self, width: int, chance: torch.Generator, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH).requires_grad_(False)
        self.up = FrozenLinear(torch.randn(width, WIDTH, generator=chance) / 3)
        self.down = FrozenLinear(torch.randn(WIDTH, width, generator=chance) / 3)
        self.lora = nn.Parameter(torch.randn(WIDTH, WIDTH, generator=chance) / 3)
        self.dropout = nn.Dropout(dropout)
        self.ff = nn.Sequential(FrozenLinear(torch.randn(WIDTH, WIDTH, generator=chance)), nn.GELU())

    def forward(self, video, text, scale=None, *, flag=None):
        assert flag == "on"
        video = video + self.down(torch.tanh(self.up(self.norm(video)))) + self.dropout(video) @ self.lora
        return self.ff(video) * scale, text + video.mean(1, keepdim=True)


class Model(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        chance = torch.Generator().manual_seed(3)
        self.blocks = nn.ModuleList(Block(width, chance, dropout) for width in (12, 20, 12, 20, 20, 12))

    def forward(self, video, text):
        for block in self.blocks:
            video, text = block(video, text, scale=torch.tensor(0.7), flag="on")
        return video.square().sum() + text.sum()


def gradients(model: Model, steps: int = 2, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    model.to(dtype)
    torch.manual_seed(11)
    chance = torch.Generator().manual_seed(4)
    for _ in range(steps):
        video, text = (torch.randn(2, tokens, WIDTH, generator=chance, dtype=dtype) for tokens in (6, 3))
        loss = model(video, text)
        loss.backward()
    return [loss.detach(), *(block.lora.grad for block in model.blocks)]


def streamed(blocks: Blocks, copies, host="mapped", budget=0, weights=None) -> Stream:
    layouts = [BlockLayout.of(block) for block in blocks.modules]
    weights = weights or HostWeights(PinnedMemory(CPU))
    blocks.stream = Stream(layouts, place([layout.nbytes for layout in layouts], budget), host, copies, CPU, weights)
    return blocks.stream


@pytest.fixture(autouse=True)
def everything_is_worth_copying(monkeypatch):
    monkeypatch.setattr("trainers.offload.blocks._WORTH_COPYING_BYTES", 0)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("how", ["checkpointed", "in the arena", "mapped", "pinned", "some streamed", "all of it"])
def test_gradients_are_those_of_plain_autograd(how, dropout):
    model = Model(dropout)
    wanted = gradients(copy.deepcopy(model))
    blocks, copies = Blocks(list(model.blocks), random=dropout > 0), Adversary()
    if how in ("in the arena", "all of it"):
        blocks.arena = Arena(Adversary(strict=True), CPU)
    if how in ("mapped", "pinned", "some streamed", "all of it"):
        streamed(blocks, copies, "pinned" if how == "pinned" else "mapped", 5000 if how == "some streamed" else 0)
    found = gradients(model)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    if blocks.arena:
        assert blocks.arena.bytes_to_host == blocks.arena.bytes_to_device > 0


def test_what_is_kept_of_a_block_is_its_input():
    model = Model()
    Blocks(list(model.blocks))
    kept = []
    video, text = torch.randn(2, 6, WIDTH), torch.randn(2, 3, WIDTH)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        model.blocks[0](video, text, scale=torch.tensor(0.7), flag="on")
    assert sorted(kept) == sorted([video.shape, text.shape, torch.Size([])])


def test_inputs_that_no_trained_block_made_stay_on_the_device():
    model = Model()
    blocks = Blocks(list(model.blocks), arena=Arena(HostCopies(), CPU))
    gradients(model, steps=1)
    one = 2 * 6 * WIDTH * 4 + 2 * 3 * WIDTH * 4
    assert blocks.arena.bytes_to_host == one * (len(model.blocks) - 2), "all but the first block's, and the last one's"
    assert blocks.arena.private_bytes == one * (len(model.blocks) - 2)


def test_a_broken_off_step_leaves_nothing_behind():
    model = Model()
    wanted = gradients(copy.deepcopy(model))
    blocks = Blocks(list(model.blocks), arena=Arena(Adversary(strict=True), CPU))
    streamed(blocks, Adversary())
    model(torch.randn(2, 6, WIDTH), torch.randn(2, 3, WIDTH))  # no backward pass
    with torch.no_grad():
        model(torch.randn(2, 6, WIDTH), torch.randn(2, 3, WIDTH))
    assert all(torch.equal(a, b) for a, b in zip(gradients(model), wanted, strict=True))


def test_longer_samples_after_shorter_ones():
    model = Model()
    arena = Arena(Adversary(strict=True), CPU)
    Blocks(list(model.blocks), arena=arena)
    for tokens in (4, 9, 2):
        model(torch.randn(1, tokens, WIDTH), torch.randn(1, 3, WIDTH)).backward()
    assert arena.private_bytes == (9 + 3) * WIDTH * 4 * (len(model.blocks) - 2)


def test_without_checkpointing_the_blocks_are_as_they_were():
    model = Model()
    wanted = gradients(copy.deepcopy(model))
    blocks = Blocks(list(model.blocks), checkpointing=False)
    assert all(torch.equal(a, b) for a, b in zip(gradients(model), wanted, strict=True))
    blocks.close()
    assert all("forward" not in block.__dict__ for block in model.blocks)


def test_what_a_block_answers_again_is_dropped_at_once():
    """In the backward pass nobody reads it."""
    alive = []

    class Watched(nn.Module):
        def forward(self, video):
            middle = video * 2
            output = middle.sin()
            if middle.requires_grad:
                last = weakref.ref(output)
                middle.register_hook(lambda _: alive.append(last() is not None))
            return output

    (block,) = Blocks([Watched()]).modules
    block(torch.randn(1, 3, requires_grad=True)).sum().backward()
    assert alive == [False]


def chunked_forward(block, chunks, video, text, scale=None, *, flag=None):
    video = video + block.down(torch.tanh(block.up(block.norm(video)))) + block.dropout(video) @ block.lora
    return chunks.last(lambda tokens, scale: block.ff(tokens) * scale, video, scale.view(1, 1, 1)), text + video.mean(1, keepdim=True)


CHUNKED = ChunkedForward("Block", {"": ("norm", "up", "down", "lora", "dropout", "ff"), "ff": ("0", "1")}, chunked_forward)


def test_chunks_change_rounding_only():
    model, whole = Model(), Model()
    wanted = gradients(whole, dtype=torch.float64)
    in_chunks(model.blocks, [CHUNKED], 4)
    Blocks(list(model.blocks))
    torch.testing.assert_close(gradients(model, dtype=torch.float64), wanted, rtol=1e-11, atol=1e-11)
    in_chunks(model.blocks, [CHUNKED], 1)
    model.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(gradients(model, dtype=torch.float64), wanted, strict=True))


def test_chunks_keep_one_part_at_a_time():
    """The widest tensor of a feed-forward is as long as a part of the sequence, forward and backward."""
    module = nn.Sequential(nn.Linear(4, 64), nn.GELU(), nn.Linear(64, 4))
    longest = []
    module[1].register_forward_hook(lambda _m, _i, output: longest.append(output.shape[1]))
    tokens = torch.randn(1, 12, 4, requires_grad=True)
    Chunks(3)(module, tokens).sum().backward()
    assert longest == [4] * 6
    longest.clear()
    Chunks(3).linear(module, tokens).sum().backward()
    assert longest == [4] * 3


def test_the_last_stretch_is_computed_twice_a_step():
    """Once for what comes after the block, once for its gradients: that is when nobody asks what it gives."""
    block = Chunked(dropout=0.0)
    (wrapped,) = Blocks([block]).modules
    wrapped(torch.randn(1, 12, 4, requires_grad=True)).sum().backward()
    assert block.lengths == [4, 4, 4] * 2


@pytest.mark.parametrize("trained", [False, True])
def test_the_last_stretch_of_a_block_without_trained_weights(trained):
    """Its input may need a gradient, or nothing of it."""
    block = Chunked(dropout=0.0).requires_grad_(False)
    (wrapped,) = Blocks([copy.deepcopy(block)]).modules
    tokens = torch.randn(1, 12, 4)
    ours, theirs = tokens.clone().requires_grad_(trained), tokens.clone().requires_grad_()
    wrapped(ours).sum().backward()
    block(theirs).sum().backward()
    assert torch.equal(ours.grad, theirs.grad) if trained else ours.grad is None


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_the_last_stretch_draws_what_it_drew(dropout):
    found = []
    for wrap in (False, True):
        torch.manual_seed(3)
        block = Chunked(dropout)
        if wrap:
            Blocks([block], random=dropout > 0)
        tokens = torch.randn(1, 12, 4, requires_grad=True)
        torch.manual_seed(4)
        block(tokens).square().sum().backward()
        found.append([tokens.grad, *(parameter.grad for parameter in block.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


class Chunked(nn.Module):
    """In three parts; `lengths` are the tokens of each run of its last stretch."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.ff, self.dropout = nn.Linear(4, 4), nn.Dropout(dropout)
        self.chunks, self.lengths = Chunks(3, dropout > 0, tuple(self.ff.parameters())), []

    def forward(self, tokens):
        return self.chunks.last(self._last, self.chunks(torch.tanh, tokens))

    def _last(self, tokens):
        self.lengths.append(tokens.shape[1])
        return tokens + self.dropout(self.ff(tokens))


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.end = FrozenLinear(torch.randn(4, 4), torch.randn(4))
        self.gate = nn.Parameter(torch.randn(4))

    def forward(self, tokens):
        return tokens + self.gate * self.end(torch.tanh(self.inner(tokens)))


GATED = ChunkedForward("Gated", {"": ("inner", "end", "gate")}, lambda block, chunks, tokens: None, ("end",), ("inner", "end"))


@pytest.mark.parametrize("trained", ["inner.weight", "gate"])
def test_a_product_that_nobody_reads_is_not_computed_unless_a_gate_is_trained(trained):
    block, tokens = Gated(), torch.randn(1, 5, 4)
    for name, parameter in block.named_parameters():
        parameter.requires_grad_(name == trained)
    rest_at_ends(block, [block], [GATED])
    parameter = block.get_parameter(trained)
    (wanted,) = torch.autograd.grad(block(tokens).square().sum(), parameter)
    computed = []
    block.end.register_forward_hook(lambda _m, _i, product: computed.append(product.isfinite().all().item()))
    (wrapped,) = Blocks([block]).modules
    wrapped(tokens).square().sum().backward()
    assert torch.equal(parameter.grad, wanted)
    assert computed == [True, trained == "gate"]


def test_with_something_trained_outside_the_blocks_every_product_is_computed():
    """The time embedding may make gates."""
    model = nn.ModuleList([Gated(), nn.Linear(2, 2)])
    model[0].gate.requires_grad_(False)
    rest_at_ends(model, [model[0]], [GATED])
    assert not model[0].end.ends_block
    model[1].requires_grad_(False)
    rest_at_ends(model, [model[0]], [GATED])
    assert model[0].end.ends_block


def test_a_gate_that_is_trained_in_spite_of_all_is_not_a_number():
    """Rather than wrong."""
    block = Gated()
    block.end.ends_block = True
    (wrapped,) = Blocks([block]).modules
    wrapped(torch.randn(1, 5, 4)).sum().backward()
    assert block.gate.grad.isnan().all()
    assert block.inner.weight.grad.isfinite().all()


@pytest.mark.parametrize(("tokens", "lengths"), [(12, [3, 3, 3, 3]), (9, [3, 3, 3]), (3, [3])])
def test_what_is_the_same_for_all_tokens_goes_with_each_part(tokens, lengths):
    seen = []

    def stretch(video, own, same):
        seen.append((video.shape[1], own.shape[1], same.shape[1]))
        return video * own + same

    video, own, same = torch.randn(2, tokens, 4), torch.randn(2, tokens, 4), torch.randn(2, 1, 4)
    with torch.no_grad():
        assert torch.equal(Chunks(4)(stretch, video, own, same), video * own + same)
    assert seen == [(length, length, 1) for length in lengths]


def test_only_what_was_written_for_a_class_runs_in_its_place():
    blocks = [Model().blocks[0] for _ in range(4)]
    blocks[1].more = nn.Linear(2, 2)
    blocks[2].ff.append(nn.GELU())
    blocks[3].__class__ = type("Block", (Block,), {"forward": lambda self, video, text, more, scale=None: None})
    in_chunks(blocks, [CHUNKED], 2)
    assert [type(block).__name__ for block in blocks] == ["ChunkedBlock", "Block", "Block", "Block"]
