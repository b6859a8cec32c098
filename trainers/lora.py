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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .adapter import Adapter, LoraPair, float32
from .errors import LoraError, Problem
from .family import Family, LoraTargets
from .job import LoraSpec
from .lora_keys import listed

ADAPTER = "default"


class MasterLinear(nn.Linear):
    """A factor of a LoRA: a float32 master weight, used in the dtype of its input."""

    weight: nn.Parameter

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__(weight.shape[1], weight.shape[0], bias=False, device="meta")
        self.weight = nn.Parameter(weight)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.linear(input, self.weight.to(input.dtype))

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> MasterLinear:
        """Moves the weight where `fn` moves tensors, in float32: `.to(dtype)` of the transformer does not reach it."""

        def moved(weight: torch.Tensor) -> torch.Tensor:
            return fn(weight) if weight.is_meta else weight.to(fn(weight.new_empty(0)).device)

        super()._apply(moved, recurse)  # type: ignore[no-untyped-call]
        return self


def inject(transformer: nn.Module, family: Family, spec: LoraSpec, seed: int, *, device: torch.device | None = None) -> list[nn.Parameter]:
    """Freeze the transformer, put a LoRA on its target Linears, and return the parameters to train.

    A is uniform in +-1/sqrt(I), B is zero: the output is unchanged. Each A depends on `seed` and its module's name only;
    no global generator is touched. `device` is where the parameters live; None: beside each base weight (CPU for a base
    on meta).

    Raises LoraError when no Linear matches or the transformer has a LoRA already.
    """
    from peft import LoraConfig, inject_adapter_in_model

    pattern = _target_pattern(family.targets, spec.targets)
    _check_targets(transformer, family, pattern)
    transformer.requires_grad_(False)
    config = LoraConfig(
        r=spec.rank,
        lora_alpha=_alpha(spec),
        lora_dropout=spec.dropout,
        target_modules=pattern,
        init_lora_weights=False,
    )
    inject_adapter_in_model(config, transformer, adapter_name=ADAPTER, low_cpu_mem_usage=True)
    return [parameter for name, layer in _layers(transformer) for parameter in _make_masters(layer, name, spec.rank, seed, device)]


def adapter_state(transformer: nn.Module, spec: LoraSpec) -> Adapter:
    """The LoRA of an injected transformer, as float32 copies on the CPU, by diffusers module names."""
    alpha = _alpha(spec)
    return Adapter({name: LoraPair(_copy(_factor(layer, "A")), _copy(_factor(layer, "B")), alpha) for name, layer in _layers(transformer)})


def load_adapter_state(transformer: nn.Module, adapter: Adapter) -> None:
    """Set the LoRA of an injected transformer to `adapter`'s.

    A different alpha is taken into B, so the effect is the adapter's. Raises LoraError, with every difference, unless
    modules, shapes and ranks are the same.
    """
    layers = dict(_layers(transformer))
    if problems := _differences(layers, adapter):
        raise LoraError("\n".join(str(problem) for problem in problems))
    with torch.no_grad():
        for name, pair in adapter.modules.items():
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


def _target_pattern(targets: LoraTargets, which: str) -> str:
    patterns = targets.attention if which == "attention" else targets.attention + targets.feed_forward
    return "|".join(f"(?:{pattern})" for pattern in patterns)


def _check_targets(transformer: nn.Module, family: Family, pattern: str) -> None:
    if _layers(transformer):
        problem = Problem("the transformer has a LoRA already", "one LoRA is trained at a time", "Load the transformer again.")
        raise LoraError(str(problem))
    if not any(isinstance(module, nn.Linear) and re.fullmatch(pattern, name) for name, module in transformer.named_modules()):
        value = f"no Linear of {type(transformer).__name__} is a target of {family.title}"
        raise LoraError(str(Problem(value, "a LoRA needs layers to adapt", "Check that the transformer is of this family.")))


def _layers(transformer: nn.Module) -> list[tuple[str, Any]]:
    """(module name, peft's LoRA layer) of every adapted Linear, in the order of the model."""
    from peft.tuners.lora import LoraLayer

    return [(name, module) for name, module in transformer.named_modules() if isinstance(module, LoraLayer)]


def _make_masters(layer: Any, name: str, rank: int, seed: int, device: torch.device | None) -> list[nn.Parameter]:
    """Replace peft's factors by float32 masters."""
    base_device = layer.get_base_layer().weight.device
    device = device or (torch.device("cpu") if base_device.type == "meta" else base_device)
    down = MasterLinear(_initial_down(name, rank, layer.in_features, seed).to(device))
    up = MasterLinear(torch.zeros(layer.out_features, rank, device=device))
    layer.lora_A[ADAPTER], layer.lora_B[ADAPTER] = down, up
    layer.cast_input_dtype_enabled = False
    return [down.weight, up.weight]


def _initial_down(name: str, rank: int, in_features: int, seed: int) -> torch.Tensor:
    """A (R, I) as in LoRA (arXiv 2106.09685) and its reference code: Kaiming uniform with a = sqrt(5)."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    bound = 1.0 / math.sqrt(in_features)
    return torch.empty(rank, in_features).uniform_(-bound, bound, generator=generator)


def _factor(layer: Any, letter: str) -> nn.Parameter:
    factors = layer.lora_A if letter == "A" else layer.lora_B
    weight: nn.Parameter = factors[ADAPTER].weight
    return weight


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
        if here != there:
            value = f"{name} of the LoRA has rank {there[0][0]} (A {there[0]}, B {there[1]})"
            found.append(Problem(value, f"this job has rank {here[0][0]} (A {here[0]}, B {here[1]})", "Set `lora.rank` to the LoRA's."))
    return found[:10]


def _shapes(down: torch.Tensor, up: torch.Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return tuple(down.shape), tuple(up.shape)
