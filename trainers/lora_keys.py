"""How LoRA files spell their keys: a prefix, a module's name in one of two namings, and the part of the pair.

    native     diffusion_model.blocks.0.self_attn.q.lora_A.weight      what ComfyUI and diffusers both load
    diffusers  transformer.blocks.0.attn1.to_q.lora_A.weight           what diffusers and peft write
    kohya      lora_unet_blocks_0_self_attn_q.lora_down.weight, .alpha   kohya, musubi: native names, dots as underscores

Read besides: the bare names of either naming, peft's `base_model.model.`, and the pair spelt up/down or with the
adapter's name.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

from .errors import KeyTableError, LoraError, Problem
from .family import Family, families
from .keytable import Place

Form = Literal["native", "diffusers", "kohya"]
Part = Literal["down", "up", "alpha"]

_NATIVE, _DIFFUSERS, _KOHYA = "diffusion_model.", "transformer.", "lora_unet_"
_PREFIXES: tuple[tuple[str, Form], ...] = (
    (_KOHYA, "kohya"),
    (_NATIVE, "native"),
    ("model.diffusion_model.", "native"),
    ("base_model.model.transformer.", "diffusers"),
    ("base_model.model.", "diffusers"),
    (_DIFFUSERS, "diffusers"),
    ("", "diffusers"),
)
_PART = re.compile(
    r"(?P<module>.+?)"
    r"(?:\.lora_(?P<letter>A|B|down|up)(?:\.(?!weight$|bias$)\w+)?(?:\.weight)?"  # .lora_A[.default][.weight]
    r"|[._]lora\.(?P<old>down|up)(?:\.weight)?"  # .lora.down, _lora.down.weight
    r"|\.lora_linear_layer\.(?P<layer>down|up)\.weight"
    r"|\.(?P<alpha>alpha))"
)
_OTHER_KINDS = {
    r"\.(dora_scale|lora_magnitude_vector)": "DoRA",
    r"\.lokr_": "LoKr",
    r"\.hada_": "LoHa",
    r"\.oft_": "OFT",
    r"\.lora_mid": "LoCon with a middle factor",
    r"\.diff(_b)?$": "full-weight differences",
    r"\.(reshape_weight|set_weight)$": "replaced weights",
    r"\.bias$": "biases",
}


@dataclass(frozen=True)
class Spelled:
    """The keys of a file taken apart: its form, and {module as spelt: {part: key}}."""

    form: Form
    modules: Mapping[str, Mapping[Part, str]]


def parse(keys: Iterable[str], where: str) -> Spelled:
    """Take the keys of a LoRA file apart. Raises LoraError that lists every key that is no part of a LoRA."""
    names = sorted(keys)
    prefix, form = next(
        (prefix, form) for prefix, form in _PREFIXES if (names and all(name.startswith(prefix) for name in names)) or not prefix
    )
    modules: dict[str, dict[Part, str]] = {}
    unknown = []
    for name in names:
        match = _PART.fullmatch(name.removeprefix(prefix))
        part = match and _part(match)
        if match is None or part is None or part in modules.get(match["module"], {}):
            unknown.append(name)
        else:
            modules.setdefault(match["module"], {})[part] = name
    if unknown:
        raise _not_a_lora(unknown, where)
    _check_pairs(modules, where)
    return Spelled(form, modules)


def family_of_lora(spelled: Spelled, expected: Family | None, where: str) -> tuple[Family, dict[str, tuple[Place, ...]]]:
    """The family of a LoRA, and for each module as spelt the diffusers modules it holds.

    Raises LoraError when it is of another family than `expected`, or of none that is known.
    """
    for family in [expected] if expected else families().values():
        members = _members(spelled, family)
        if None not in members.values():
            return family, {module: places for module, places in members.items() if places is not None}
    raise _wrong_family(spelled, expected, where)


def native_key(module: str, part: Part) -> str:
    return f"{_NATIVE}{module}.{_letters(part)}"


def diffusers_key(module: str, part: Part) -> str:
    return f"{_DIFFUSERS}{module}.{_letters(part)}"


def kohya_key(module: str, part: Part) -> str:
    return _KOHYA + module.replace(".", "_") + (".alpha" if part == "alpha" else f".lora_{part}.weight")


def _letters(part: Part) -> str:
    return {"down": "lora_A.weight", "up": "lora_B.weight", "alpha": "alpha"}[part]


def _part(match: re.Match[str]) -> Part:
    spelt = match["letter"] or match["old"] or match["layer"] or match["alpha"]
    parts: dict[str, Part] = {"A": "down", "down": "down", "B": "up", "up": "up", "alpha": "alpha"}
    return parts[spelt]


def _members(spelled: Spelled, family: Family) -> dict[str, tuple[Place, ...] | None]:
    """{module as spelt: what it holds, or None where the family has no such module}, in the naming that knows most."""
    namings = [
        {module: _from_diffusers(module, family) for module in spelled.modules},
        {module: _from_native(module, family) for module in spelled.modules},
    ]
    if spelled.form == "kohya":
        namings = [{module: _from_kohya(module, family) for module in spelled.modules}]
    elif spelled.form == "native":
        namings.reverse()
    return max(namings, key=lambda members: sum(places is not None for places in members.values()))


def _from_native(module: str, family: Family) -> tuple[Place, ...] | None:
    """By the names of the family's LoRAs, else by those of its native checkpoints."""
    for table in (family.lora_keys, family.keys):
        with suppress(KeyTableError):
            return table.to_diffusers(module)
    return None


def _from_diffusers(module: str, family: Family) -> tuple[Place, ...] | None:
    try:
        family.keys.to_native(module)
    except KeyTableError:
        return None
    return (Place(module),)


def _from_kohya(module: str, family: Family) -> tuple[Place, ...] | None:
    """Undo the underscores: a row's whole name first, else a row's name and a rest that makes a target of the family."""
    rows = dict.fromkeys((*family.lora_keys.rows, *family.keys.rows))
    for row in sorted(rows, key=lambda row: -len(row.native)):
        pattern = re.escape(row.native.replace(".", "_")).replace(r"\{\}", r"(\d+)")
        match = re.fullmatch(rf"{pattern}(?:_(?P<rest>.+))?", module)
        if match is None:
            continue
        name = row.native.replace("{}", match.group(1)) if "{}" in row.native else row.native
        for rest in _dotted(match["rest"]):
            places = _from_native(name + rest, family)
            if places and (not rest or all(_is_target(place.name, family) for place in places)):
                return places
    return None


def _dotted(rest: str | None) -> Iterator[str]:
    """Every way to read the underscores of `rest` as dots or as themselves."""
    if rest is None:
        yield ""
        return
    words = rest.split("_")
    for joints in itertools.product("._", repeat=len(words) - 1):
        yield "." + "".join(itertools.chain.from_iterable(itertools.zip_longest(words, joints, fillvalue="")))


def _is_target(name: str, family: Family) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in family.targets.attention + family.targets.feed_forward)


def _not_a_lora(unknown: list[str], where: str) -> LoraError:
    kinds = {kind for mark, kind in _OTHER_KINDS.items() for name in unknown if re.search(mark, name)}
    what = f"{', '.join(sorted(kinds))}: {listed(unknown)}" if kinds else listed(unknown)
    problem = Problem(
        f"{where} holds {what}", "only plain LoRA pairs (down, up, alpha) are read, and no key is dropped", "Use another file."
    )
    return LoraError(str(problem))


def _check_pairs(modules: Mapping[str, Mapping[Part, str]], where: str) -> None:
    if not modules:
        raise LoraError(str(Problem(f"{where} holds no tensor", "a LoRA has at least one pair", "Check that the file is complete.")))
    if halves := [key for parts in modules.values() for key in parts.values() if not {"down", "up"} <= set(parts)]:
        problem = Problem(
            f"{where} holds {listed(halves)} without its counterpart",
            "a LoRA pair has a down and an up",
            "Check that the file is complete.",
        )
        raise LoraError(str(problem))


def _wrong_family(spelled: Spelled, expected: Family | None, where: str) -> LoraError:
    others = [family for family in families().values() if None not in _members(spelled, family).values()]
    if expected and others and others[0].id != expected.id:
        rule, remedy = f"{expected.title} was asked for", f"Use it with {others[0].title}."
        return LoraError(str(Problem(f"{where} is a LoRA for {others[0].title}", rule, remedy)))
    asked = [expected] if expected else list(families().values())
    unknown = min(([m for m, places in _members(spelled, family).items() if places is None] for family in asked), key=len, default=[])
    rule = f"every module must be one of {' or '.join(family.title for family in asked)}"
    return LoraError(str(Problem(f"{where} adapts {listed(unknown)}", rule, "Check which model the LoRA was made for.")))


def listed(names: list[str]) -> str:
    """The first names, and how many more there are."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
