"""Every family's blocks in chunks beside diffusers' own forward pass, on what the model itself hands its blocks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from inspect import signature
from typing import Any

import pytest
import torch
from live_bytes import LiveBytes
from tiny_families import BLOCKS, filled, tiny_conditions, tiny_config, tiny_latents, tiny_text
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

from trainers.family import Family, Variant, families
from trainers.job import LoraSpec
from trainers.lora import inject
from trainers.offload.arrangement import Arrangement
from trainers.offload.chunks import Chunks, in_chunks
from trainers.offload.compiled import compiled
from trainers.offload.unread import outputs_unread
from trainers.residency import Residency, blocks_of

CPU = torch.device("cpu")
CASES = [
    pytest.param(
        family,
        variant,
        kept,
        {},
        id=variant.id + (", first frame kept" if kept else ""),
        marks=[] if variant.id in BLOCKS and (kept or not always) else [pytest.mark.slow],
    )
    for family in families().values()
    for variant in family.variants
    for rule in (family.first_frame(variant),)
    for always in (rule is not None and rule.always,)
    for kept in ((False, True) if rule else (False,))
]
WAN = families()["wan"]
CASES.append(pytest.param(WAN, WAN.variants[0], False, {"cross_attn_norm": False}, id="wan, no norm before cross-attention"))
of_every_case = pytest.mark.parametrize(("family", "variant", "kept", "config"), CASES)

Call = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]


def trained(family: Family, variant: Variant, config: dict[str, Any], dtype: torch.dtype, dropout: float = 0.0) -> nn.Module:
    """A tiny transformer with a LoRA on every target that has learned something."""
    transformer = filled(family.build(tiny_config(family, variant) | config)).to(dtype)
    inject(transformer, family, LoraSpec(rank=2, dropout=dropout), seed=0)
    chance = torch.Generator().manual_seed(1)
    for parameter in transformer.parameters():
        if parameter.requires_grad:
            parameter.data.copy_(torch.randn(parameter.shape, generator=chance) / 4)
            parameter.data = parameter.data.to(torch.float64 if dtype == torch.float64 else torch.float32)
    return transformer.train()


def predicted(
    family: Family, variant: Variant, kept: bool, transformer: nn.Module, dtype: torch.dtype, times_larger: int = 1
) -> torch.Tensor:
    latents = tiny_latents(family, variant, 2).repeat(1, 1, 1, times_larger, times_larger)
    conditions = tiny_conditions(family, variant, latents, [kept, False])
    inputs = family.prepare(variant, latents, torch.tensor([0.3, 0.8]), conditions)
    text = family.collate_text([tiny_text(family, 5), tiny_text(family, 3)], CPU, dtype)
    return family.predict(transformer, inputs, text)


def calls(family: Family, variant: Variant, kept: bool, transformer: nn.Module, dtype: torch.dtype, times_larger: int = 1) -> list[Call]:
    """What the model hands the first and the last of each list of blocks; activations need a gradient."""
    given: list[Call] = []
    ends = {block for name in family.blocks for block in (transformer.get_submodule(name)[0], transformer.get_submodule(name)[-1])}  # type: ignore[index]
    hooks = [
        block.register_forward_pre_hook(lambda block, args, kwargs: given.append((block, args, kwargs)), with_kwargs=True) for block in ends
    ]
    with torch.no_grad():
        predicted(family, variant, kept, transformer, dtype, times_larger)
    for hook in hooks:
        hook.remove()
    assert len(given) == len(ends)
    return given


ACTIVATIONS = ("hidden_states", "encoder_hidden_states")
ALL_INPUTS = (*ACTIVATIONS, "temb", "token_replace_emb")


def answers(run: Callable[..., Any], call: Call, inputs: Sequence[str] = ACTIVATIONS, passes: int = 1) -> list[torch.Tensor]:
    """The outputs of a block, and the gradients of inputs (of the first pass) and of what is trained (of all passes)."""
    block, args, kwargs = call
    names = [name for name in signature(type(block).forward).parameters if name != "self"]
    given = dict(zip(names, args, strict=False)) | kwargs
    leaves = {name: given[name].clone().requires_grad_() for name in inputs if given.get(name) is not None}
    found = run(block, **given | leaves)
    outputs = [found] if isinstance(found, torch.Tensor) else list(found)
    chance = torch.Generator().manual_seed(2)
    weights = [torch.randn(output.shape, generator=chance).to(output.dtype) for output in outputs]
    parameters = [parameter for parameter in block.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.grad = None
    torch.autograd.backward(outputs, weights)
    of_inputs = [leaf.grad.clone() for leaf in leaves.values() if leaf.grad is not None]
    for _ in range(passes - 1):
        again = run(block, **given | leaves)
        torch.autograd.backward([again] if isinstance(again, torch.Tensor) else list(again), weights)
    return [*outputs, *of_inputs, *(parameter.grad for parameter in parameters if parameter.grad is not None)]


def whole(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return type(block).forward(block, *args, **kwargs)


def cut(family: Family, chunks: Chunks) -> Callable[..., Any]:
    def run(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        (chunked,) = (forward for forward in family.chunked if forward.suits(block))
        return chunked.forward(block, chunks, *args, **kwargs)

    return run


def same(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> bool:
    return len(found) == len(wanted) and all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@of_every_case
def test_values_and_gradients_are_those_of_diffusers(family: Family, variant: Variant, kept: bool, config: dict[str, Any]) -> None:
    transformer = trained(family, variant, config, torch.float64)
    for call in calls(family, variant, kept, transformer, torch.float64):
        found, wanted = (answers(run, call) for run in (cut(family, Chunks(4)), whole))
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
        call[0].requires_grad_(True)
        found, wanted = (answers(run, call, ALL_INPUTS) for run in (cut(family, Chunks(4)), whole))
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)  # of times, too, which Wan and Mochi take in float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@of_every_case
def test_all_but_matrix_products_has_the_same_bits(
    family: Family, variant: Variant, kept: bool, config: dict[str, Any], dtype: torch.dtype
) -> None:
    """Products of fewer rows may be rounded otherwise: in their place is what is computed for each number alone."""
    transformer = trained(family, variant, config, dtype)
    for call in calls(family, variant, kept, transformer, dtype):
        block = call[0]
        for name in ("ffn", "ff", "ff_context"):
            if getattr(block, name, None) is not None:
                setattr(block, name, nn.Tanh())
        if hasattr(block, "proj_mlp"):
            block.proj_mlp, block.proj_out = nn.Tanh(), FirstHalf()
        outputs = 1 if isinstance(whole(block, *call[1], **call[2]), torch.Tensor) else 2
        found, wanted = answers(cut(family, Chunks(4)), call), answers(whole, call)
        assert same(found[:outputs], wanted[:outputs])
        if family.id == "wan" and not config:  # elsewhere three gradients meet in one tensor, and are summed in another order
            assert same(found, wanted)


class FirstHalf(nn.Module):
    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        first, second = rows.chunk(2, dim=2)
        return first * second


class WithoutRecomputing(Chunks):
    def __call__(self, stretch: Callable[..., Any], *tensors: torch.Tensor) -> Any:
        return self.linear(stretch, *tensors)


@of_every_case
def test_dropout_draws_the_same_twice(family: Family, variant: Variant, kept: bool, config: dict[str, Any]) -> None:
    transformer = trained(family, variant, config, torch.float32, dropout=0.5)
    for call in calls(family, variant, kept, transformer, torch.float32):
        found = []
        for chunks in (Chunks(3, random=True), WithoutRecomputing(3)):
            torch.manual_seed(7)
            found.append(answers(cut(family, chunks), call))
        assert same(*found)


@of_every_case
def test_the_last_stretch_waits_for_its_gradient(family: Family, variant: Variant, kept: bool, config: dict[str, Any]) -> None:
    """Where a block runs for its gradients only: they are what they are when the stretch is computed before them, too.

    In bf16 and with everything trained: gradients of small parts, each added to those of an earlier pass, would be rounded away.
    """
    sums_differ = family.id == "hunyuan"  # its single blocks' weights are those of the text, too, whose gradient comes first or last
    dtype = torch.float32 if sums_differ else torch.bfloat16
    transformer = trained(family, variant, config, dtype).to(dtype)
    for call in calls(family, variant, kept, transformer, dtype):
        run = cut(family, Chunks(4, trained=tuple(call[0].requires_grad_(True).parameters())))
        wanted, forward = answers(run, call, ALL_INPUTS, passes=2), products(run, call)
        with outputs_unread():
            found, shorter = answers(run, call, ALL_INPUTS, passes=2), products(run, call)
        outputs = 1 if isinstance(whole(call[0], *call[1], **call[2]), torch.Tensor) else 2
        for ours, theirs in zip(found[:outputs], wanted[:outputs], strict=True):
            assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        for ours, theirs in zip(found[outputs:], wanted[outputs:], strict=True):
            assert (ours - theirs).norm() <= 1e-6 * theirs.norm() if sums_differ else torch.equal(ours, theirs)
        assert shorter < forward


def products(run: Callable[..., Any], call: Call) -> int:
    """Of matrices, multiply-adds times two, in a forward pass that a backward pass will follow."""
    with FlopCounterMode(display=False) as count:
        run(call[0], *call[1], **call[2])
    return count.get_total_flops()


def test_the_trainer_runs_them_and_another_number_of_chunks_later() -> None:
    family, variant = WAN, WAN.variants[0]
    wanted = predicted(family, variant, False, trained(family, variant, {}, torch.float64), torch.float64)
    transformer = trained(family, variant, {}, torch.float64)
    lengths: list[int] = []
    transformer.blocks[0].ffn.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))  # type: ignore[index,union-attr]
    residency = Residency(transformer, family, CPU, Arrangement(chunks=3))
    residency.enter()
    for chunks, expected in ((3, [6, 6, 6] * 2), (1, [18] * 2)):  # forward, and once in the backward pass
        residency.rearrange(Arrangement(chunks=chunks))
        lengths.clear()
        found = predicted(family, variant, False, transformer, torch.float64)
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)  # the velocity is float32
        found.sum().backward()
        assert lengths == expected


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # raised inside torch.compile
@pytest.mark.parametrize("count", [1, 3])
def test_a_compiled_block_is_one_graph(count: int) -> None:
    torch._dynamo.reset()
    transformer = trained(WAN, WAN.variants[0], {}, torch.float32)
    block, args, kwargs = calls(WAN, WAN.variants[0], False, transformer, torch.float32)[0]
    in_chunks([block], WAN.chunked, count)
    with torch.no_grad():
        wanted = block(*args, **kwargs)
        counter = CompileCounterWithBackend("eager")
        found = compiled(block, counter)(*args, **kwargs)
    assert torch.equal(found, wanted)
    assert counter.frame_count == 1
    assert not torch._dynamo.utils.counters["graph_break"]
    torch._dynamo.reset()


@pytest.mark.parametrize("family", families().values(), ids=lambda family: family.id)
def test_a_changed_block_runs_whole(family: Family) -> None:
    """Another release of diffusers may have more in a block than was written here."""
    for block in blocks_of(family.build(tiny_config(family, family.variants[0])), family):
        assert sum(forward.suits(block) for forward in family.chunked) == 1
        changed = []
        for change in (add_a_part, add_a_parameter, add_a_part_to_the_norm, take_a_part, as_another_class):
            other = copy.deepcopy(block)
            if change(other):
                changed.append(type(other))
                in_chunks([other], family.chunked, 4)
                assert type(other) is changed[-1], change
        assert len(changed) >= 4
        in_chunks([block], family.chunked, 4)
        assert type(block).__name__.startswith("Chunked")


def add_a_part(block: nn.Module) -> bool:
    block.adapter = nn.Linear(2, 2)
    return True


def add_a_parameter(block: nn.Module) -> bool:
    block.scale = nn.Parameter(torch.ones(1))
    return True


def add_a_part_to_the_norm(block: nn.Module) -> bool:
    norms = [norm for name in ("norm", "norm1") if hasattr(norm := getattr(block, name, None), "linear")]
    for norm in norms:
        norm.emb = nn.Linear(2, 2)  # type: ignore[union-attr]
    return bool(norms)


def take_a_part(block: nn.Module) -> bool:
    delattr(block, "norm2" if hasattr(block, "norm2") else "norm")
    return True


def as_another_class(block: nn.Module) -> bool:
    """Of the same name, with an argument more."""
    kind = type(block)
    block.__class__ = type(kind.__name__, (kind,), {"forward": lambda self, hidden_states, control: None})
    return True


@pytest.mark.parametrize(
    ("family_id", "kept", "shares"),
    [("wan", False, [0.9]), ("wan", True, [0.7]), ("ltx", True, [0.65]), ("hunyuan", False, [0.65, 0.6]), ("mochi", False, [0.55])],
)
def test_parts_take_less_at_once(family_id: str, kept: bool, shares: list[float]) -> None:
    """Of forward and backward pass of one block in bf16, in eight parts. Half of Wan's is the text's, which is never cut."""
    family = families()[family_id]
    variant = next(variant for variant in family.variants if not kept or ((rule := family.first_frame(variant)) and not rule.always))
    config = {"num_attention_heads": 1, "ffn_dim": 512} if family_id == "wan" else {}
    transformer = trained(family, variant, config, torch.bfloat16)
    given = calls(family, variant, kept, transformer, torch.bfloat16, times_larger=4)[::2]
    for call, share in zip(given, shares, strict=True):
        peaks = []
        for run in (whole, cut(family, Chunks(8))):
            with LiveBytes() as count:
                answers(run, call)
            peaks.append(count.peak)
        assert peaks[1] < share * peaks[0]
