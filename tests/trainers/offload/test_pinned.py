"""Host memory as a card wants it, and what happens where the system refuses to pin it. CUDA itself is not asked."""

from __future__ import annotations

import copy
import mmap
from types import SimpleNamespace

import pytest
import torch
from adversary import Adversary
from test_blocks import Model, gradients, streamed
from test_experts import job as job_of_two_experts
from test_experts import two_experts  # noqa: F401 (autouse)
from tiny import TinyShape

from trainers.offload import pinned
from trainers.offload.activations import Arena
from trainers.offload.blocks import Blocks
from trainers.offload.host import MappedMaster
from trainers.offload.pinned import Buffer, PinningError
from trainers.predict import batch_loss
from trainers.room import is_out_of_memory
from trainers.run import Run
from trainers.training import open_training

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def everything_is_worth_copying(monkeypatch):
    monkeypatch.setattr("trainers.offload.blocks._WORTH_COPYING_BYTES", 0)


@pytest.fixture
def card(monkeypatch):
    """A stand-in for CUDA's registration: refuses pages that are registered, and everything beyond `limit` ranges."""
    ranges: dict[int, int] = {}
    found = SimpleNamespace(ranges=ranges, limit=100, seen=[])

    def register(address: int, nbytes: int, flags: int) -> int:
        assert address % mmap.PAGESIZE == nbytes % mmap.PAGESIZE == flags == 0
        assert all(address + nbytes <= start or start + size <= address for start, size in ranges.items()), "registered twice"
        if len(ranges) == found.limit:
            return 2
        ranges[address] = nbytes
        found.seen.append(nbytes)
        return 0

    def unregister(address: int) -> int:
        del ranges[address]
        return 0

    cudart = SimpleNamespace(cudaHostRegister=register, cudaHostUnregister=unregister)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    monkeypatch.setattr(torch.cuda, "check_error", lambda code: None)
    monkeypatch.setattr(pinned, "_forget_error", lambda device: None)
    return found


@pytest.fixture
def refused(monkeypatch):
    """Pins for the CPU too, as if it were a card, `limit` buffers."""
    found = SimpleNamespace(limit=0, open=0)

    def register(pages: torch.Tensor, device: torch.device) -> bool:
        if found.open == found.limit:
            raise PinningError("1 GiB cannot be pinned.")
        found.open += 1
        return True

    def unregister(pages: torch.Tensor) -> None:
        found.open -= 1

    monkeypatch.setattr(pinned, "register", register)
    monkeypatch.setattr(pinned, "unregister", unregister)
    return found


def test_whole_pages_that_no_other_buffer_lies_in(card):
    sizes = [1, 10, mmap.PAGESIZE, mmap.PAGESIZE + 1, 0, 100_000]
    made = [Buffer(size, torch.device("cuda")) for size in sizes]
    assert [buffer.bytes.numel() for buffer in made] == sizes
    assert card.seen == [mmap.PAGESIZE * pages for pages in (1, 1, 1, 2, -(-100_000 // mmap.PAGESIZE))]
    for buffer in made:
        buffer.close()
        assert buffer.bytes.numel() == 0
        buffer.close()
    assert not card.ranges


def test_a_refusal_is_no_full_card(card):
    card.limit = 0
    with pytest.raises(PinningError, match=r"0\.00 GiB more .* \(CUDA error 2\): lower memory\.ram_gib, or set memory\.host") as caught:
        Buffer(10, torch.device("cuda"))
    assert not is_out_of_memory(caught.value)


@pytest.mark.parametrize("limit", [0, 3])
def test_where_no_more_can_be_pinned_the_arena_goes_on_without(refused, limit):
    refused.limit = limit
    model = Model()
    wanted = gradients(copy.deepcopy(model))
    arena = Arena(Adversary(strict=True), CPU)
    Blocks(list(model.blocks), arena=arena)
    with pytest.warns(UserWarning, match="Inputs of blocks wait in memory that is not pinned") as told:
        found = gradients(model)
    assert len(told) == 1
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert refused.open == limit
    arena.close()
    assert refused.open == 0


@pytest.mark.parametrize(("limit", "messages"), [(0, 2), (1, 2), (2, 1)])
def test_where_blocks_cannot_be_pinned_they_stay_mapped(refused, limit, messages):
    """With two buffers allowed the staging is pinned; with fewer it is plain, which is told as well, once however many."""
    refused.limit = limit
    model = Model()
    wanted = gradients(copy.deepcopy(model))
    blocks = Blocks(list(model.blocks))
    with pytest.warns(UserWarning, match="cannot be pinned") as told:
        stream = streamed(blocks, Adversary(), "pinned")
    assert isinstance(stream._master, MappedMaster)
    found = [str(warning.message) for warning in told]
    assert found[0].endswith("Streamed blocks wait in the mapped file.")
    assert len(found) == messages
    assert all(torch.equal(a, b) for a, b in zip(gradients(model), wanted, strict=True))
    stream.close()
    assert refused.open == 0
    streamed(blocks, Adversary(), "pinned").close()  # another turn says nothing: warnings are errors here


def test_experts_share_one_arena(tmp_path, monkeypatch):
    """Host memory for inputs after both experts' turns is what one of them took. Of three blocks, the middle one's leaves."""
    monkeypatch.setattr("test_experts.TinyShape", lambda: TinyShape(layers=3))
    memory = {"activations": "host"}
    training = open_training(Run.create(job_of_two_experts(tmp_path, memory=memory, gradient_checkpointing=True)))
    arenas, taken = {}, []
    for step in (1, 3):
        learner, _ = training.take_turn(step)
        learner.transformer.zero_grad()
        for micro in training.samples.order.step(1):
            batch = training.samples.batch(1, micro, learner.sigmas)
            batch_loss(training.family, training.variant, learner.transformer, batch).backward()
        arenas[id(learner.residency.arena)] = learner.residency.arena
        taken.append(sum(arena.private_bytes for arena in arenas.values()))
    assert training.learners[0] is not training.resident
    assert taken[0] == taken[1] > 0
