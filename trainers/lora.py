"""A LoRA inside a transformer: put in, taken out, put back, switched off.

peft carries the branch `x -> dropout -> A -> B * alpha / rank`. Its factors are float32 whatever the base is stored in
(peft would give an fp8 base an fp8 LoRA), and each is cast to the activations' dtype where it is used, so training in
bf16 never lifts an activation to float32.

Legend: R rank, I input features, O output features.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .adapter import Adapter, LoraPair, float32
from .dora import Weights, as_dora, with_lengths
from .errors import KeyTableError, LoraError, Problem
from .family import Family, LoraTargets
from .job import LoraSpec
from .keytable import Fuse, KeyTable
from .lora_keys import listed
from .masters import Branch, Magnitude, MasterLinear
from .offload.linear import FrozenLinear

if TYPE_CHECKING:
    from .checkpoint import Checkpoint

ADAPTER = "default"


def inject(transformer: nn.Module, family: Family, spec: LoraSpec, seed: int, *, device: torch.device | None = None) -> list[nn.Parameter]:
    """Freeze the transformer, put a LoRA on its target Linears, and return the parameters to train.

    A is uniform in +-1/sqrt(I), B is zero, and a DoRA's magnitudes are the lengths of the base's rows: the output is
    unchanged. Each A depends on `seed` and its module's name only;
    no global generator is touched. `device` is where the parameters live; None: beside each base weight (CPU for a base
    on meta).

    Raises LoraError when no Linear matches, the transformer has a LoRA already, or a DoRA meets a base that is not dense.
    """
    from peft import LoraConfig, inject_adapter_in_model

    pattern = target_pattern(family.targets, spec.targets)
    _check_targets(transformer, family, pattern)
    if spec.dora:
        _check_dense(transformer, pattern)
    transformer.requires_grad_(False)
    config = LoraConfig(
        r=spec.rank,
        lora_alpha=_alpha(spec),
        lora_dropout=spec.dropout,
        target_modules=pattern,
        init_lora_weights=False,
        use_dora=spec.dora,
    )
    inject_adapter_in_model(config, transformer, adapter_name=ADAPTER, low_cpu_mem_usage=True)
    return [parameter for name, layer in _layers(transformer) for parameter in _make_masters(layer, name, spec.rank, seed, device)]


def adapter_state(transformer: nn.Module, spec: LoraSpec) -> Adapter:
    """The LoRA of an injected transformer, as float32 copies on the CPU, by diffusers module names."""
    alpha = _alpha(spec)
    return Adapter({name: _pair(layer, alpha) for name, layer in _layers(transformer)})


def base_weights(transformer: nn.Module) -> Weights:
    """The base weight of each adapted Linear, as `dora` asks for them."""
    layers = dict(_layers(transformer))
    return lambda name: layers[name].get_base_layer().weight.detach()


def load_adapter_state(transformer: nn.Module, adapter: Adapter) -> None:
    """Set the LoRA of an injected transformer to `adapter`'s.

    A different alpha is taken into B, so the effect is the adapter's; a plain LoRA becomes a DoRA of the same effect where
    one is trained. Raises LoraError, with every difference, unless modules, shapes and ranks are the same.
    """
    layers = dict(_layers(transformer))
    if problems := _differences(layers, adapter):
        raise LoraError("\n".join(str(problem) for problem in problems))
    if any(_magnitude(layer) is not None for layer in layers.values()):
        weights = base_weights(transformer)
        adapter = with_lengths(adapter, "adapted", weights) if adapter.is_dora else as_dora(adapter, weights)
    with torch.no_grad():
        for name, pair in adapter.modules.items():
            if pair.magnitude is not None:
                _magnitude(layers[name]).copy_(pair.magnitude.squeeze(1))
            rescale = pair.scale / layers[name].scaling[ADAPTER]
            _factor(layers[name], "A").copy_(pair.down_RI)
            _factor(layers[name], "B").copy_(pair.up_OR if rescale == 1.0 else pair.up_OR.float() * rescale)


def set_enabled(transformer: nn.Module, enabled: bool) -> None:
    """Let the LoRA take part in the forward pass, or not. While it does not, its parameters get no gradient."""
    for _, layer in _layers(transformer):
        layer.enable_adapters(enabled)


@contextmanager
def without_lora(transformer: nn.Module) -> Iterator[None]:
    """Within it the transformer is the bare base; afterwards the LoRA is as it was."""
    was_enabled = [layer for _, layer in _layers(transformer) if not layer.disable_adapters]
    set_enabled(transformer, False)
    try:
        yield
    finally:
        for layer in was_enabled:
            layer.enable_adapters(True)


def _alpha(spec: LoraSpec) -> float:
    return float32(spec.alpha or spec.rank)


def target_pattern(targets: LoraTargets, which: str) -> str:
    """A regular expression for the diffusers names of the Linears that `LoraSpec.targets` stands for."""
    patterns = targets.attention if which == "attention" else targets.attention + targets.feed_forward
    return "|".join(f"(?:{pattern})" for pattern in patterns)


def _check_targets(transformer: nn.Module, family: Family, pattern: str) -> None:
    if _layers(transformer):
        problem = Problem("the transformer has a LoRA already", "one LoRA is trained at a time", "Load the transformer again.")
        raise LoraError(str(problem))
    if not any(isinstance(module, nn.Linear) and re.fullmatch(pattern, name) for name, module in transformer.named_modules()):
        value = f"no Linear of {type(transformer).__name__} is a target of {family.title}"
        raise LoraError(str(Problem(value, "a LoRA needs layers to adapt", "Check that the transformer is of this family.")))


def dora_problem(checkpoint: Checkpoint, family: Family, spec: LoraSpec) -> Problem | None:
    """Why a DoRA cannot be trained on a checkpoint, by the dtypes in its header; None when it can, or none is asked for."""
    if not spec.dora:
        return None
    pattern = target_pattern(family.targets, spec.targets)
    if torn := _partly_targets(pattern, family.lora_keys):
        rule = f"{torn} is one weight of {family.title}'s files, and a DoRA changes the lengths of all of its rows or of none"
        return Problem(f"lora.dora is true, lora.targets is {spec.targets}", rule, "Set lora.targets to attention+feed_forward.")
    packed = {name.removesuffix(".weight"): stored.dtype for name, stored in checkpoint.tensors.items() if stored.dtype.itemsize == 1}
    found = {name: dtype for name, dtype in packed.items() if any(re.fullmatch(pattern, module) for module in _modules(name, family))}
    if not found:
        return None
    dtype = str(next(iter(found.values()))).removeprefix("torch.")
    return _not_dense(f"lora.dora is true and {checkpoint.path.name} stores {len(found)} of the layers it trains as {dtype}")


def _partly_targets(pattern: str, table: KeyTable) -> str | None:
    """A native weight of which some members are targets and others are not."""
    for row in table.rows:
        if isinstance(row, Fuse):
            members = [bool(re.fullmatch(pattern, name.replace("{}", "0"))) for name in row.diffusers]
            if any(members) and not all(members):
                return row.native.replace("{}", "0")
    return None


def _modules(name: str, family: Family) -> list[str]:
    """What a checkpoint's module is called in diffusers, whichever of the two namings it has."""
    with suppress(KeyTableError):
        return [name, *(place.name for place in family.keys.to_diffusers(name))]
    return [name]


def _check_dense(transformer: nn.Module, pattern: str) -> None:
    stored = [name for name, module in transformer.named_modules() if isinstance(module, FrozenLinear) and re.fullmatch(pattern, name)]
    if stored:
        raise LoraError(str(_not_dense(f"{listed(stored)} are kept as they are stored")))


def _not_dense(value: str) -> Problem:
    """The problem of a DoRA on a base of which `value` is said."""
    rule = "DoRA measures every row of the base in each step, so the base must be dense"
    return Problem(value, rule, "Give the bf16 or fp16 file of the model, or set lora.dora to false.")


def _layers(transformer: nn.Module) -> list[tuple[str, Any]]:
    """(module name, peft's LoRA layer) of every adapted Linear, in the order of the model."""
    from peft.tuners.lora import LoraLayer

    return [(name, module) for name, module in transformer.named_modules() if isinstance(module, LoraLayer)]


def _make_masters(layer: Any, name: str, rank: int, seed: int, device: torch.device | None) -> list[nn.Parameter]:
    """Replace peft's factors by float32 masters."""
    base_device = layer.get_base_layer().weight.device
    device = device or (torch.device("cpu") if base_device.type == "meta" else base_device)
    down = MasterLinear(initial_down(name, rank, layer.in_features, seed, device))
    up = MasterLinear(torch.zeros(layer.out_features, rank, device=device))
    layer.lora_A[ADAPTER], layer.lora_B[ADAPTER] = down, up
    layer.cast_input_dtype_enabled = False
    if not layer.lora_magnitude_vector:
        layer.lora_variant[ADAPTER] = Branch
        return [down.weight, up.weight]
    lengths_O = layer.get_base_layer().weight.detach().float().norm(dim=1).to(device)
    layer.lora_magnitude_vector[ADAPTER] = magnitude = Magnitude(lengths_O)
    return [down.weight, up.weight, magnitude.weight]


def initial_down(name: str, rank: int, in_features: int, seed: int, device: torch.device) -> torch.Tensor:
    """A (R, I) as in LoRA (arXiv 2106.09685) and its reference code: Kaiming uniform with a = sqrt(5).

    The same bits on every CPU: `rand` is whole numbers over 2^24, so the doubling and the subtraction are exact and only the
    product is rounded. (`uniform_(-bound, bound)` rounds once or twice, depending on whether the CPU has fused multiply-add.)
    """
    if device.type == "meta":
        return torch.empty(rank, in_features, device=device)
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    bound = 1.0 / math.sqrt(in_features)
    return ((2.0 * torch.rand(rank, in_features, generator=generator) - 1.0) * bound).to(device)


def _factor(layer: Any, letter: str) -> nn.Parameter:
    factors = layer.lora_A if letter == "A" else layer.lora_B
    weight: nn.Parameter = factors[ADAPTER].weight
    return weight


def _magnitude(layer: Any) -> Any:
    """The magnitudes (O,) of a DoRA layer, or None."""
    return layer.lora_magnitude_vector[ADAPTER].weight if layer.lora_magnitude_vector else None


def _pair(layer: Any, alpha: float) -> LoraPair:
    magnitude = _magnitude(layer)
    copied = None if magnitude is None else _copy(magnitude).unsqueeze(1)
    return LoraPair(_copy(_factor(layer, "A")), _copy(_factor(layer, "B")), alpha, copied)


def _copy(parameter: nn.Parameter) -> torch.Tensor:
    return parameter.detach().to("cpu", torch.float32, copy=True).contiguous()


def _differences(layers: dict[str, Any], adapter: Adapter) -> list[Problem]:
    found = []
    if missing := sorted(set(layers) - set(adapter.modules)):
        rule, remedy = "every target of this job must be in it", "Choose the same `lora.targets` as the LoRA was trained with."
        found.append(Problem(f"the LoRA lacks {listed(missing)}", rule, remedy))
    if extra := sorted(set(adapter.modules) - set(layers)):
        rule, remedy = "each of its modules must be a target of this job", "Choose the same `lora.targets` as the LoRA was trained with."
        found.append(Problem(f"the LoRA also has {listed(extra)}", rule, remedy))
    for name in sorted(set(layers) & set(adapter.modules)):
        here, there = _shapes(_factor(layers[name], "A"), _factor(layers[name], "B")), adapter.modules[name].shapes
        if adapter.modules[name].magnitude is not None and (problem := _magnitude_problem(layers[name], name, adapter.modules[name])):
            found.append(problem)
        if here != there:
            value = f"{name} of the LoRA has rank {there[0][0]} (A {there[0]}, B {there[1]})"
            found.append(Problem(value, f"this job has rank {here[0][0]} (A {here[0]}, B {here[1]})", "Set `lora.rank` to the LoRA's."))
    return found[:10]


def _magnitude_problem(layer: Any, name: str, pair: LoraPair) -> Problem | None:
    """Why the magnitudes of a DoRA cannot be taken over, or None."""
    assert pair.magnitude is not None
    here, there = _magnitude(layer), tuple(pair.magnitude.shape)
    if here is None:
        return Problem(f"{name} of the LoRA is a DoRA", "this job trains a plain LoRA", "Set `lora.dora` to true.")
    if there != (len(here), 1):
        return Problem(f"{name} of the DoRA has magnitudes {there}", f"one for each row is trained, ({len(here)}, 1)", "Use another LoRA.")
    return None


def _shapes(down: torch.Tensor, up: torch.Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return tuple(down.shape), tuple(up.shape)
