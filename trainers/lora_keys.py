"""How LoRA files spell their keys: a prefix, a module's name in one of two namings, and the part of the pair.

    native     diffusion_model.blocks.0.self_attn.q.lora_A.weight      what ComfyUI and diffusers both load
    diffusers  transformer.blocks.0.attn1.to_q.lora_A.weight           what diffusers and peft write
    kohya      lora_unet_blocks_0_self_attn_q.lora_down.weight, .alpha   kohya, musubi: native names, dots as underscores

Read besides: native names behind `transformer.` (diffusion-pipe's Hunyuan) or bare (the official Mochi trainer), the bare
names of diffusers, peft's `base_model.model.`, and the pair spelt up/down or with the adapter's name. Of other kinds than
LoRA and DoRA the keys are known, so that a file can be told what it is; they are not read into an adapter.
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
Part = Literal["down", "up", "alpha", "magnitude"]

_NATIVE, _DIFFUSERS, _KOHYA = "diffusion_model.", "transformer.", "lora_unet_"
_PREFIXES: tuple[tuple[str, Form], ...] = (
    ("lora_unet__", "kohya"),
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
    r"|\.(?P<magnitude>dora_scale|lora_magnitude_vector)(?:\.(?!weight$)\w+)?(?:\.weight)?"
    r"|\.(?P<alpha>alpha))"
)
_OTHER_KINDS = {
    r"(?P<module>.+)\.lokr_\w+": "LoKr",
    r"(?P<module>.+)\.hada_\w+": "LoHa",
    r"(?P<module>.+)\.(oft_\w+|rescale)": "OFT",
    r"(?P<module>.+)\.[ab][12]\.weight": "GLoRA",
    r"(?P<module>.+)\.lora_mid\.weight": "a middle factor",
    r"(?P<module>.+)\.(diff|diff_b|w_norm|b_norm)": "full differences",
    r"(?P<module>.+)\.reshape_weight": "wider weights",
    r"(?P<module>.+)\.set_weight": "replaced weights",
    r"(?P<module>.+?)\.lora_B(\.\w+)?\.bias": "biases",
}


@dataclass(frozen=True)
class Spelled:
    """The keys of a file taken apart: its form and prefix, and {module as spelt: {part: key}}.

    `others` has what no LoRA or DoRA is made of: {kind: {key: module as spelt}}.
    """

    form: Form
    prefix: str
    modules: Mapping[str, Mapping[Part, str]]
    others: Mapping[str, Mapping[str, str]]

    @property
    def names(self) -> tuple[str, ...]:
        """Every module as spelt."""
        others = (module for keys in self.others.values() for module in keys.values())
        return tuple(dict.fromkeys((*self.modules, *others)))


def parse(keys: Iterable[str], where: str) -> Spelled:
    """Take the keys of a LoRA file apart. Raises LoraError that lists every key that is part of nothing known."""
    names = sorted(keys)
    prefix, form = next(
        (prefix, form) for prefix, form in _PREFIXES if (names and all(name.startswith(prefix) for name in names)) or not prefix
    )
    modules: dict[str, dict[Part, str]] = {}
    others: dict[str, dict[str, str]] = {}
    unknown = []
    for name in names:
        match = _PART.fullmatch(name.removeprefix(prefix))
        part = match and _part(match)
        if match and part and part not in modules.get(match["module"], {}):
            modules.setdefault(match["module"], {})[part] = name
        elif other := _other_kind(name.removeprefix(prefix)):
            others.setdefault(other[0], {})[name] = other[1]
        else:
            unknown.append(name)
    if unknown:
        problem = Problem(f"{where} holds {listed(unknown)}", "every key of a LoRA must be known, and none is dropped", "Use another file.")
        raise LoraError(str(problem))
    _check_pairs(modules, others, where)
    return Spelled(form, prefix, modules, others)


def check_plain(spelled: Spelled, where: str) -> None:
    """Raises LoraError when a file holds more than LoRA or DoRA pairs."""
    if spelled.others:
        kinds, keys = ", ".join(sorted(spelled.others)), [key for found in spelled.others.values() for key in found]
        rule = "only LoRA and DoRA (down, up, alpha, magnitude) can be trained on or converted, and no key is dropped"
        raise LoraError(str(Problem(f"{where} holds {kinds}: {listed(keys)}", rule, "Load it in ComfyUI as it is, or use another file.")))


def _other_kind(name: str) -> tuple[str, str] | None:
    """(kind, module) of a key that is no part of a LoRA."""
    for pattern, kind in _OTHER_KINDS.items():
        if match := re.fullmatch(pattern, name):
            return kind, match["module"]
    return None


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
    return f"{_DIFFUSERS}{module}.{'lora_magnitude_vector' if part == 'magnitude' else _letters(part)}"


def kohya_key(module: str, part: Part) -> str:
    part_key = f"lora_{part}.weight" if part in ("down", "up") else _letters(part)
    return f"{_KOHYA}{module.replace('.', '_')}.{part_key}"


def _letters(part: Part) -> str:
    return {"down": "lora_A.weight", "up": "lora_B.weight", "alpha": "alpha", "magnitude": "dora_scale"}[part]


def _part(match: re.Match[str]) -> Part:
    if match["magnitude"]:
        return "magnitude"
    spelt = match["letter"] or match["old"] or match["layer"] or match["alpha"]
    parts: dict[str, Part] = {"A": "down", "down": "down", "B": "up", "up": "up", "alpha": "alpha"}
    return parts[spelt]


def _members(spelled: Spelled, family: Family) -> dict[str, tuple[Place, ...] | None]:
    """{module as spelt: what it holds, or None where the family has no such module}, in the naming that knows most."""
    namings = [
        {module: _from_diffusers(module, family) for module in spelled.names},
        {module: _from_native(module, family) for module in spelled.names},
    ]
    if spelled.form == "kohya":
        namings = [{module: _from_kohya(module, family) for module in spelled.names}]
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


def _check_pairs(modules: Mapping[str, Mapping[Part, str]], others: Mapping[str, Mapping[str, str]], where: str) -> None:
    if not modules and not others:
        raise LoraError(str(Problem(f"{where} holds no tensor", "a LoRA has at least one pair", "Check that the file is complete.")))
    otherwise = {module for keys in others.values() for module in keys.values()}
    halves = [
        key
        for module, parts in modules.items()
        for key in parts.values()
        if not {"down", "up"} <= set(parts) and ({"down", "up"} & set(parts) or module not in otherwise)
    ]
    if halves:
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
