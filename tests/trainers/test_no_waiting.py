"""Within a step the host never waits for the device: nothing is read back, and nothing is copied there that is not pinned.

Shown without a card. On the CPU, the real step runs while every operator that reads a number back is noted. On the meta device,
which holds no numbers, the forward and backward pass run while every copy from the CPU is noted too.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_families import of_every_variant, tiny_config, tiny_job_of
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trainers import trainer
from trainers.checkpoint import Checkpoint
from trainers.family import Family, Variant, detect
from trainers.lora import inject
from trainers.predict import batch_loss
from trainers.run import Run
from trainers.training import Training, open_training

READING_BACK = {"_local_scalar_dense", "item", "is_nonzero", "nonzero", "nonzero_static", "equal", "allclose", "masked_select", "unique2"}
"""Operators whose result, or the shape of whose result, the host must know."""


class Constants(TorchFunctionMode):
    """Notes numbers that are written down on the host and put on the device (the meta device gets none, so no copy is seen)."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function in (torch.tensor, torch.as_tensor, torch.from_numpy) and result.is_meta:
            self.found.append(function.__name__)
        return result


class Waits(TorchDispatchMode):
    """Notes what would make the host wait for `device`, while it is armed."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device, self.armed, self.found = device, True, []  # type: ignore[var-annotated]

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if self.armed and (name in READING_BACK or _indexes_by_truth(name, args) or self._copies(name, given, result)):
            self.found.append(name)
        return result

    def _copies(self, name: str, given: list[torch.Tensor], result: Any) -> bool:
        """Whether numbers of the CPU go to the device, which no pinned memory was asked for."""
        if self.device == "cpu" or name not in ("_to_copy", "copy_", "to"):
            return False
        return {"cpu", self.device} <= {tensor.device.type for tensor in [*given, result]}


def _indexes_by_truth(name: str, args: Any) -> bool:
    if name not in ("index", "index_put", "index_put_", "_index_put_impl_"):
        return False
    return any(isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8) for index in args[1])


def opened(folder: Path, family: Family, variant: Variant, **fields: object) -> Training:
    job = tiny_job_of(folder, family, variant, **fields)
    if variant in detect(Checkpoint.open(job.base.transformer)).variants:  # a tiny model is not of a published size
        job = job.model_copy(update={"base": job.base.model_copy(update={"variant": variant.id})})
    return open_training(Run.create(job))


@of_every_variant
def test_a_step_reads_nothing_back_before_it_is_queued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: Family, variant: Variant
) -> None:
    training = opened(tmp_path, family, variant, accumulation=2)
    waits, stepped = Waits("cpu"), []
    waits.armed = False

    def armed_loss(*given: Any) -> torch.Tensor:
        waits.armed = True
        return batch_loss(*given)

    def disarmed(step: Callable[[], object]) -> Callable[[], object]:
        def stepping() -> object:
            waits.armed = False
            stepped.append(True)
            return step()

        return stepping

    monkeypatch.setattr(trainer, "batch_loss", armed_loss)
    optimizer = training.trained[0].optimizer
    monkeypatch.setattr(optimizer, "step", disarmed(optimizer.step))
    training.step = 1
    with waits:
        trainer.optimize(training)
    training.batches.close()
    assert stepped
    assert waits.found == []


@of_every_variant
def test_nothing_is_copied_to_the_device_within_a_forward_and_backward_pass(tmp_path: Path, family: Family, variant: Variant) -> None:
    training = opened(tmp_path, family, variant)
    (share,) = training.batches.of_step(1)
    batch = training.batches.take(share).to(torch.device("meta"))
    training.batches.close()
    transformer = family.build(tiny_config(family, variant)).to("meta")
    inject(transformer, family, training.job.lora, 0, device=torch.device("meta"))
    with Waits("meta") as waits, Constants() as constants:
        batch_loss(family, variant, transformer, batch).backward()  # type: ignore[no-untyped-call]
    assert waits.found + constants.found == []


def test_what_waits_is_seen() -> None:
    values, truth = torch.zeros(3), torch.zeros(3, dtype=torch.bool)
    with Waits("cpu") as waits:
        values.sum().item(), bool(truth.any()), values[truth], truth.nonzero()
        values[truth] = 1.0
    assert waits.found == ["_local_scalar_dense", "_local_scalar_dense", "index", "nonzero", "index_put_"]
    with Waits("meta") as waits, Constants() as constants:
        torch.tensor([1.0], device="meta"), values.to("meta"), torch.zeros(3, device="meta").copy_(values)
    assert waits.found + constants.found == ["_to_copy", "copy_", "tensor"]
