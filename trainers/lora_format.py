"""LoRA files: read every common form, write three, and go between them without losing a bit.

`native` (ComfyUI and diffusers load the same file) and `diffusers` have the scale alpha / rank folded into B and carry no
alpha; `kohya` keeps B as trained beside its alpha. The metadata remember what folding hid, so that

    native -> form -> native      is the same file, byte for byte, if this program wrote the first
    form -> native -> form        has the same A, alpha and alpha / rank * B, bit for bit, and the same B too when the
                                  scale is a power of two or B is stored in 16 bits; for a float32 B and another scale
                                  (e.g. alpha 24, rank 32) some elements of B differ in their last place

The magnitudes of a DoRA keep their bits between native and kohya, where they mean what ComfyUI makes of them; between
these and the diffusers form they are converted, which needs the base (see `dora`).

A file is never changed in place: writing over a file with other bytes is refused.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from .adapter import Adapter, Lengths, LoraPair
from .dora import with_lengths
from .errors import LoraError, Problem
from .family import Family
from .keytable import KeyTable
from .load import linear_weights
from .lora_fold import fold, fuse, split, unfold
from .lora_keys import Form, Part, Spelled, check_plain, diffusers_key, family_of_lora, kohya_key, native_key, parse
from .stable_file import save_file

__all__ = ["Adapter", "Form", "LoraHeader", "LoraPair", "convert", "native_tensors", "read_header", "read_lora", "write_lora"]

UNFOLD_KEY = "video_trainer.unfold"
"""What folding hid: {"alpha": number or {module: number}, "dtype": of B, if folding had to widen it}."""
PEFT_KEY = "lora_adapter_metadata"
"""diffusers' header entry with the LoraConfig, its fields prefixed by "transformer."."""
_OURS_TO_MAKE = {"format", UNFOLD_KEY, PEFT_KEY}
_LENGTHS: dict[Form, Lengths] = {"native": "base", "kohya": "base", "diffusers": "adapted"}
_OTHER_FORM: dict[Form, str] = {"native": "diffusers form", "kohya": "diffusers form", "diffusers": "native form"}
_NARROW = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def read_lora(path: Path, family: Family | None = None) -> Adapter:
    """The LoRA in a safetensors file of any form; B as it was trained, where the file tells.

    Raises LoraError when the file cannot be read, holds anything that is not a LoRA or DoRA pair, or is a LoRA of another family
    than `family` (None: of any that is known).
    """
    return _read_lora(path, family)[1]


def write_lora(
    path: Path,
    adapter: Adapter,
    family: Family,
    form: Form = "native",
    metadata: Mapping[str, str] | None = None,
    *,
    overwrite: bool = False,
) -> None:
    """Write a LoRA in one of the forms; equal adapters and metadata are equal bytes.

    `metadata` is added to the adapter's own. Raises LoraError when `path` holds something else (unless `overwrite`) or the
    magnitudes of a DoRA are not those of the form, and KeyTableError when the family has no such module.
    """
    record = {} if form == "kohya" else _recorded(adapter.modules)
    tensors = _spelled(adapter, family, form, path.name)
    try:
        save_file(tensors, path, {**adapter.metadata, **(metadata or {}), "format": "pt", **record}, overwrite=overwrite)
    except FileExistsError as error:
        problem = Problem(f"{path} exists and is another file", "no file is overwritten", "Choose another name or move it away.")
        raise LoraError(str(problem)) from error
    except OSError as error:
        problem = Problem(f"{path} cannot be written ({error.strerror})", "the folder must exist and have room", "Choose another folder.")
        raise LoraError(str(problem)) from error


def native_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a LoRA file of any form as the native form has them. Raises LoraError as reading and writing do."""
    family, adapter = _read_lora(path, None)
    return _spelled(adapter, family, "native", path.name)


def convert(source: Path, target: Path, form: Form, base: Path | None = None) -> None:
    """Write the LoRA file `source` again as `target`, in another form.

    `base` is the transformer's file or folder; only a DoRA between diffusers and the other forms needs it. Raises LoraError
    as reading and writing do, and CheckpointError when the base cannot be read.
    """
    family, adapter = _read_lora(source, None)
    if base is not None and adapter.is_dora:
        adapter = with_lengths(adapter, _LENGTHS[form], linear_weights(base, family))
    write_lora(target, adapter, family, form)


def _check_magnitudes(adapter: Adapter, form: Form, name: str) -> None:
    if adapter.is_dora and adapter.lengths != _LENGTHS[form]:
        value = f"{name} is to be a DoRA in {form} form, its magnitudes are those of the {_OTHER_FORM[form]}"
        rule = "ComfyUI divides rows by their length in the base, diffusers and peft by that in the adapted weight"
        raise LoraError(str(Problem(value, rule, "Name the base it was trained on: convert ... --base FILE.")))
    if form == "diffusers" and any(pair.magnitude is not None and not pair.by_rows for pair in adapter.modules.values()):
        value = f"{name} is to be in diffusers form, its magnitudes are those of columns"
        raise LoraError(str(Problem(value, "peft has one for each row", "Use the native or kohya form.")))


def _read_lora(path: Path, family: Family | None) -> tuple[Family, Adapter]:
    tensors, metadata = _read(path)
    spelled = parse(tensors, path.name)
    check_plain(spelled, path.name)
    family, members = family_of_lora(spelled, family, path.name)
    modules: dict[str, LoraPair] = {}
    check_shapes(spelled, {key: tuple(tensor.shape) for key, tensor in tensors.items()}, path.name)
    for module, pair in _pairs(spelled, tensors).items():
        modules.update(split(pair, members[module]))
    if spelled.form != "kohya":
        modules = _as_trained(modules, metadata, path)
    kept = {key: value for key, value in metadata.items() if key not in _OURS_TO_MAKE}
    return family, Adapter(modules, kept, _lengths(spelled))


def _lengths(spelled: Spelled) -> Lengths:
    """What a file's magnitudes mean, by how they are spelt."""
    keys = (keys["magnitude"] for keys in spelled.modules.values() if "magnitude" in keys)
    return "base" if any(key.endswith(".dora_scale") for key in keys) else "adapted"


@dataclass(frozen=True)
class LoraHeader:
    """What a LoRA file holds, without its factors: {key: shape}, {alpha key: value}, and the metadata."""

    shapes: Mapping[str, tuple[int, ...]]
    alphas: Mapping[str, float]
    metadata: Mapping[str, str]


def read_header(path: Path) -> LoraHeader:
    """The header of a LoRA file and its alphas. Raises LoraError when the file cannot be read."""
    with _opened(path) as file:
        keys = list(file.keys())
        alphas = {key: float(file.get_tensor(key)) for key in keys if key.endswith(".alpha")}
        return LoraHeader({key: tuple(file.get_slice(key).get_shape()) for key in keys}, alphas, file.metadata() or {})


def _read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    with _opened(path) as file:
        keys = list(file.keys())
        return {key: file.get_tensor(key) for key in keys}, file.metadata() or {}


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        problem = Problem(
            f"{path} cannot be read ({error})", "a LoRA is a safetensors file", "Check the path and that the file is complete."
        )
        raise LoraError(str(problem)) from None


def check_shapes(spelled: Spelled, shapes: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Raise LoraError for factors that do not fit each other."""
    pairs = {module: keys for module, keys in spelled.modules.items() if "down" in keys}
    for module, keys in pairs.items():
        down, up = shapes[keys["down"]], shapes[keys["up"]]
        if len(down) != 2 or len(up) != 2 or down[0] != up[1]:
            value = f"{where}: {module} has A {down} and B {up}"
            raise LoraError(str(Problem(value, "A must be rank x in and B out x rank", "Use a LoRA of Linear layers.")))
        magnitude = shapes[keys["magnitude"]] if "magnitude" in keys else (up[0], 1)
        if magnitude not in ((up[0], 1), (up[0],), (1, down[1])):
            value = f"{where}: {module} has magnitudes {magnitude} for a weight of {(up[0], down[1])}"
            raise LoraError(str(Problem(value, "a DoRA has one for each row or column", "Check that the file is complete.")))


def _pairs(spelled: Spelled, tensors: Mapping[str, torch.Tensor]) -> dict[str, LoraPair]:
    """The pairs by module as spelt; alpha = rank where there is none."""
    found = {}
    for module, keys in spelled.modules.items():
        down_RI, up_OR = tensors[keys["down"]], tensors[keys["up"]]
        alpha = tensors[keys["alpha"]].item() if "alpha" in keys else down_RI.shape[0]
        magnitude = tensors[keys["magnitude"]] if "magnitude" in keys else None
        rows_or_columns = magnitude.unsqueeze(1) if magnitude is not None and magnitude.ndim == 1 else magnitude
        found[module] = LoraPair(down_RI, up_OR, float(alpha), rows_or_columns)
    return found


def _as_trained(modules: dict[str, LoraPair], metadata: Mapping[str, str], path: Path) -> dict[str, LoraPair]:
    """Give back what the file's metadata say: our record of folding, or peft's alpha, which the file left out."""
    if UNFOLD_KEY in metadata:
        record = unfold_record(metadata, path)
        return {name: _unfolded(name, pair, record) for name, pair in modules.items()}
    config = _peft_config(metadata, path)
    return {name: replace(pair, alpha=_peft_alpha(config, name, pair)) for name, pair in modules.items()}


def _unfolded(name: str, pair: LoraPair, record: Mapping[str, Any]) -> LoraPair:
    alpha = record.get("alpha", pair.rank)
    alpha = alpha.get(name, pair.rank) if isinstance(alpha, dict) else alpha
    return unfold(pair, alpha, _NARROW.get(record.get("dtype", ""), pair.up_OR.dtype)) if pair.scale == 1.0 else pair


def unfold_record(metadata: Mapping[str, str], path: Path) -> dict[str, Any]:
    """What folding hid, by the file's metadata; empty if nothing. Raises LoraError when the record is damaged."""
    record = json_object(metadata.get(UNFOLD_KEY, "{}"), UNFOLD_KEY, path)
    alpha = record.get("alpha", {})
    if not all(isinstance(value, float) and value > 0 for value in (alpha.values() if isinstance(alpha, dict) else [alpha])):
        problem = Problem(f"{path.name}: {UNFOLD_KEY} has alpha {alpha}", "alphas are positive numbers", "Use an undamaged file.")
        raise LoraError(str(problem))
    return record


def json_object(text: str, key: str, path: Path) -> dict[str, Any]:
    """A JSON object of a file's metadata. Raises LoraError naming `key` when it is none."""
    try:
        return dict(json.loads(text))
    except (ValueError, TypeError):
        problem = Problem(f"{path.name}: {key} is {text[:40]!r}", "it must be a JSON object", "Use an undamaged file.")
        raise LoraError(str(problem)) from None


def _peft_config(metadata: Mapping[str, str], path: Path) -> dict[str, Any]:
    """Peft's LoraConfig, from diffusers' header entry or from the adapter_config.json that peft writes beside the file."""
    beside = path.with_name("adapter_config.json")
    if PEFT_KEY in metadata:
        config = json_object(metadata[PEFT_KEY], PEFT_KEY, path)
        return {key.removeprefix("transformer."): value for key, value in config.items()}
    if path.name.startswith("adapter_model") and beside.exists():
        return json_object(beside.read_text("utf-8"), beside.name, path)
    return {}


def _peft_alpha(config: Mapping[str, Any], name: str, pair: LoraPair) -> float:
    """Alpha of a module as peft would have it: by pattern, and divided by sqrt(rank) under rank-stabilised LoRA."""
    patterns = config.get("alpha_pattern") or {}
    matching = (value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", name))
    alpha = next(matching, config.get("lora_alpha", pair.alpha))
    return float(alpha * math.sqrt(pair.rank)) if config.get("use_rslora") else float(alpha)


def _recorded(modules: Mapping[str, LoraPair]) -> dict[str, str]:
    """The metadata that let `unfold` go back; none where folding changes nothing."""
    if all(pair.scale == 1.0 for pair in modules.values()):
        return {}
    alphas = {name: pair.alpha for name, pair in modules.items()}
    record: dict[str, Any] = {"alpha": alphas if len(set(alphas.values())) > 1 else next(iter(alphas.values()))}
    dtypes = {pair.up_OR.dtype for pair in modules.values()}
    for name, dtype in _NARROW.items():
        if dtypes == {dtype}:
            record["dtype"] = name
    return {UNFOLD_KEY: json.dumps(record, sort_keys=True)}


def _native_pairs(modules: Mapping[str, LoraPair], keys: KeyTable) -> dict[str, LoraPair]:
    """The pairs by native module, members of one native tensor fused."""
    natives = dict.fromkeys(keys.to_native(name).name for name in modules)
    found = {}
    for native in natives:
        members = keys.to_diffusers(native)
        found[native] = fuse([modules.get(member.name) for member in members], members)
    return found


def _spelled(adapter: Adapter, family: Family, form: Form, name: str) -> dict[str, torch.Tensor]:
    """The tensors of a file called `name` in a form."""
    _check_magnitudes(adapter, form, name)
    modules = adapter.modules if form == "kohya" else {module: fold(pair) for module, pair in adapter.modules.items()}
    if form != "diffusers":  # ComfyUI knows kohya's prefix before the names of its own checkpoints only
        modules = _native_pairs(modules, family.keys if form == "kohya" else family.lora_keys)
    spell = {"native": native_key, "diffusers": diffusers_key, "kohya": kohya_key}[form]
    found: dict[str, torch.Tensor] = {}
    for module, pair in modules.items():
        magnitude = pair.magnitude
        if magnitude is not None and form == "diffusers":
            magnitude = magnitude.squeeze(1)
        alpha = torch.tensor(pair.alpha) if form == "kohya" else None
        parts: dict[Part, torch.Tensor | None] = {"down": pair.down_RI, "up": pair.up_OR, "alpha": alpha, "magnitude": magnitude}
        found |= {spell(module, part): tensor for part, tensor in parts.items() if tensor is not None}
    return found
