from __future__ import annotations

import pytest
import torch

from trainers.adapter import LoraPair
from trainers.keytable import Fuse, KeyTable, SwapHalves
from trainers.lora_fold import fold, fuse, split, unfold

EQUAL = KeyTable((Fuse(("q", "k", "v"), "qkv"),)).to_diffusers("qkv")
UNEQUAL = KeyTable((Fuse(("q", "k", "v", "mlp"), "linear1", (1, 1, 1, 4)),)).to_diffusers("linear1")
SWAPPED = KeyTable((SwapHalves("proj", "w1"),)).to_diffusers("w1")


def _pair(rows: int, rank: int = 4, alpha: float | None = None, dtype: torch.dtype = torch.float32, seed: int = 0) -> LoraPair:
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn(rank, 6, generator=generator).to(dtype)
    return LoraPair(down, torch.randn(rows, rank, generator=generator).to(dtype), alpha or rank)


def _same(left: LoraPair, right: LoraPair) -> bool:
    pairs = ((left.down_RI, right.down_RI), (left.up_OR, right.up_OR))
    return left.alpha == right.alpha and all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


def _update(pair: LoraPair) -> torch.Tensor:
    return pair.scale * pair.up_OR.double() @ pair.down_RI.double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("alpha", [0.5, 1.0, 4.0, 16.0])
def test_a_power_of_two_is_folded_and_unfolded_bit_for_bit(alpha: float, dtype: torch.dtype) -> None:
    pair = _pair(1000, alpha=alpha, dtype=dtype)
    folded = fold(pair)
    assert folded.scale == 1.0
    assert torch.equal(_update(folded), _update(pair))
    assert _same(unfold(folded, alpha, dtype), pair)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("alpha", [3.0, 7.0, 0.1, 5.3])
def test_sixteen_bits_come_back_from_any_scale(alpha: float, dtype: torch.dtype) -> None:
    pair = _pair(1000, alpha=alpha, dtype=dtype)
    folded = fold(pair)
    assert folded.up_OR.dtype == torch.float32
    assert _same(unfold(folded, alpha, dtype), pair)


@pytest.mark.parametrize("alpha", [3.0, 7.0, 0.1, 5.3, 11.0])
def test_float32_unfolds_to_what_folds_to_the_same_bits(alpha: float) -> None:
    pair = _pair(20000, alpha=alpha)
    folded = fold(pair)
    again = unfold(folded, alpha, torch.float32)
    assert again.alpha == pair.alpha
    assert _same(fold(again), folded)
    apart = (again.up_OR.view(torch.int32) - pair.up_OR.view(torch.int32)).abs()
    assert apart.max() <= 1, "a unit in the last place is all that folding may hide"


@pytest.mark.parametrize(("alpha", "rank", "value"), [(11.0, 94, 8.545454978942871), (3.0, 23, 7.6666669845581055)])
def test_a_product_that_is_a_power_of_two_unfolds_too(alpha: float, rank: int, value: float) -> None:
    """Found by search: here the rounded quotient does not fold back."""
    pair = LoraPair(torch.ones(rank, 1), torch.full((2, rank), value), alpha)
    folded = fold(pair)
    assert (folded.up_OR == 1.0).all()
    assert (folded.up_OR / pair.scale * pair.scale != 1.0).all()
    assert _same(unfold(folded, alpha, torch.float32), pair)


def test_what_no_b_folds_to_stays_folded() -> None:
    gap = fold(LoraPair(torch.ones(4, 1), torch.full((1, 4), 1.0), 5.3))
    holes = torch.nextafter(gap.up_OR, torch.tensor(9.0)).repeat(64, 1)
    for row in range(1, 64):
        holes[row] = torch.nextafter(holes[row - 1], torch.tensor(9.0))
    pair = LoraPair(torch.ones(4, 1), holes, 4.0)
    assert _same(unfold(pair, 5.3, torch.float32), pair)


@pytest.mark.parametrize("places", [EQUAL, UNEQUAL])
def test_members_are_stacked_and_taken_apart(places) -> None:  # type: ignore[no-untyped-def]
    members = [_pair(5 * (place.stop - place.start), alpha=2.0, seed=i) for i, place in enumerate(places)]
    fused = fuse(members, places)
    assert fused.shapes == ((4 * len(places), 6), (5 * places[0].total, 4 * len(places)))
    assert fused.scale == 0.5
    assert torch.equal(_update(fused), torch.cat([_update(member) for member in members]))
    apart = split(fused, places)
    assert all(_same(apart[place.name], member) for place, member in zip(places, members, strict=True))


def test_members_with_the_same_a_share_it() -> None:
    down = torch.randn(4, 6)
    members = [LoraPair(down.clone(), _pair(5, seed=i).up_OR, 4.0) for i in range(3)]
    fused = fuse(members, EQUAL)
    assert fused.shapes == ((4, 6), (15, 4))
    assert all(_same(split(fused, EQUAL)[place.name], member) for place, member in zip(EQUAL, members, strict=True))


@pytest.mark.parametrize("present", [(0,), (1,), (0, 2), (1, 2)])
def test_a_missing_member_is_zero_and_stays_missing(present: tuple[int, ...]) -> None:
    members = [_pair(5, seed=i) if i in present else None for i in range(3)]
    fused = fuse(members, EQUAL)
    assert fused.up_OR.shape[0] == 15
    apart = split(fused, EQUAL)
    assert set(apart) == {EQUAL[i].name for i in present}
    assert all(_same(apart[EQUAL[i].name], members[i]) for i in present)  # type: ignore[arg-type]


def test_members_of_unequal_scale_are_folded() -> None:
    members = [_pair(5, alpha=alpha, seed=i) for i, alpha in enumerate((1.0, 2.0, 8.0))]
    fused = fuse(members, EQUAL)
    assert fused.scale == 1.0
    assert torch.equal(_update(fused), torch.cat([_update(member) for member in members]))


@pytest.mark.parametrize("up", [torch.randn(15, 12), torch.zeros(15, 12), torch.randn(15, 7)])
def test_any_native_tensor_comes_back_as_it_was(up: torch.Tensor) -> None:
    pair = LoraPair(torch.randn(up.shape[1], 6), up, up.shape[1])
    apart = split(pair, EQUAL)
    again = fuse([apart.get(place.name) for place in EQUAL], EQUAL)
    assert _same(again, pair)


def test_swapped_halves() -> None:
    pair = _pair(6)
    native = fuse([pair], SWAPPED)
    assert torch.equal(_update(native), torch.cat(_update(pair).chunk(2)[::-1]))
    assert _same(split(native, SWAPPED)["proj"], pair)
