"""Batches built ahead are the batches built when they are asked for, and their thread ends with the run."""

from __future__ import annotations

import random
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import TinyShape, tiny_job, write_transformer
from torch.utils._pytree import tree_leaves

from trainers import trainer
from trainers.batches import Batch
from trainers.errors import DatasetError
from trainers.prefetch import Batches
from trainers.run import Run
from trainers.trainer import train
from trainers.training import Training, open_training

SHAPE = TinyShape(layers=1)


def opened(folder: Path, **fields: object) -> Training:
    fields = {"steps": 5, "batch_size": 2, "accumulation": 3, "caption_dropout": 0.5} | fields
    return open_training(Run.create(tiny_job(folder, SHAPE, **fields)))


def tensors(batch: Batch) -> list[torch.Tensor]:
    parts = batch.clean_BCFHW, batch.noise_BCFHW, batch.sigma_B, vars(batch.text), vars(batch.conditions)
    return [leaf for leaf in tree_leaves(parts) if isinstance(leaf, torch.Tensor)]


def assert_same(found: Batch, expected: Batch) -> None:
    assert len(tensors(found)) == len(tensors(expected)) >= 4
    assert all(torch.equal(one, other) for one, other in zip(tensors(found), tensors(expected), strict=True))


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("batches")]


def test_the_batches_of_all_steps_are_those_of_the_order(tmp_path: Path) -> None:
    training = opened(tmp_path, accumulation=4)
    seen = {}
    batches = Batches(training.samples, lambda step: (0.0, 1.0))
    for step in range(1, 6):
        for share in batches.of_step(step):
            assert_same(batches.take(share), training.samples.batch(step, share.micro))
            seen[step, share.index] = share.micro
    assert batches._ahead is None, "nothing comes after the last step"
    batches.close()
    assert seen == {(step, index): micro for step in range(1, 6) for index, micro in enumerate(training.samples.order.step(step))}
    training.batches.close()


def test_each_expert_gets_noise_levels_of_its_own(tmp_path: Path) -> None:
    low = write_transformer(tmp_path / "wan2.2_t2v_low_noise.safetensors", SHAPE)
    job = tiny_job(tmp_path, SHAPE, steps=8, experts={"turn_steps": 2})
    values = job.model_dump(mode="json")
    values["base"] |= {"transformer_low_noise": str(low), "variant": "wan2.2-t2v"}
    training = open_training(Run.create(type(job).model_validate(values)))
    boundary = training.variant.boundary
    assert boundary is not None
    for step in range(1, 9):
        (share,) = training.batches.of_step(step)
        sigma = float(training.batches.take(share).sigma_B)
        assert sigma >= boundary - 0.03 if (step - 1) // 2 % 2 == 0 else sigma <= boundary + 0.03
    training.batches.close()


def test_what_is_asked_for_out_of_turn_is_built_at_once(tmp_path: Path) -> None:
    training = opened(tmp_path)
    third, again = training.batches.of_step(3)[1], training.batches.of_step(1)[0]
    for share in (third, again, again):
        assert_same(training.batches.take(share), training.samples.batch(share.step, share.micro))
    training.batches.close()


def test_no_global_generator_is_touched(tmp_path: Path) -> None:
    training = opened(tmp_path)
    torch.manual_seed(1)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    training.samples.batch(1, training.samples.order.step(1)[0])
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[1:]
    training.batches.close()


def test_the_next_batch_is_built_while_a_step_computes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = opened(tmp_path)
    built = threading.Event()
    real_batch, real_loss = type(training.samples).batch, trainer.batch_loss

    def batch(samples: object, step: int, *rest: object) -> Batch:
        made = real_batch(samples, step, *rest)  # type: ignore[arg-type]
        if step == 2:
            built.set()
        return made

    def loss(*given: object) -> torch.Tensor:
        if len(waited) == 2:
            assert built.wait(10), "the first batch of step 2 is built within the last forward pass of step 1"
        waited.append(True)
        return real_loss(*given)  # type: ignore[arg-type]

    waited: list[bool] = []
    monkeypatch.setattr(type(training.samples), "batch", batch)
    monkeypatch.setattr(trainer, "batch_loss", loss)
    training.step = 1
    trainer.optimize(training)
    assert len(waited) == 3
    training.batches.close()


def test_a_missing_clip_is_told_when_its_step_comes_and_the_thread_ends(tmp_path: Path) -> None:
    job = tiny_job(tmp_path, SHAPE, steps=4, checkpoints={"every_steps": 1})
    run = Run.create(job)
    training = open_training(run)
    clip = training.samples.items[training.samples.order.step(2)[0].clips[0]]
    assert clip.latents != training.samples.items[training.samples.order.step(1)[0].clips[0]].latents
    training.batches.close()
    path = training.encoded.cache._path("latents", clip.latents)
    written = path.read_bytes()
    path.write_bytes(b"torn")
    with pytest.raises(DatasetError, match=r"is damaged.*Delete it and run `encode` again"):
        train(run)
    assert run.checkpoints() == [1]
    assert threads() == []
    path.write_bytes(written)
    assert train(run) == "done"
    assert threads() == []


def test_the_thread_ends_with_a_run_that_is_stopped(tmp_path: Path) -> None:
    run = Run.create(tiny_job(tmp_path, SHAPE, steps=9))
    real = run.metrics

    def metrics(**values: object) -> None:
        real(**values)  # type: ignore[arg-type]
        run.request("stop")

    run.metrics = metrics  # type: ignore[method-assign]
    assert train(run) == "stopped"
    assert threads() == []
