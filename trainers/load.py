"""A transformer or a VAE as a module, filled from a checkpoint: strictly, and with mapped tensors where nothing changes.

`native_state` is the way back: the tensors of a module as a native file holds them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import torch
from torch import nn

from .checkpoint import Checkpoint
from .errors import CheckpointError, KeyTableError, Problem
from .family import Detection, Family, VaeDetection
from .keytable import KeyTable, Place
from .offload.linear import FrozenLinear
from .offload.packing import dequantise
from .quantisation import FP8_DTYPES
from .quantise import Quantise, quantised


def load_transformer(
    checkpoint: Checkpoint,
    detection: Detection,
    device: torch.device | str,
    dtype: torch.dtype,
    keep_stored: bool | None = None,
    resident: bool = True,
    all_frozen: bool = False,
    quantise: Quantise = "none",
) -> nn.Module:
    """The frozen transformer, in eval mode, computing in `dtype`.

    What its class wants in float32 is float32. Linears in the blocks that are stored in another dtype become
    FrozenLinear, as they are stored; `keep_stored` False: dense in `dtype`; None: fp8 is kept, on a card also 16 bit
    (never what is larger than `dtype`). `quantise`: they are quantised instead, one after the other, where `device` is (fp8
    stays what it is with "fp8", and becomes nf4 with "nf4"). `all_frozen`: the dense ones become FrozenLinear too, so that
    every weight of a block can be bound and streamed. `resident` False: for `device`, but still on the CPU.

    Tensors that need no change of dtype or device are mapped from the file
    read-only: clone them before writing. On the meta device nothing is read, and Linears are kept as for a card.

    Raises CheckpointError when a tensor is missing, unexpected or of another shape than the model's.
    """
    device, family = torch.device(device), detection.family
    module = family.build(detection.config).requires_grad_(False).eval()
    place = device if resident else torch.device("cpu")
    source = _Source(checkpoint, _places(checkpoint, family.keys, module), place)
    float32_parts = set(getattr(module, "_keep_in_fp32_modules", None) or ())

    def dense(name: str) -> torch.Tensor:
        return source.dense(name, dtype if float32_parts.isdisjoint(name.split(".")) else torch.float32)

    state: dict[str, torch.Tensor] = {}
    for name, linear in list(_block_linears(module, family)):
        bias = None if linear.bias is None else dense(f"{name}.bias")
        if quantise == "nf4" or (quantise == "fp8" and source.dtype(f"{name}.weight") not in FP8_DTYPES):
            weight = replace(source, device=device).dense(f"{name}.weight", torch.float32)
            frozen = quantised(weight, bias, quantise, place)
        elif _is_kept(source, name, device, dtype, keep_stored):
            frozen = FrozenLinear(source.stored(f"{name}.weight"), bias, source.scale(f"{name}.weight"))
        elif all_frozen:
            frozen = FrozenLinear(dense(f"{name}.weight"), bias)
        else:
            continue
        state |= {f"{name}.{key}": tensor for key, tensor in frozen.state_dict().items()}
        parent, _, child = name.rpartition(".")
        setattr(module.get_submodule(parent), child, frozen.eval())
    return _filled(module, state | {name: dense(name) for name in module.state_dict() if name not in state}, place)


def load_vae(checkpoint: Checkpoint, detection: VaeDetection, device: torch.device | str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The frozen VAE, in eval mode and in `dtype`; tensors are mapped as in `load_transformer`.

    Raises CheckpointError when the checkpoint does not fit the model.
    """
    device = torch.device(device)
    module = detection.family.build_vae(detection).requires_grad_(False).eval()
    source = _Source(checkpoint, _places(checkpoint, detection.vae.keys, module), device)
    return _filled(module, {name: source.dense(name, dtype) for name in module.state_dict()}, device)


def linear_weights(path: Path, family: Family) -> Callable[[str], torch.Tensor]:
    """The dense float32 weights of a transformer's file or folder, each by the diffusers name of its Linear.

    Raises CheckpointError when the file cannot be read or, asked for a name, has no such weight.
    """
    checkpoint = Checkpoint.open(path)

    def weight(module: str) -> torch.Tensor:
        name = f"{module}.weight"
        place = Place(name) if name in checkpoint.tensors else family.keys.to_native(name)
        if place.name not in checkpoint.tensors:
            problem = Problem(f"{path.name} has no {place.name}", "the base is the model of the LoRA", "Give that model's file.")
            raise CheckpointError(problem)
        return _Source(checkpoint, {name: place}, torch.device("cpu")).dense(name, torch.float32)

    return weight


def under_native_names(state: Mapping[str, torch.Tensor], table: KeyTable) -> dict[str, torch.Tensor]:
    """A state dict whose names are native, or else diffusers': then as `native_state` gives it."""
    try:
        table.map_file(state)
    except KeyTableError:
        return native_state(state, table)
    return dict(state)


def native_state(state: Mapping[str, torch.Tensor], table: KeyTable) -> dict[str, torch.Tensor]:
    """A module's state dict under native names, fused and swapped as the native file has it.

    Raises KeyTableError for a name that no row matches, or when members of a fused tensor are missing.
    """
    pieces: dict[str, list[tuple[Place, torch.Tensor]]] = {}
    for name, tensor in state.items():
        place = table.to_native(name)
        pieces.setdefault(place.name, []).append((place, tensor))
    incomplete = [name for name, found in pieces.items() if sum(place.stop - place.start for place, _ in found) != found[0][0].total]
    if incomplete:
        raise KeyTableError(
            Problem(f"parts of {', '.join(incomplete)} are missing", "a fused tensor is written whole", "Give the whole state dict.")
        )
    return {name: _joined(found) for name, found in pieces.items()}


def _joined(pieces: list[tuple[Place, torch.Tensor]]) -> torch.Tensor:
    """One native tensor of its pieces; the inverse of `Place.cut`."""
    ordered = sorted(pieces, key=lambda piece: piece[0].start)
    parts = [place.uncut(tensor) for place, tensor in ordered]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


@dataclass(frozen=True)
class _Source:
    """The tensors of a checkpoint under the module's names."""

    checkpoint: Checkpoint
    places: Mapping[str, Place]
    device: torch.device

    def stored(self, name: str) -> torch.Tensor:
        """The tensor in its stored dtype, on the device."""
        place = self.places[name]
        return place.cut(self.checkpoint.tensor(place.name)).to(self.device)

    def dtype(self, name: str) -> torch.dtype:
        """What the tensor is stored in."""
        return self.checkpoint.tensors[self.places[name].name].dtype

    def scale(self, name: str) -> torch.Tensor | None:
        """What the stored tensor is to be multiplied with."""
        place = self.places[name]
        scale = self.checkpoint.scale(place.name.removesuffix(".weight")) if place.name.endswith(".weight") else None
        return scale if scale is None or not scale.ndim else place.cut(scale).to(self.device)

    def dense(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """The tensor's values in `dtype`, on the device."""
        scale = self.scale(name)
        return dequantise(self.stored(name), scale if scale is None or scale.ndim else float(scale), dtype)


def _places(checkpoint: Checkpoint, table: KeyTable, module: nn.Module) -> Mapping[str, Place]:
    """Where each tensor of the module lies in the checkpoint. Raises CheckpointError unless they fit one to one."""
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    named_as_native = sum(table.to_native(name).name in checkpoint.tensors for name in expected)
    named_as_module = len(expected.keys() & checkpoint.tensors.keys()) > max(len(expected) // 2, named_as_native)
    try:
        places = {name: Place(name) for name in checkpoint.tensors} if named_as_module else table.map_file(checkpoint.tensors)
    except KeyTableError as error:
        raise KeyTableError(error.problems, subject=checkpoint.path.name) from None
    found = {name: place.shape(checkpoint.tensors[place.name].shape) for name, place in places.items()}
    wrong = [f"{name} is {list(found[name])}, not {list(shape)}" for name, shape in expected.items() if found.get(name, shape) != shape]
    problems = [
        Problem(f"{len(names)} tensors {what} ({_some(names)})", "the file must fit the model tensor by tensor", remedy)
        for names, what, remedy in (
            ([name for name in expected if name not in found], "are missing", "Download the file again."),
            ([name for name in found if name not in expected], "are not of this model", "Check that it is the model you mean."),
            (wrong, "have another shape", "Check that it is the model you mean."),
        )
        if names
    ]
    if problems:
        raise CheckpointError(problems, subject=checkpoint.path.name)
    return places


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _block_linears(module: nn.Module, family: Family) -> Iterable[tuple[str, nn.Linear]]:
    """By name, the Linears in the family's blocks: elsewhere the model's class looks at the dtype of weights."""
    starts = tuple(f"{block}." for block in family.blocks)
    return ((name, child) for name, child in module.named_modules() if name.startswith(starts) and type(child) is nn.Linear)


def _is_kept(source: _Source, linear: str, device: torch.device, dtype: torch.dtype, keep_stored: bool | None) -> bool:
    """Whether a Linear stays as it is stored."""
    stored = source.dtype(f"{linear}.weight")
    if stored == dtype and source.scale(f"{linear}.weight") is None:
        return False
    if keep_stored is None:
        return stored in FP8_DTYPES or (device.type != "cpu" and stored.itemsize <= dtype.itemsize)
    return keep_stored


def _filled(module: nn.Module, state: Mapping[str, torch.Tensor], device: torch.device) -> nn.Module:
    """The module with the tensors themselves as its parameters. Buffers that no file stores are moved to the device."""
    module.load_state_dict(dict(state), strict=True, assign=True)
    module.to(device)
    missing = any(tensor.is_meta for tensor in chain(module.parameters(), module.buffers()))
    assert device.type == "meta" or not missing, "a tensor was not filled"
    return module
