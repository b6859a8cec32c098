"""A tiny model of each family trained for three steps, kept in every way there is: the gradients must be the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from ..checkpoint import Checkpoint
from ..family import Family, families
from ..job import LoraSpec
from ..load import load_transformer
from ..lora import inject
from ..offload.arrangement import Arrangement
from ..offload.placement import SLOTS
from ..predict import batch_loss
from ..residency import Residency, tighter
from ..room import give_back, until_it_fits
from .lines import Bench, Check, Line
from .tiny_models import SIDE, SIDE_ON_CPU, TinyModel

_GROUP = "training a tiny model"
_STEPS = 3
_NEAR_THE_CPU, _NEAR_ITSELF, _NEAR_IN_HALF = 1e-4, 1e-5, 0.05
"""Of the largest gradient: another device adds up in another order, so do parts of a sequence."""
_REMEDY = 'Please report it, with the block below; until then train with memory.stream = "never".'
_OF_A_DEVICE = "Please report it, with the block below. A newer driver or PyTorch may compute correctly."
_LOSS_SCALE = 1024.0


@dataclass(frozen=True)
class Setup:
    """How a run is made. `full`: the GPU has no memory once, in the middle of a backward pass."""

    name: str
    device: torch.device
    side: int
    dtype: torch.dtype = torch.float32
    streamed: bool = False
    arrangement: Arrangement = field(default_factory=Arrangement)
    dropout: float = 0.0
    full: bool = False
    scale: float = 1.0


def _family(family: Family, bench: Bench) -> Iterator[Line]:
    """Every setup beside the one that keeps all on the device."""
    model, device, side = TinyModel(family), bench.device, SIDE if bench.on_gpu else SIDE_ON_CPU
    mapped = Setup("streamed, mapped", device, side, streamed=True, arrangement=Arrangement(host="mapped"))
    pinned = Arrangement(host="pinned", activations="host", chunks=2)
    setups = [
        mapped,
        Setup("pinned, inputs, 2 chunks" if bench.on_gpu else "pinned, 2 chunks", device, side, streamed=True, arrangement=pinned),
    ]
    if bench.on_gpu:
        setups.append(replace(mapped, name="after out of memory", full=True))
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder, _deterministic():
        path = Path(folder, "tiny.safetensors")
        model.write(path)
        run: Callable[[Setup], torch.Tensor] = partial(_gradients, model, path)
        resident = run(Setup("resident", device, side))
        if bench.on_gpu:
            yield _as_on_the_cpu(resident, run(Setup("CPU", torch.device("cpu"), side)))
        else:
            finite = bool(resident.isfinite().all()) and bool(resident.any())
            yield Line("resident", "ok" if finite else "failed", f"{_STEPS} steps on the CPU, {resident.numel()} gradients", _OF_A_DEVICE)
        for setup in setups:
            yield _compared(setup.name, run(setup), resident, _NEAR_ITSELF)
        if family.id == max(families()):  # once is enough
            noisy = Setup("dropout", device, side, dropout=0.2)
            yield _compared("dropout, streamed", run(replace(mapped, dropout=0.2)), run(noisy), _NEAR_ITSELF)
        if bench.on_gpu:
            for dtype in (dtype for dtype in bench.dtypes_of(model.family) if dtype != torch.float32):
                found = run(Setup("half", device, side, dtype, scale=_LOSS_SCALE if dtype == torch.float16 else 1.0))
                yield _in_half(str(dtype).removeprefix("torch."), found, resident)


def _compared(name: str, found: torch.Tensor, wanted: torch.Tensor, tolerance: float) -> Line:
    if not bool(found.isfinite().all()):
        return Line(name, "failed", "not-a-number in the gradients", _REMEDY)
    if torch.equal(found, wanted):
        return Line(name, "ok", f"the same bits in {_STEPS} steps")
    error = float((found - wanted).abs().max() / wanted.abs().max())
    return Line(name, "ok" if error <= tolerance else "failed", f"gradients of {_STEPS} steps are the same to {error:.1e}", _REMEDY)


def _as_on_the_cpu(found: torch.Tensor, exact: torch.Tensor) -> Line:
    """As `_in_half`: the optimizer divides by gradients that are nearly zero, where only rounding differs."""
    name = "resident, as on the CPU"
    if not bool(found.isfinite().all()):
        return Line(name, "failed", "not-a-number in the gradients", _OF_A_DEVICE)
    first = slice(len(exact) // _STEPS)
    error = float((found[first] - exact[first]).abs().max() / exact[first].abs().max())
    return Line(name, "ok" if error <= _NEAR_THE_CPU else "failed", f"the first step's gradients are the same to {error:.1e}", _OF_A_DEVICE)


def _in_half(name: str, found: torch.Tensor, exact: torch.Tensor) -> Line:
    """All must be finite; the first step's are compared, since an optimizer makes more of what rounding leaves."""
    if not bool(found.isfinite().all()):
        return Line(name, "failed", "not-a-number in the gradients", 'Set precision = "fp32", and report it.')
    first = slice(len(exact) // _STEPS)
    error = float((found[first] - exact[first]).norm() / exact[first].norm())
    text = f"finite in {_STEPS} steps, in the first one off by {error:.1%} of their length"
    return Line(name, "ok" if error <= _NEAR_IN_HALF else "failed", text, 'Set precision = "fp32", and report it.')


def _gradients(model: TinyModel, path: Path, setup: Setup) -> torch.Tensor:
    """All gradients of the steps, on the CPU."""
    device = setup.device
    transformer = load_transformer(Checkpoint.open(path), model.detection, device, setup.dtype, resident=False, all_frozen=True)
    parameters = inject(transformer, model.family, LoraSpec(rank=2, dropout=setup.dropout), seed=1, device=device)
    residency = Residency(transformer, model.family, device, replace(setup.arrangement), random=setup.dropout > 0)
    if setup.streamed:
        residency.rearrange(replace(setup.arrangement, weights_bytes=SLOTS * max(residency.block_bytes)))
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    found: list[torch.Tensor] = []
    try:
        residency.enter()
        transformer.train()
        for step in range(_STEPS):
            _step(model, transformer, residency, parameters, setup, step)
            found += [
                parameter.grad.detach().float().cpu().flatten() / setup.scale for parameter in parameters if parameter.grad is not None
            ]
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    finally:
        residency.leave()
    return torch.cat(found)


def _step(
    model: TinyModel, transformer: torch.nn.Module, residency: Residency, parameters: list[torch.nn.Parameter], setup: Setup, step: int
) -> None:
    """Forward and backward; where the setup says so, the second step runs out of memory, and frees some as a training does."""
    filled = [setup.full and step == 1]

    def work() -> None:
        torch.manual_seed(step)
        loss = (
            batch_loss(model.family, model.variant, transformer, model.batch(step, setup.side, setup.dtype).to(setup.device)) * setup.scale
        )
        if filled[0]:
            loss.register_hook(lambda _: _fill(setup.device))  # type: ignore[no-untyped-call]
        loss.backward()  # type: ignore[no-untyped-call]

    def make_room() -> None:
        filled[0] = False
        torch.cuda.set_per_process_memory_fraction(1.0, setup.device)
        for parameter in parameters:
            parameter.grad = None
        give_back(setup.device)
        less = tighter(residency.arrangement, residency.block_bytes)
        assert less is not None
        residency.rearrange(less)

    until_it_fits(work, make_room)
    assert not filled[0], "the GPU was to be full, and was not"


def _fill(device: torch.device) -> None:
    """Sets the allocator's limit to what is taken, and asks for more: the error is its own, in autograd's thread."""
    _, total = torch.cuda.mem_get_info(device)
    torch.cuda.set_per_process_memory_fraction(max(torch.cuda.memory_reserved(device), 1) / total, device)
    torch.empty(total // 8, dtype=torch.uint8, device=device)


@contextmanager
def _deterministic() -> Iterator[None]:
    """Kernels that repeat themselves, where there are some, so that bits can be compared, and float32 in all of its bits.

    PyTorch computes float32 convolutions in TF32 (10 bits) where the GPU has it, which is no fault and is off by more than 1e-4.
    """
    before: Any = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    in_tf32 = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = in_tf32


CHECKS = tuple(
    Check(f"{_GROUP}: {family.title}", "resident", partial(_family, family), needs_seconds=4.0) for family in families().values()
)
