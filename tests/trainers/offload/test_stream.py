from __future__ import annotations

import random

import pytest
import torch
from adversary import Adversary, refuse_unfinished
from torch import nn

from trainers.offload.copies import HostCopies
from trainers.offload.host import HostWeights
from trainers.offload.layout import BlockLayout, frozen_linears
from trainers.offload.linear import FrozenLinear
from trainers.offload.pinned import PinnedMemory
from trainers.offload.placement import place
from trainers.offload.stream import Stream

CPU = torch.device("cpu")


def blocks_of(sizes: list[int], dtypes=(torch.float32, torch.float8_e4m3fn, torch.bfloat16)) -> list[nn.Module]:
    """Blocks of two frozen Linears, the second with a scale per row, of given widths."""
    chance = torch.Generator().manual_seed(5)
    made = []
    for index, size in enumerate(sizes):
        stored = [torch.randn(size, 6, generator=chance).to(dtypes[(index + i) % len(dtypes)]) for i in range(2)]
        made.append(nn.Sequential(FrozenLinear(stored[0]), FrozenLinear(stored[1], scale=torch.rand(size, 1, generator=chance))))
    return made


def contents(block: nn.Module) -> list[torch.Tensor]:
    return [tensor.float().clone() for linear in frozen_linears(block) for tensor in linear.stored_tensors().values()]


class Ring:
    """A stream over blocks, and what each must hold when it is fetched."""

    def __init__(self, sizes: list[int], budget: int, host: str, copies) -> None:
        self.blocks = blocks_of(sizes)
        self.wanted = [contents(block) for block in self.blocks]
        self.layouts = [BlockLayout.of(block) for block in self.blocks]
        self.placement = place([layout.nbytes for layout in self.layouts], budget)
        self.copies = copies
        self.weights = HostWeights(PinnedMemory(CPU))
        self.stream = Stream(self.layouts, self.placement, host, copies, CPU, self.weights)

    def compute(self, index: int, way: str) -> None:
        self.stream.fetch(index, way)
        for found, wanted in zip(contents(self.blocks[index]), self.wanted[index], strict=True):
            assert torch.equal(found, wanted)
        if isinstance(self.copies, Adversary) and index in self.placement.streamed:
            for linear in frozen_linears(self.blocks[index]):
                for tensor in linear.stored_tensors().values():
                    self.copies.uses(tensor)

    def step(self) -> None:
        for index in range(len(self.blocks)):
            self.compute(index, "turning")
        for index in reversed(range(len(self.blocks))):
            self.compute(index, "backward")


@pytest.mark.parametrize("host", ["mapped", "pinned"])
@pytest.mark.parametrize("budget", [0, 5000, 9000, 20000])
def test_every_block_is_there_when_it_is_computed(host, budget):
    ring = Ring([40, 40, 20, 40, 40, 20, 40, 30], budget, host, Adversary())
    for _ in range(3):
        ring.step()
    ring.stream.close()


@pytest.mark.parametrize("host", ["mapped", "pinned"])
def test_whatever_the_order_is(host):
    ring, chance = Ring([40, 40, 20, 40, 40, 20, 40, 30], 6000, host, Adversary()), random.Random(7)
    for _ in range(200):
        ring.compute(chance.randrange(8), chance.choice(["forward", "turning", "backward"]))
    ring.stream.close()


@pytest.mark.parametrize("budget", [0, 4096, 12000])
def test_what_a_step_copies(budget):
    """Of n streamed blocks a step copies 2 (n - slots), after the first one, and nothing comes back."""
    ring = Ring([40] * 10, budget, "pinned", HostCopies())
    ring.step()
    before = ring.stream.bytes_to_device
    for _ in range(5):
        ring.step()
    streamed = ring.placement.streamed
    assert streamed
    copied = sum(ring.layouts[index].nbytes for index in streamed[ring.placement.slots :])
    back = sum(ring.layouts[index].nbytes for index in streamed[: len(streamed) - ring.placement.slots])
    assert ring.stream.bytes_to_device - before == 5 * (copied + back)
    assert len(set(layout.nbytes for layout in ring.layouts)) > 1, "unequal blocks"


def test_the_next_block_is_on_its_way_before_it_is_asked_for():
    copies = Adversary()
    ring = Ring([40] * 6, 0, "pinned", copies)
    ring.placement = place([layout.nbytes for layout in ring.layouts], 2 * max(layout.nbytes for layout in ring.layouts))
    assert ring.placement.slots == 2
    ring.stream.close()
    ring.stream = Stream(ring.layouts, ring.placement, "pinned", copies, CPU, ring.weights)
    for index in range(5):
        ring.compute(index, "turning")
        assert ring.stream._slot_of(index + 1) is not None
    for index in reversed(range(1, 6)):
        ring.compute(index, "backward")
        assert ring.stream._slot_of(index - 1) is not None
    ring.compute(0, "backward")
    before = len(copies.copied)
    ring.compute(0, "turning")
    ring.compute(1, "turning")
    assert len(copies.copied) == before + 1, "blocks 0 and 1 are still there from the way back"


def test_a_block_that_was_not_fetched_cannot_be_computed():
    ring = Ring([40] * 6, 0, "pinned", HostCopies())
    ring.compute(0, "turning")
    assert all(tensor.is_meta for linear in frozen_linears(ring.blocks[5]) for tensor in linear.stored_tensors().values())


def test_a_block_that_could_not_be_sent_is_told_and_the_ring_can_be_closed(monkeypatch):
    ring = Ring([40] * 6, 0, "mapped", HostCopies())
    write = BlockLayout.write

    def unreadable(layout: BlockLayout, run: torch.Tensor, *how: bool) -> None:
        if layout is ring.layouts[2]:
            raise OSError("the disk is gone")
        write(layout, run, *how)

    monkeypatch.setattr(BlockLayout, "write", unreadable)
    ring.compute(0, "turning")
    ring.compute(1, "turning")
    with pytest.raises(OSError, match="gone"):
        ring.compute(2, "turning")
    ring.stream.close()
    assert all(torch.equal(a, b) for a, b in zip(contents(ring.blocks[2]), ring.wanted[2], strict=True))
    again = Stream(ring.layouts, ring.placement, "mapped", HostCopies(), CPU, ring.weights)
    for index in (3, 4, 5):
        again.fetch(index, "turning")
        assert all(torch.equal(a, b) for a, b in zip(contents(ring.blocks[index]), ring.wanted[index], strict=True))
    again.close()


def test_closing_gives_the_files_tensors_back():
    ring = Ring([40] * 6, 0, "mapped", Adversary())
    ring.step()
    assert ring.stream.private_bytes == 2 * max(layout.nbytes for layout in ring.layouts)
    ring.stream.close()
    assert ring.stream.private_bytes == 0
    for block, wanted, layout in zip(ring.blocks, ring.wanted, ring.layouts, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(contents(block), wanted, strict=True))
        hosts = {host.data_ptr() for host in layout.hosts}
        assert {t.data_ptr() for linear in frozen_linears(block) for t in linear.stored_tensors().values()} == hosts


def test_the_adversary_sees_a_missing_mark():
    """The queue of the tests is worth something: it refuses a copy over what is computed with."""
    copies, memory, source = Adversary(), torch.zeros(4), torch.ones(4)
    copies.uses(memory)
    with pytest.raises(AssertionError, match="still computed with"):
        copies.copy(memory, source, None)
    copies.wait(copies.copy(memory, source, copies.mark()))
    assert memory.tolist() == [1.0] * 4


def test_the_adversary_is_late():
    copies, memory, source = Adversary(), torch.zeros(4), torch.ones(4)
    end = copies.copy(memory, source, None)
    assert memory.isnan().all()
    copies.wait(end)
    assert memory.tolist() == [1.0] * 4


def test_the_adversary_sees_freed_memory():
    copies, memory, source = Adversary(), torch.zeros(4), torch.ones(4)
    copies.copy(memory, source, None)
    copies.mark()
    del source
    with pytest.raises(AssertionError, match="freed before"):
        copies.mark()


def test_the_adversary_lets_the_host_write_after_finish_only():
    copies, memory, source = Adversary(), torch.zeros(8), torch.ones(8)
    copies.copy(memory[:4], source[:4], None)
    last = copies.copy(memory[4:], source[4:], None)
    copies.wait(last)
    for touched in (memory, source):
        with pytest.raises(AssertionError, match="not finished"):
            refuse_unfinished(touched[:4])
    copies.finish(last)
    refuse_unfinished(memory)
    refuse_unfinished(source)


def test_a_strict_adversary_wants_the_newest_mark():
    copies, memory, source = Adversary(strict=True), torch.zeros(4), torch.ones(4)
    old, new = copies.mark(), copies.mark()
    for mark in (None, old):
        with pytest.raises(AssertionError, match="before its bytes are computed"):
            copies.copy(memory, source, mark)
    copies.copy(memory, source, new)
