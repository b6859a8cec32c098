"""However the blocks of a model are kept, its gradients are the same bits."""

from __future__ import annotations

import dataclasses

import pytest
import tiny_families
import torch
from adversary import Adversary
from closeness import assert_same
from tiny_families import TINY, of_every_kind_of_block, tiny_job_of
from torch.utils.flop_counter import FlopCounterMode

from trainers import residency as residency_module
from trainers.checkpoint import Checkpoint
from trainers.family import detect, families
from trainers.offload.arrangement import Arrangement
from trainers.offload.layout import frozen_linears
from trainers.offload.linear import FrozenLinear
from trainers.predict import batch_loss
from trainers.residency import Residency, blocks_of, tighter
from trainers.run import Run
from trainers.training import Training, open_training

WAYS = {
    "streamed": {"stream": "always"},
    "streamed and pinned, inputs in the arena": {"stream": "always", "host": "pinned", "activations": "host"},
}


@pytest.fixture(autouse=True)
def everything_is_worth_copying(monkeypatch):
    monkeypatch.setattr("trainers.offload.blocks._WORTH_COPYING_BYTES", 0)


@pytest.fixture
def deeper(monkeypatch):
    """Tiny models of enough blocks for a ring."""
    shallow = tiny_families.tiny_config
    monkeypatch.setattr(tiny_families, "tiny_config", lambda family, variant: {**shallow(family, variant), "num_layers": 3})


def opened(folder, family, variant, **fields) -> Training:
    fields = {"lora": {"rank": 2, "dropout": 0.25}, "gradient_checkpointing": "memory" in fields, **fields}
    job = tiny_job_of(folder, family, variant, **fields)
    if variant in detect(Checkpoint.open(job.base.transformer)).variants:  # a tiny model cannot be told by its size
        job = job.model_copy(update={"base": job.base.model_copy(update={"variant": variant.id})})
    return open_training(Run.create(job))


def gradients(training: Training, steps: int = 2) -> list[torch.Tensor]:
    """Of the LoRA, after some forward and backward passes; B is not zero, so that A has gradients too."""
    chance = torch.Generator().manual_seed(1)
    training.step = 1
    learner, _ = training.take_turn()
    with torch.no_grad():
        for parameter in learner.parameters:
            parameter.add_(torch.randn(parameter.shape, generator=chance) / 10)
    for step in range(1, steps + 1):
        for micro in training.samples.order.step(step):
            torch.manual_seed(step)
            batch = training.samples.batch(step, micro, learner.sigmas)
            batch_loss(training.family, training.variant, learner.transformer, batch).backward()
    return [parameter.grad for parameter in learner.parameters]


@of_every_kind_of_block
def test_offloaded_gradients_are_resident_gradients_bit_for_bit(tmp_path, deeper, monkeypatch, family, variant):
    """All blocks through two slots, then one block resident and the rest through two; copies are as late as they may be."""
    wanted = gradients(opened(tmp_path / "resident", family, variant))
    assert sum(gradient.abs().sum() > 0 for gradient in wanted) > 0.9 * len(wanted)
    monkeypatch.setattr(residency_module, "copies_of", lambda device: Adversary())
    for way, memory in WAYS.items():
        training = opened(tmp_path / way, family, variant, memory=memory)
        residency = training.learners[0].residency
        blocks = len(residency.block_bytes)
        assert (residency.placement.slots, len(residency.placement.streamed)) == (2, blocks)
        for found, like in zip(gradients(training), wanted, strict=True):
            assert_same(found, like)
        assert residency.stream.bytes_to_device > 0
        residency.stream.close()
    training = opened(tmp_path / "partly", family, variant, memory=memory)
    residency = training.learners[0].residency
    residency.rearrange(dataclasses.replace(residency.arrangement, weights_bytes=sum(residency.block_bytes) - 1))
    if blocks > 3:
        assert 2 < len(residency.placement.streamed) < blocks
    for found, like in zip(gradients(training), wanted, strict=True):
        assert_same(found, like)
    residency.leave()


@of_every_kind_of_block
def test_what_a_block_ends_with_is_not_computed_again(tmp_path, monkeypatch, family, variant):
    """The products alone: what is trained beside them is the same bits."""
    found, flops = [], []
    for where in ("as it is", "without"):
        training = opened(tmp_path / where, family, variant, memory={"stream": "always"})
        with FlopCounterMode(display=False) as counter:
            found.append(gradients(training, steps=1))
        flops.append(counter.get_total_flops())
        monkeypatch.setattr("trainers.residency.rest_at_ends", lambda *given: None)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    ends = any(forward.ends for forward in family.chunked)
    assert flops[0] < flops[1] if ends else flops[0] == flops[1]


def test_every_step_copies_each_streamed_block_once_each_way(tmp_path, deeper):
    family = families()["hunyuan"]
    training = opened(tmp_path, family, family.variants[0], memory={"stream": "always"}, batch_size=1)
    residency = training.learners[0].residency
    gradients(training, steps=1)
    sizes, before = residency.block_bytes, residency.stream.bytes_to_device
    assert len(set(sizes)) == 2, "double and single blocks"
    gradients(training, steps=1)
    assert residency.placement.slots == 2
    assert residency.stream.bytes_to_device - before == sum(sizes[2:]) + sum(sizes[:-2])


def test_more_budget_is_less_copied(tmp_path, deeper):
    family = families()["wan"]
    training = opened(tmp_path, family, family.variants[0], memory={"stream": "always"})
    residency, wanted, copied = training.learners[0].residency, None, []
    for share in (1, 2, 3):
        residency.rearrange(dataclasses.replace(residency.arrangement, weights_bytes=share * max(residency.block_bytes)))
        for parameter in training.learners[0].parameters:
            torch.nn.init.constant_(parameter, 0.01)
            parameter.grad = None
        found = gradients(training, steps=1)
        wanted = wanted or found
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
        copied.append(residency.stream.bytes_to_device if residency.stream else 0)
    assert copied[0] > copied[1] > copied[2] == 0, "through one slot, through two, resident"


def test_lora_parameters_and_optimizer_never_move(tmp_path, deeper):
    family = families()["wan"]
    training = opened(tmp_path, family, family.variants[0], memory={"stream": "always"})
    learner, before = training.learners[0], [parameter.data_ptr() for parameter in training.learners[0].parameters]
    gradients(training)
    learner.residency.rearrange(Arrangement())
    gradients(training)
    learner.residency.leave()
    assert [parameter.data_ptr() for parameter in learner.parameters] == before


class OneBlock(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList([torch.nn.Sequential(FrozenLinear(torch.ones(2, 2), torch.ones(2), torch.ones(2, 1)))])
        self.norm = torch.nn.LayerNorm(2).requires_grad_(False)
        self.lora = torch.nn.Parameter(torch.ones(1))


def test_frozen_weights_move_and_come_back_uncopied():
    """On a meta device, which has no memory: what comes back is the very tensors."""
    transformer, family = OneBlock(), families()["wan"]
    (linear,) = frozen_linears(transformer)
    before = [linear.weight.data_ptr(), linear.scale.data_ptr(), linear.bias.data_ptr(), transformer.norm.weight.data_ptr()]
    residency = Residency(transformer, family, torch.device("meta"), Arrangement())
    trained = transformer.lora
    residency.enter()
    assert all(tensor.is_meta for tensor in (linear.weight, linear.scale, linear.bias, transformer.norm.weight))
    assert transformer.lora is trained
    assert not trained.is_meta
    residency.leave()
    assert before == [linear.weight.data_ptr(), linear.scale.data_ptr(), linear.bias.data_ptr(), transformer.norm.weight.data_ptr()]


def test_blocks_in_the_order_they_run():
    family = families()["hunyuan"]
    transformer = tiny_families.tiny_transformer_of(family, family.variants[0])
    assert blocks_of(transformer, family) == [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
    assert set(TINY) == set(families())


def test_tighter_and_tighter_until_there_is_nothing_left():
    arrangement, sizes, seen = Arrangement(checkpointing=False), [10] * 40, []
    while arrangement is not None:
        seen.append(arrangement)
        arrangement = tighter(arrangement, sizes)
    assert seen[1] == Arrangement()
    assert seen[2].activations == "host"
    budgets = [found.weights_bytes for found in seen if found.weights_bytes is not None and found.chunks == 1]
    assert budgets == sorted(set(budgets), reverse=True)
    assert budgets[0] <= 370
    assert budgets[-1] == 10
    assert [found.chunks for found in seen[-4:]] == [2, 4, 8, 16]
    assert len(seen) < 25
