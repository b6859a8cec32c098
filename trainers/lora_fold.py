"""The arithmetic between the forms of a LoRA, none of which may lose a bit.

Folding takes the scale alpha / rank into B; fusing makes one pair for the stacked tensor of a native model out of its
members' pairs. Both have an inverse that is checked by going forward again: what is read back writes the same bytes.

A DoRA's magnitudes belong to the rows of the weight: they go where the rows of B go, and are never scaled.

Legend: R rank, I input features, O output features.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import reduce

import torch

from .adapter import LoraPair
from .errors import LoraError, Problem
from .keytable import Place


def fold(pair: LoraPair) -> LoraPair:
    """The same update with scale 1. B keeps its dtype if the product is exact in it, else it is float32."""
    if pair.scale == 1.0:
        return pair
    product = pair.up_OR.float() * pair.scale
    narrow = product.to(pair.up_OR.dtype)
    return replace(pair, up_OR=narrow if torch.equal(narrow.float(), product) else product, alpha=pair.rank)


def unfold(pair: LoraPair, alpha: float, dtype: torch.dtype) -> LoraPair:
    """A pair with `alpha` and B in `dtype` that folds to exactly the bits of `pair` (whose scale is 1).

    Scales that are powers of two divide exactly. For any other, several float32 B can fold to the same bits, or none: one
    within a unit in the last place of the quotient is taken, or `pair` itself is returned if there is none.
    """
    guess = replace(pair, up_OR=(pair.up_OR.float() / (alpha / pair.rank)).to(dtype), alpha=alpha)
    if dtype == torch.float32:
        guess = replace(guess, up_OR=_preimage(guess.up_OR, pair.up_OR.float(), guess.scale))
    return guess if _same_bits(fold(guess).up_OR, pair.up_OR) else pair


def fuse(members: Sequence[LoraPair | None], places: Sequence[Place]) -> LoraPair:
    """One pair for a native tensor from those of its members (None: not adapted), each at its place in the output rows.

    Members whose A are equal bit for bit share it; else the A are stacked and B is block-diagonal. Members of unequal
    scale are folded first. Raises LoraError for magnitudes that one native tensor cannot have.
    """
    known = [member for member in members if member is not None]
    if len({member.scale for member in known}) > 1:
        return fuse([member and fold(member) for member in members], places)
    if len(places) == 1:
        return _swapped(known[0], places[0])
    shared = all(_same_bits(member.down_RI, known[0].down_RI) for member in known)
    down_RI = known[0].down_RI if shared else torch.cat([member.down_RI for member in known])
    dtype = reduce(torch.promote_types, (member.up_OR.dtype for member in known))
    up_OR = torch.zeros(_native_rows(members, places), down_RI.shape[0], dtype=dtype)
    column = 0
    for member, place in zip(members, places, strict=True):
        if member is not None:
            up_OR[place.rows(up_OR.shape[0]), column : column + member.rank] = member.up_OR
            column += 0 if shared else member.rank
    return LoraPair(down_RI, up_OR, known[0].scale * down_RI.shape[0], _fused_magnitude(members, places))


def split(pair: LoraPair, places: Sequence[Place]) -> dict[str, LoraPair]:
    """The members' pairs, by name, of a native tensor's: the inverse of `fuse`, and always the same update.

    Equal blocks on the diagonal are taken apart; anything else becomes members that share the whole A. Raises LoraError for
    magnitudes of columns, which belong to the whole.
    """
    if len(places) == 1:
        return {places[0].name: _swapped(pair, places[0])}
    if pair.magnitude is not None:
        return _split_dora(pair, places)
    adapted = [place for place in places if bool(pair.up_OR[place.rows(pair.up_OR.shape[0])].any())]
    for present in (list(places), adapted):
        if present and pair.rank % len(present) == 0:
            found = _diagonal(pair, present)
            if _same_bits(fuse([found.get(place.name) for place in places], places).up_OR, pair.up_OR):
                return found
    return {place.name: LoraPair(pair.down_RI, pair.up_OR[place.rows(pair.up_OR.shape[0])], pair.alpha) for place in places}


def _preimage(quotient: torch.Tensor, folded: torch.Tensor, scale: float) -> torch.Tensor:
    """`quotient`, moved by a unit in the last place wherever that makes it fold to `folded`.

    The quotient itself does, except where `folded` is a power of two: the floats below it lie twice as close as those
    above, and the quotient may fall on the near side while only the far one folds back.
    """
    found = quotient
    for direction in (math.inf, -math.inf):
        moved = torch.nextafter(quotient, torch.tensor(direction))
        found = torch.where((found * scale != folded) & (moved * scale == folded), moved, found)
    return found


def _diagonal(pair: LoraPair, present: Sequence[Place]) -> dict[str, LoraPair]:
    """Equal blocks along the diagonal of B, each with its rows of A."""
    rank, length = pair.rank // len(present), pair.up_OR.shape[0]
    columns = [slice(i * rank, (i + 1) * rank) for i in range(len(present))]
    return {
        place.name: LoraPair(pair.down_RI[block], pair.up_OR[place.rows(length), block].contiguous(), pair.scale * rank)
        for place, block in zip(present, columns, strict=True)
    }


def _swapped(pair: LoraPair, place: Place) -> LoraPair:
    if not place.swap:
        return pair
    rows_O1 = pair.magnitude if pair.magnitude is None or not pair.by_rows else _halves_swapped(pair.magnitude)
    return replace(pair, up_OR=_halves_swapped(pair.up_OR), magnitude=rows_O1)


def _halves_swapped(tensor: torch.Tensor) -> torch.Tensor:
    return torch.cat(tensor.chunk(2)[::-1])


def _split_dora(pair: LoraPair, places: Sequence[Place]) -> dict[str, LoraPair]:
    """As `split`, each member with the magnitudes of its rows."""
    assert pair.magnitude is not None
    if not pair.by_rows:
        raise _impossible(places, f"magnitudes {tuple(pair.magnitude.shape)} of columns", "those of columns belong to the stacked weight")
    found = split(replace(pair, magnitude=None), places)
    members = {}
    for place in places:
        rows = place.rows(pair.up_OR.shape[0])
        member = found.get(place.name) or replace(pair, up_OR=pair.up_OR[rows])
        members[place.name] = replace(member, magnitude=pair.magnitude[rows])
    return members


def _fused_magnitude(members: Sequence[LoraPair | None], places: Sequence[Place]) -> torch.Tensor | None:
    found = [member.magnitude if member else None for member in members]
    if all(magnitude is None for magnitude in found):
        return None
    if any(magnitude is None for magnitude in found):
        raise _impossible(places, "magnitudes of some members only", "a stacked weight has them for all of its rows or none")
    if any(member and not member.by_rows for member in members):
        raise _impossible(places, "magnitudes of columns", "those of columns cannot be stacked")
    return torch.cat([magnitude for magnitude in found if magnitude is not None])


def _impossible(places: Sequence[Place], what: str, rule: str) -> LoraError:
    names = ", ".join(place.name for place in places)
    return LoraError(str(Problem(f"the DoRA of {names} has {what}", rule, "Use another form, or another file.")))


def _native_rows(members: Sequence[LoraPair | None], places: Sequence[Place]) -> int:
    rows = {m.up_OR.shape[0] * p.total // (p.stop - p.start) for m, p in zip(members, places, strict=True) if m is not None}
    assert len(rows) == 1, f"members of {places[0].name} disagree about the rows of the whole: {sorted(rows)}"
    return rows.pop()


def _same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    return left.dtype == right.dtype and torch.equal(left, right)
