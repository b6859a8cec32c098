"""DoRA (https://arxiv.org/abs/2402.09353): a LoRA with a learned length, the magnitude m, for each row of the weight.

Two readings of m are in use, and a file's spelling says which is meant:

    adapted   m * (W + sBA) / |W + sBA|    the paper and peft, as `lora_magnitude_vector`
    base      m * (W + sBA) / |W|          ComfyUI, as `dora_scale` (comfy/weight_adapter/base.py, weight_decompose)

|.| are the lengths of rows and s is alpha / rank. The same weights can be told either way, by who has W. Files whose
magnitudes belong to columns (LyCORIS can write such) are read by ComfyUI only.

Legend: R rank, I input features, O output features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from .adapter import Adapter, Lengths, LoraPair
from .errors import LoraError, Problem

Weights = Callable[[str], torch.Tensor]
"""The dense base weight (O, I) of a module, by its diffusers name, on any device."""


def row_lengths(weight_OI: torch.Tensor, down_RI: torch.Tensor, up_OR: torch.Tensor, scale: float) -> torch.Tensor:
    """|W + sBA| of each row, (O,), float32."""
    lengths: torch.Tensor = torch.addmm(weight_OI.float(), up_OR.float(), down_RI.float(), alpha=scale).norm(dim=1)
    return lengths


def with_lengths(adapter: Adapter, lengths: Lengths, weights: Weights) -> Adapter:
    """The same DoRA with magnitudes that mean `lengths`. A plain LoRA, and one that means them already, is returned as it is.

    Raises LoraError for magnitudes of columns.
    """
    if adapter.lengths == lengths or not adapter.is_dora:
        return adapter
    modules = {name: pair if pair.magnitude is None else _converted(pair, lengths, weights(name)) for name, pair in adapter.modules.items()}
    return Adapter(modules, adapter.metadata, lengths)


def as_dora(adapter: Adapter, weights: Weights) -> Adapter:
    """A plain LoRA as a DoRA of the same effect: its magnitudes are the lengths that the adapted rows have."""
    modules = {name: replace(pair, magnitude=_lengths(pair, weights(name))[1]) for name, pair in adapter.modules.items()}
    return Adapter(modules, adapter.metadata, "adapted")


def _converted(pair: LoraPair, lengths: Lengths, weight_OI: torch.Tensor) -> LoraPair:
    assert pair.magnitude is not None
    if not pair.by_rows:
        value = f"the DoRA has magnitudes {tuple(pair.magnitude.shape)} for a weight of {tuple(weight_OI.shape)}"
        raise LoraError(str(Problem(value, "peft and this trainer have one for each row", "Load it in ComfyUI as it is.")))
    base, adapted = _lengths(pair, weight_OI)
    factor = base / adapted if lengths == "base" else adapted / base
    return replace(pair, magnitude=pair.magnitude.float() * torch.where(factor.isfinite(), factor, 1.0))


def _lengths(pair: LoraPair, weight_OI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(|W|, |W + sBA|) of a pair's rows, each (O, 1), where the pair is."""
    down, up = (factor.to(weight_OI.device) for factor in (pair.down_RI, pair.up_OR))
    base, adapted = weight_OI.float().norm(dim=1), row_lengths(weight_OI, down, up, pair.scale)
    return base.to(pair.up_OR.device).unsqueeze(1), adapted.to(pair.up_OR.device).unsqueeze(1)
