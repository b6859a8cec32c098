"""Host memory as a GPU wants it, and what happens where the system refuses to pin it. CUDA itself is not asked."""

from __future__ import annotations

import copy
import gc
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
from trainers.offload.copies import HostCopies
from trainers.offload.host import HostWeights, master_of
from trainers.offload.layout import BlockLayout
from trainers.offload.pinned import Buffer, PinnedMemory, PinningError
from trainers.predict import batch_loss
from trainers.room import is_out_of_memory
from trainers.run import Run
from trainers.training import open_training

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def everything_is_worth_copying(monkeypatch):
    monkeypatch.setattr("trainers.offload.blocks._WORTH_COPYING_BYTES", 0)


@pytest.fixture
def cuda(monkeypatch):
    """A stand-in for CUDA's registration: refuses pages that are registered, and everything beyond `limit` ranges."""
    ranges: dict[int, int] = {}
    found = SimpleNamespace(ranges=ranges, limit=100, seen=[])

    def register(address: int, nbytes: int, flags: int) -> int:
        assert address % mmap.PAGESIZE == nbytes % mmap.PAGESIZE == 0
        assert flags == 1, "portable, as ComfyUI registers"
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
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    monkeypatch.setattr(pinned, "forget_error", lambda device: None)
    return found


@pytest.fixture
def system(monkeypatch):
    """Pins for the CPU too, as if it were a GPU: `limit` buffers at once. `made` counts all that were pinned."""
    found = SimpleNamespace(limit=100, open=0, made=0)

    def register(pages: torch.Tensor, device: torch.device) -> bool:
        if found.open == found.limit:
            raise PinningError("No more can be pinned.")
        found.open += 1
        found.made += 1
        return True

    def unregister(pages: torch.Tensor) -> None:
        found.open -= 1

    monkeypatch.setattr(pinned, "register", register)
    monkeypatch.setattr(pinned, "unregister", unregister)
    return found


def memory_with_reports(limit_bytes: int | None = None) -> tuple[PinnedMemory, list[str]]:
    reports: list[str] = []
    return PinnedMemory(CPU, limit_bytes, reports.append), reports


def test_whole_pages_that_no_other_buffer_lies_in(cuda):
    sizes = [1, 10, mmap.PAGESIZE, mmap.PAGESIZE + 1, 0, 100_000]
    made = [Buffer(size, GPU) for size in sizes]
    assert [buffer.bytes.numel() for buffer in made] == sizes
    assert cuda.seen == [mmap.PAGESIZE * pages for pages in (1, 1, 1, 2, -(-100_000 // mmap.PAGESIZE))]
    for buffer in made:
        buffer.close()
        assert buffer.bytes.numel() == 0
        buffer.close()
    assert not cuda.ranges


def test_a_refusal_is_no_full_gpu(cuda):
    cuda.limit = 0
    with pytest.raises(PinningError, match=r"does not pin 0\.00 GiB more of host memory \(CUDA error 2\)") as caught:
        Buffer(10, GPU)
    assert not is_out_of_memory(caught.value)


def test_a_buffer_that_nobody_closed_is_unregistered(cuda):
    """An error between making and keeping a buffer left its pages registered after they were freed: the next buffer at such an
    address could not be pinned, and the rest of the run was slow.
    """
    memory = PinnedMemory(GPU)
    with pytest.raises(ZeroDivisionError):
        (memory.buffer(10), memory.buffer(5000), 1 / 0)
    gc.collect()
    assert len(cuda.seen) == 2
    assert not cuda.ranges
    assert memory.used_bytes == 0


def test_no_more_than_the_limit_is_pinned(cuda):
    memory = PinnedMemory(GPU, 3 * mmap.PAGESIZE)
    first = memory.buffer(2 * mmap.PAGESIZE)
    with pytest.raises(PinningError, match="limited to"):
        memory.buffer(2 * mmap.PAGESIZE)
    first.close()
    memory.buffer(2 * mmap.PAGESIZE).close()
    assert memory.used_bytes == 0
    cuda.limit = 0
    with pytest.raises(PinningError, match="CUDA error 2"):
        memory.buffer(1)
    assert memory.used_bytes == 0


@pytest.mark.parametrize("limit", [0, 3])
def test_where_no_more_can_be_pinned_the_arena_goes_on_without(system, limit):
    system.limit = limit
    model = Model()
    wanted = gradients(copy.deepcopy(model))
    memory, reports = memory_with_reports()
    arena = Arena(Adversary(strict=True), CPU, memory)
    Blocks(list(model.blocks), arena=arena)
    found = gradients(model)
    assert [report for report in reports if "Inputs of blocks use memory that is not pinned" in report] == reports
    assert len(reports) == 1
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert system.open == limit
    arena.close()
    assert system.open == 0


@pytest.mark.parametrize("limit", range(9))
def test_a_refusal_half_way_keeps_what_is_pinned(system, limit):
    """All blocks that were pinned already were thrown away, and the whole model came from the file, block after block."""
    system.limit = limit
    model = Model()
    wanted = gradients(copy.deepcopy(model))
    blocks, count = Blocks(list(model.blocks)), len(model.blocks)
    memory, reports = memory_with_reports()
    weights = HostWeights(memory)
    stream = streamed(blocks, Adversary(), "pinned", weights=weights)
    assert stream.pinned_blocks == (count if limit >= count else max(limit - 2, 0)), "two make way for the staging buffers"
    assert all(torch.equal(a, b) for a, b in zip(gradients(model), wanted, strict=True))
    if limit < count:
        assert reports[0].startswith(f"{stream.pinned_blocks} of {count} streamed blocks are pinned. No more can be pinned.")
        assert len(reports) == 1 + (limit < 2), "staging buffers that are not pinned are reported too"
    else:
        assert not reports
    stream.close()
    streamed(blocks, Adversary(), "pinned", weights=weights).close()
    assert len(reports) <= 2, "the next turn reports nothing anew"
    assert system.open <= limit
    weights.close_idle()
    assert system.open == 0


def test_only_as_many_blocks_as_were_planned_are_pinned(system):
    model = Model()
    memory, reports = memory_with_reports()
    weights, layouts = HostWeights(memory), [BlockLayout.of(block) for block in model.blocks]
    most = sum(layout.nbytes for layout in layouts[:3])
    master = master_of("pinned", layouts, range(len(layouts)), HostCopies(), weights, most)
    assert master.pinned_blocks == 3
    assert system.open == 5
    assert not reports
    master.close()
    weights.close_idle()
    assert system.open == 0


@pytest.mark.parametrize("host", ["mapped", "pinned"])
def test_buffers_are_pinned_once_however_often_models_alternate(system, host):
    """Each turn of two experts unregistered, freed, allocated and registered up to 28 GB anew."""
    models, weights = [Model(), Model()], HostWeights(PinnedMemory(CPU))
    blocks = [Blocks(list(model.blocks)) for model in models]
    wanted = [gradients(copy.deepcopy(model)) for model in models]
    for _ in range(3):
        for one, model, expected in zip(blocks, models, wanted, strict=True):
            stream = streamed(one, Adversary(), host, weights=weights)
            model.zero_grad()
            assert all(torch.equal(a, b) for a, b in zip(gradients(model), expected, strict=True))
            stream.close()
    assert system.made == system.open == (len(models[0].blocks) if host == "pinned" else 2)
    weights.close_idle()
    assert system.open == 0


def test_what_is_pinned_already_is_not_read_again(system, monkeypatch):
    """When more or fewer blocks are streamed than before, only blocks that were not streamed are read."""
    model, weights, written = Model(), HostWeights(PinnedMemory(CPU)), []
    layouts = [BlockLayout.of(block) for block in model.blocks]
    write = BlockLayout.write
    monkeypatch.setattr(BlockLayout, "write", lambda layout, *how: written.append(layouts.index(layout)) or write(layout, *how))
    for streamed_blocks, read in (([1, 3], [1, 3]), ([0, 1, 2, 3], [0, 2]), ([1, 2], []), ([0, 1, 2, 3], [])):
        written.clear()
        master_of("pinned", layouts, streamed_blocks, HostCopies(), weights).close()
        assert sorted(written) == read


def test_an_error_while_blocks_are_read_leaves_nothing_pinned(system, monkeypatch):
    model, weights = Model(), HostWeights(PinnedMemory(CPU))
    layouts = [BlockLayout.of(block) for block in model.blocks]
    write = BlockLayout.write

    def unreadable(layout: BlockLayout, *how: object) -> None:
        if layout is layouts[2]:
            raise OSError("the disk is gone")
        write(layout, *how)

    monkeypatch.setattr(BlockLayout, "write", unreadable)
    with pytest.raises(OSError, match="gone"):
        master_of("pinned", layouts, range(len(layouts)), HostCopies(), weights)
    weights.close_idle()
    assert system.open == 0
    monkeypatch.undo()


def test_a_refused_pinned_tensor_stays_as_it_is(monkeypatch):
    """Torch says "CUDA error: out of memory" of pinned memory: the model was shrunk for it until nothing was left to shrink."""
    asked = []

    def refused(tensor: torch.Tensor) -> torch.Tensor:
        asked.append(tensor)
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch.Tensor, "pin_memory", refused)
    monkeypatch.setattr(pinned, "forget_error", lambda device: None)
    memory, reports = memory_with_reports()
    tensor = torch.ones(3)
    assert memory.pinned_tensor(tensor) is memory.pinned_tensor(tensor) is tensor
    assert len(asked) == len(reports) == 1, "it is tried and reported once"
    with pytest.raises(PinningError) as caught:
        pinned.pinned_copy(tensor, CPU)
    assert not is_out_of_memory(caught.value)


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
