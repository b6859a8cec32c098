"""The trace on the meta device against real steps: the same shapes on the CPU, with every allocation recorded by the profiler.

What this does not show of a card: its attention kernels (here those of the CPU are imitated), what cuBLAS takes, and what the
caching allocator rounds up.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from tiny_families import TINY, filled, tiny_config
from torch.profiler import ProfilerActivity, profile

from trainers.batches import Batch
from trainers.card_kernels import AMPERE, CPU, imitated
from trainers.family import FIRST_FRAME, Conditions, Family, TextRecord, Variant, families
from trainers.job import LoraSpec
from trainers.live_bytes import LiveBytes
from trainers.lora import inject
from trainers.memory_trace import StepShape, Tracer, _Inputs
from trainers.offload.arrangement import Arrangement
from trainers.predict import batch_loss
from trainers.residency import Residency

GROWN: dict[str, tuple[str, dict[str, Any], tuple[int, ...]]] = {
    "wan": ("wan2.1-t2v", {"num_attention_heads": 2, "ffn_dim": 1024, "num_layers": 8}, (3, 16, 24)),
    "ltx": ("ltxv-13b", {"num_attention_heads": 8, "attention_head_dim": 32, "cross_attention_dim": 256, "num_layers": 4}, (3, 12, 16)),
    "hunyuan": ("hunyuan-t2v", {"num_attention_heads": 2, "num_layers": 4, "num_single_layers": 5}, (3, 24, 24)),
    "mochi": ("mochi-1-preview", {"num_attention_heads": 8, "attention_head_dim": 32, "num_layers": 4}, (3, 24, 32)),
}
"""Of each family a variant, and a model and latents (frames, height, width) whose activations are 5 to 200 MiB."""
WAYS = {
    "whole": Arrangement(checkpointing=False),
    "checkpoints": Arrangement(),
    "checkpoints on the host": Arrangement(activations="host"),
    "chunks": Arrangement(chunks=4),
}


def grown(family: Family) -> tuple[Variant, torch.nn.Module]:
    name, sizes, _ = GROWN[family.id]
    variant = next(variant for variant in family.variants if variant.id == name)
    return variant, family.build(tiny_config(family, variant) | sizes)


def shape_of(family: Family, variant: Variant) -> StepShape:
    latents = (family.latent(variant).channels, *GROWN[family.id][2])
    return StepShape(latents, 1, 40, TINY[family.id].text_dim, TINY[family.id].pooled_dim)  # type: ignore[arg-type]


def traced(family: Family, dtype: torch.dtype, *, whole: bool = False, **options: Any) -> tuple[Variant, Tracer]:
    variant, transformer = grown(family)
    transformer.to(dtype).requires_grad_(False)
    transformer.to("meta")

    def add(module: torch.nn.Module) -> object:
        return inject(module, family, LoraSpec(rank=4), 0, device=torch.device("meta"))

    return variant, Tracer(family, variant, transformer, add, dtype, kernels=CPU, whole=whole, **options)


def real_batch(shape: StepShape, family: Family, dtype: torch.dtype) -> Batch:
    chance = torch.Generator().manual_seed(0)
    pooled = None if shape.pooled_width is None else torch.randn(shape.pooled_width, generator=chance)
    latents = torch.randn(1, *shape.latents_CFHW, generator=chance)
    text = family.collate_text(
        [TextRecord(torch.randn(shape.text_rows, shape.text_width, generator=chance), pooled)], torch.device("cpu"), dtype
    )
    conditions = Conditions({FIRST_FRAME: latents[:, :, :1]}, None, torch.full((1,), 24.0))
    return Batch(latents, torch.randn(latents.shape, generator=chance), torch.tensor([0.5]), text, conditions)


def measured_peak(family: Family, dtype: torch.dtype, arrangement: Arrangement) -> int:
    """The most that one real step allocates over what was there before it: of the second step, when all buffers are there."""
    variant, transformer = grown(family)
    transformer = filled(transformer).to(dtype).requires_grad_(False)
    parameters = inject(transformer, family, LoraSpec(rank=4), 0)
    residency = Residency(transformer, family, torch.device("cpu"), arrangement)
    residency.enter()
    transformer.train()
    batch = real_batch(shape_of(family, variant), family, dtype)
    batch_loss(family, variant, transformer, batch).backward()
    for parameter in parameters:
        parameter.grad = None
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        batch_loss(family, variant, transformer, batch).backward()
    changes = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes.sort(key=lambda event: event.start_ns())
    live = peak = 0
    for event in changes:
        live += event.nbytes()
        peak = max(peak, live)
    return peak


CASES = [
    ("wan", "checkpoints", torch.float32),
    ("ltx", "whole", torch.bfloat16),
    ("hunyuan", "checkpoints on the host", torch.float32),
    ("mochi", "chunks", torch.float32),
    ("wan", "chunks", torch.float32),
]
"""Every family, and every way, once; chunks of a model that modulates in float32, too."""


@pytest.mark.parametrize(("family_id", "way", "dtype"), CASES)
def test_a_real_step_takes_what_the_trace_says(family_id: str, way: str, dtype: torch.dtype) -> None:
    family = families()[family_id]
    variant, tracer = traced(family, dtype)
    predicted = tracer.step(shape_of(family, variant), WAYS[way]).peak_bytes
    measured = measured_peak(family, dtype, WAYS[way])
    assert measured > 5 * 2**20
    assert predicted == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize(("family_id", "way"), [("wan", "checkpoints on the host"), ("hunyuan", "checkpoints"), ("mochi", "whole")])
def test_few_blocks_stand_for_all(family_id: str, way: str) -> None:
    family = families()[family_id]
    variant, tracer = traced(family, torch.bfloat16)
    _, whole = traced(family, torch.bfloat16, whole=True)
    shape = shape_of(family, variant)
    few, all_of_them = tracer.step(shape, WAYS[way]), whole.step(shape, WAYS[way])
    assert few.peak_bytes == pytest.approx(all_of_them.peak_bytes, rel=0.01)
    assert few.forward == all_of_them.forward
    assert few.backward.product_flops == all_of_them.backward.product_flops
    assert few.backward.attention_flops == all_of_them.backward.attention_flops
    assert few.inputs_bytes == all_of_them.inputs_bytes


of_some_families = pytest.mark.parametrize(
    "family",
    [pytest.param(family, id=family.id, marks=[] if family.id == "wan" else [pytest.mark.slow]) for family in families().values()],
)


@of_some_families
def test_what_is_kept_of_operators_changes_nothing(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device each answer of an operator is found once for all blocks."""
    variant, tracer = traced(family, torch.bfloat16)
    kept = tracer.step(shape_of(family, variant), WAYS["chunks"])
    monkeypatch.setattr("trainers.live_bytes._answers.of", lambda func, args, kwargs: func(*args, **kwargs))
    variant, tracer = traced(family, torch.bfloat16)
    assert tracer.step(shape_of(family, variant), WAYS["chunks"]) == kept


@pytest.mark.parametrize("family", families().values(), ids=lambda family: family.id)
def test_inputs_are_as_large_wherever_they_wait(family: Family) -> None:
    variant, tracer = traced(family, torch.bfloat16)
    shape = shape_of(family, variant)
    there, elsewhere = (tracer.step(shape, WAYS[way]).inputs_bytes for way in ("checkpoints", "checkpoints on the host"))
    assert there == elsewhere > 0


@of_some_families
def test_with_dropout_parts_are_computed_once_more(family: Family) -> None:
    """Its draws follow each other: the last stretch of a block is computed before its gradient too."""
    flops = {}
    for dropout in (0.0, 0.5):
        variant, transformer = grown(family)
        transformer.requires_grad_(False).to("meta")
        add = partial(inject, family=family, spec=LoraSpec(rank=4, dropout=dropout), seed=0, device=torch.device("meta"))
        tracer = Tracer(family, variant, transformer, add, torch.float32)
        flops[dropout] = [tracer.step(shape_of(family, variant), WAYS[way]).backward.product_flops for way in ("checkpoints", "chunks")]
    assert flops[0.0][0] == flops[0.5][0] >= flops[0.0][1] > 0
    assert flops[0.5][1] > flops[0.0][1]


def test_an_input_at_the_address_of_one_that_is_gone_is_another() -> None:
    """On the host inputs leave, and what is made after them may lie where they lay."""
    inputs = _Inputs()
    for index in range(50):
        inputs.noted(index, lambda tensor: None)(torch.empty(3, device="meta"))
    assert inputs.total() == 50 * 12


def test_a_storage_counts_as_the_allocator_rounds_it() -> None:
    with LiveBytes("meta") as counter:
        rows = torch.empty(1, device="meta"), torch.empty(513, dtype=torch.uint8, device="meta")
        assert counter.live == 512 + 1024
        del rows
        assert counter.live == 0


def test_a_step_takes_its_batch_too() -> None:
    """Left out, a plan of TI2V 5B and of Mochi, whose latents have 48 and 12 channels, was that much too low."""
    variant, tracer = traced(families()["wan"], torch.float32)
    shape = shape_of(families()["wan"], variant)
    twice = replace(shape, extras={"never_asked_for": (1024, 1024)})
    assert tracer.step(twice, Arrangement()).peak_bytes - tracer.step(shape, Arrangement()).peak_bytes == 4 * 1024 * 1024


def test_views_and_writes_are_run_each_time() -> None:
    with LiveBytes("meta") as counter:
        for _ in range(2):
            rows = torch.empty(8, 16, device="meta")  # 512 bytes: as much as CUDA's allocator gives at the least
            assert rows.view(16, 8)._base is rows
            assert torch.ops.aten._unsafe_view(rows, [16, 8]).untyped_storage()._cdata == rows.untyped_storage()._cdata
            assert rows.add_(1) is rows
            assert counter.live == rows.nbytes
            total = rows + 1
            assert counter.live == rows.nbytes + total.nbytes
            del rows, total
            assert counter.live == 0


def test_an_answer_has_the_dtype_and_strides_of_the_operator_s() -> None:
    before = torch.get_default_dtype()
    with LiveBytes("meta"):
        for default in (before, before, torch.float64):
            torch.set_default_dtype(default)
            rows = torch.empty(4, 6, device="meta", dtype=torch.float32).t()
            assert (rows * 2).stride() == rows.stride() == (1, 6)
            assert (rows * rows.to(torch.float64)).dtype == torch.float64
            assert (rows > True).dtype == torch.bool
            flags = rows > 1
            assert [(flags * value).dtype for value in (True, 1, 1.0)] == [torch.bool, torch.int64, default]
            assert rows.new_zeros(4, device="cpu").device.type == "cpu"
            assert (flags / 2).dtype == torch.get_default_dtype()
            assert torch.full_like(rows, 1.0, dtype=torch.int8).dtype == torch.int8
            assert torch.native_layer_norm(rows, [4], None, None, 1e-6)[1].shape == (6, 1)
    torch.set_default_dtype(before)


def test_a_card_s_norm_takes_its_output_alone() -> None:
    """RMS norm of one dtype is one kernel there, and no copy in float32 is kept."""
    norm = torch.nn.RMSNorm(64, device="meta", dtype=torch.bfloat16).requires_grad_(False)
    rows = torch.empty(1024, 64, device="meta", dtype=torch.bfloat16, requires_grad=True)
    counter = LiveBytes("meta", [rows, norm.weight])
    with counter, imitated(AMPERE, counter):
        found = norm(rows)
    assert counter.peak == found.nbytes + 1024 * 4
