"""What a LoRA file is, by its keys, shapes and metadata: family, kind, form, rank, alpha, coverage, trigger words."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .family import Family
from .keytable import Fuse, KeyTable, Place
from .lora_format import LoraHeader, check_shapes, read_header, unfold_record
from .lora_keys import Spelled, family_of_lora, parse
from .lora_metadata import OURS

_BLOCK = re.compile(r"(?P<list>\w+)\.(?P<index>\d+)\.(?P<part>.+)")
_LYCORIS = ("LoKr", "LoHa", "OFT", "GLoRA")
_RANK_KEYS = re.compile(r".+\.(lokr_w[12]_b|hada_w1_b)")
_TAGS = 10


@dataclass(frozen=True)
class Coverage:
    """How many of a family's targets of one kind are adapted, in the blocks that the LoRA touches."""

    what: str
    adapted: int
    targets: int

    def __str__(self) -> str:
        return f"{self.what} {self.adapted} of {self.targets}"


@dataclass(frozen=True)
class LoraDescription:
    """What `inspect` says of a LoRA file.

    `kind` is LoRA, DoRA, "DoRA of columns", LoKr, LoHa, OFT, GLoRA, "full differences" or "control LoRA" (it widens the model's
    input); `also` names what else is in it. `ranks` is empty where the kind has none. `parts` are the names of adapted modules
    within a block, `blocks` says which ("blocks 0-29").
    """

    family: str
    kind: str
    also: tuple[str, ...]
    form: str
    ranks: tuple[int, ...]
    alphas: tuple[float, ...]
    modules: int
    coverage: tuple[Coverage, ...]
    others: int
    blocks: tuple[str, ...]
    parts: tuple[str, ...]
    trigger_words: tuple[str, ...]
    base: str | None
    variant: str | None
    step: int | None

    def __str__(self) -> str:
        covered = [*map(str, self.coverage), *([f"{self.others} others"] if self.others else [])]
        scale = [f"{name} {_either(values)}" for name, values in (("rank", self.ranks), ("alpha", self.alphas)) if values]
        lines = [
            f"{' with '.join([self.kind, *self.also])} for {self.family}, {self.form} form",
            ", ".join(scale) or "without rank",
            f"{self.modules} modules ({', '.join(covered)}) in {', '.join(self.blocks) or 'no block'}",
            f"layers: {', '.join(self.parts)}",
        ]
        known = {"variant": self.variant, "base": self.base, "step": self.step, "trigger words": ", ".join(self.trigger_words)}
        return "\n".join(lines + [f"{name}: {value}" for name, value in known.items() if value not in (None, "")])


def describe(path: Path, family: Family | None = None) -> LoraDescription:
    """What a LoRA file is, by its header and alphas alone.

    Raises LoraError when the file cannot be read, holds a key that belongs to nothing known, or is a LoRA of another family
    than `family` (None: of any that is known).
    """
    header = read_header(path)
    spelled = parse(header.shapes, path.name)
    family, members = family_of_lora(spelled, family, path.name)
    if "wider weights" not in spelled.others:
        check_shapes(spelled, header.shapes, path.name)
    kind, also = _kind(spelled, header)
    names = [place.name for places in members.values() for place in places]
    matches = [_BLOCK.fullmatch(name) for name in names]
    coverage, shares = tuple(_coverage(names, family)), _shares(spelled, header, members)
    return LoraDescription(
        family=family.title,
        kind=kind,
        also=also,
        form=_form(spelled, members),
        ranks=_ranks(spelled, header, shares),
        alphas=tuple(sorted(_alphas(spelled, header, shares, path))),
        modules=len(names),
        coverage=coverage,
        others=len(names) - sum(item.adapted for item in coverage),
        blocks=tuple(_ranges([(match["list"], int(match["index"])) for match in matches if match])),
        parts=tuple(sorted({match["part"] if match else name for name, match in zip(names, matches, strict=True)})),
        trigger_words=tuple(_trigger_words(header.metadata)),
        base=header.metadata.get(f"{OURS}base") or header.metadata.get("ss_sd_model_name"),
        variant=_variant(header.metadata),
        step=_number(header.metadata.get(f"{OURS}step") or header.metadata.get("ss_steps")),
    )


def expert_of(path: Path) -> str:
    """Which of two experts a LoRA is for, by its metadata ("high" or "low"); else "". Raises LoraError when it cannot be read."""
    return read_header(path).metadata.get(f"{OURS}expert", "")


def _kind(spelled: Spelled, header: LoraHeader) -> tuple[str, tuple[str, ...]]:
    """The kind, and what else there is."""
    has_magnitudes = any("magnitude" in keys for keys in spelled.modules.values())
    others = sorted(set(spelled.others) - {"wider weights", *_LYCORIS})
    if "wider weights" in spelled.others:
        return "control LoRA", tuple(others)
    if lycoris := [name for name in _LYCORIS if name in spelled.others]:
        return " and ".join(lycoris), (*others, *(["magnitudes"] if has_magnitudes else []))
    if not spelled.modules and others == ["full differences"]:
        return "full differences", ()
    if not has_magnitudes:
        return "LoRA", tuple(others)
    by_rows = all(_by_rows(keys, header.shapes) for keys in spelled.modules.values() if "magnitude" in keys)
    return "DoRA" if by_rows else "DoRA of columns", tuple(others)


def _by_rows(keys: Mapping[Any, str], shapes: Mapping[str, tuple[int, ...]]) -> bool:
    return shapes[keys["magnitude"]][0] == shapes[keys["up"]][0]


def _form(spelled: Spelled, members: Mapping[str, Sequence[Place]]) -> str:
    """The form, and whose it is where it differs from the three that are written here."""
    diffusers_names = all([place.name for place in places] == [module] for module, places in members.items())
    if spelled.form == "diffusers" and not diffusers_names:
        return f"native names behind {spelled.prefix}" if spelled.prefix else "bare native names"
    return "peft" if spelled.prefix.startswith("base_model.") else spelled.form


def _ranks(spelled: Spelled, header: LoraHeader, shares: Mapping[str, int]) -> tuple[int, ...]:
    pairs = {header.shapes[keys["down"]][0] // shares[module] for module, keys in spelled.modules.items() if "down" in keys}
    others = {header.shapes[key][0] for keys in spelled.others.values() for key in keys if _RANK_KEYS.fullmatch(key)}
    return tuple(sorted(pairs | others))


def _alphas(spelled: Spelled, header: LoraHeader, shares: Mapping[str, int], path: Path) -> set[float]:
    """Those that were folded into B, else those of the file; alpha = rank for a pair without one."""
    record = unfold_record(header.metadata, path).get("alpha", {})
    if folded := set(record.values()) if isinstance(record, dict) else {record}:
        return folded
    found = {header.alphas[keys["alpha"]] / shares.get(module, 1) for module, keys in spelled.modules.items() if "alpha" in keys}
    without = [module for module, keys in spelled.modules.items() if "down" in keys and "alpha" not in keys]
    return found | {float(header.shapes[spelled.modules[module]["down"]][0] // shares[module]) for module in without}


def _shares(spelled: Spelled, header: LoraHeader, members: Mapping[str, Sequence[Place]]) -> dict[str, int]:
    """How many members' ranks make up that of each pair, as far as shapes tell.

    A pair over a fused weight may be one LoRA of that rank, or its members' side by side: these, where the others then have
    the same rank, or where there are no others.
    """
    ranks = {module: header.shapes[keys["down"]][0] for module, keys in spelled.modules.items() if "down" in keys}
    single = {rank for module, rank in ranks.items() if len(members[module]) == 1}
    found = {}
    for module, rank in ranks.items():
        counts = [count for count in range(len(members[module]), 1, -1) if rank % count == 0]
        fitting = [count for count in counts if rank // count in single]
        found[module] = 1 if rank in single else next(iter(fitting), 1) if single else next(iter(counts), 1)
    return found


def _coverage(names: Sequence[str], family: Family) -> Iterator[Coverage]:
    """For attention and feed-forward, how many modules are adapted, and how many such modules the same blocks have."""
    blocks = {(match["list"], match["index"]) for name in names if (match := _BLOCK.fullmatch(name))}
    known = {pattern for pattern in _patterns(family.keys) if "{}" in pattern} | {
        re.sub(r"\.\d+\.", ".{}.", name, count=1) for name in names
    }
    possible = {pattern.replace("{}", index) for pattern in known for block, index in blocks if pattern.startswith(f"{block}.{{}}.")}
    for what, patterns in (("attention", family.targets.attention), ("feed-forward", family.targets.feed_forward)):
        targets = {name for name in possible if any(re.fullmatch(pattern, name) for pattern in patterns)}
        if adapted := targets.intersection(names):
            yield Coverage(what, len(adapted), len(targets))


def _patterns(table: KeyTable) -> set[str]:
    return {name for row in table.rows for name in (row.diffusers if isinstance(row, Fuse) else (row.diffusers,))}


def _ranges(blocks: Iterable[tuple[str, int]]) -> Iterator[str]:
    """Each list of blocks by its name, with the indices in it: blocks 0-29, 35."""
    lists: dict[str, set[int]] = {}
    for name, index in blocks:
        lists.setdefault(name, set()).add(index)
    for name, indices in sorted(lists.items()):
        starts = [index for index in sorted(indices) if index - 1 not in indices]
        ends = [index for index in sorted(indices) if index + 1 not in indices]
        told = (str(start) if start == end else f"{start}-{end}" for start, end in zip(starts, ends, strict=True))
        yield f"{name} {', '.join(told)}"


def _variant(metadata: Mapping[str, str]) -> str | None:
    architecture = metadata.get("modelspec.architecture", "").partition("/")[0]
    return metadata.get(f"{OURS}variant") or metadata.get("ss_base_model_version") or architecture or None


def _trigger_words(metadata: Mapping[str, str]) -> Iterable[str]:
    """Our list, else the phrase, else the most frequent tags of kohya's trainers."""
    ours = _json(metadata.get(f"{OURS}trigger_words"))
    if isinstance(ours, list):
        return [str(word) for word in ours]
    if phrase := metadata.get("modelspec.trigger_phrase"):
        return [phrase]
    datasets = _json(metadata.get("ss_tag_frequency"))
    counts: dict[str, float] = {}
    for tags in datasets.values() if isinstance(datasets, dict) else ():
        for tag, count in tags.items() if isinstance(tags, dict) else ():
            counts[tag.strip()] = counts.get(tag.strip(), 0) + (count if isinstance(count, (int, float)) else 0)
    return sorted(counts, key=lambda tag: -counts[tag])[:_TAGS]


def _json(text: str | None) -> Any:
    try:
        return json.loads(text or "null")
    except ValueError:
        return None


def _number(text: str | None) -> int | None:
    return int(text) if text and text.isdigit() else None


def _either(values: Sequence[float]) -> str:
    return " or ".join(f"{value:g}" for value in values)
