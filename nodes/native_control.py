"""A control in a native model: further input channels (Wan), or reference frames beside the video (LTX-Video)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import comfy.model_management
import comfy.ops
import comfy.utils
import node_helpers
import torch

from ..trainers.control_lora import GrownEmbedding
from ..trainers.errors import LoraError, Problem

EMBEDDING = "diffusion_model.patch_embedding"
"""The module of a native Wan that reads the input's channels."""
CONCAT, GUIDES = "concat_latent_image", "keyframe_idxs"
"""What ComfyUI's conditioning calls the latents of further channels, and the places of reference frames."""


class GrownPatchEmbedding(comfy.ops.manual_cast.Conv3d):
    """A patch embedding with further input channels behind the model's own; the control LoRA is in its weight.

    ComfyUI grows a weight when it patches it, which it does not when the module stays in RAM (low VRAM): then the model
    looks as if it had no further channels. This weight has its size from the start. Ordinary LoRAs know the model's own
    channels only: ComfyUI patches them in through `convert_weight` and `set_weight`, or as functions when the module runs.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor, own_channels: int) -> None:
        """`weight` (out, own and further channels, *patch), `bias` (out,)."""
        out, channels, *patch = weight.shape
        super().__init__(channels, out, tuple(patch), tuple(patch), device=torch.device("meta"))
        self.weight, self.bias = (torch.nn.Parameter(tensor, requires_grad=False) for tensor in (weight, bias))
        self.own_channels = own_channels

    def convert_weight(self, weight: torch.Tensor, **_: Any) -> torch.Tensor:
        """What an ordinary LoRA patches: the model's own channels."""
        return weight[:, : self.own_channels]

    def set_weight(self, own_weight: torch.Tensor, inplace_update: bool = False, **_: Any) -> None:
        """Takes the patched part back."""
        further = self.weight[:, self.own_channels :].to(own_weight.device)
        grown = torch.cat([own_weight.to(further.dtype), further], dim=1)
        if inplace_update:
            self.weight.data.copy_(grown)
        else:
            self.weight = torch.nn.Parameter(grown, requires_grad=False)

    def forward(self, x_BCFHW: torch.Tensor) -> torch.Tensor:
        functions: list[Any] = self.weight_function
        self.weight_function = []
        try:
            weight, bias, held = comfy.ops.cast_bias_weight(self, x_BCFHW, offloadable=True)
        finally:
            self.weight_function = functions
        if functions:
            own_weight = self.convert_weight(weight).clone()
            for function in functions:
                own_weight = function(own_weight)
            weight = torch.cat([own_weight, weight[:, self.own_channels :]], dim=1)
        out = self._conv_forward(x_BCFHW, weight, bias)
        comfy.ops.uncast_bias_weight(self, weight, bias, held)
        return out


def input_channels(model: Any) -> tuple[int, int]:
    """(the channels of a Wan's own input, those of the controls that it already has)."""
    module = model.get_model_object(EMBEDDING)
    own = getattr(module, "own_channels", module.weight.shape[1])
    return own, module.weight.shape[1] - own


def grow(model: Any, tensors: Mapping[str, torch.Tensor], lora: GrownEmbedding, strength: float) -> None:
    """Gives a MODEL (a clone) the further channels of a control LoRA, behind those it has.

    Raises LoraError when the LoRA's shapes are not those of the model's patch embedding.
    """
    own, controls = input_channels(model)
    weight, bias = _unpatched(model)
    delta = _delta(tensors, lora)
    _check_shapes(weight, delta, own, tensors, lora)
    grown = torch.cat([weight, torch.zeros_like(delta[:, own:])], dim=1)
    grown[:, :own] += strength * delta[:, :own]
    grown[:, own + controls :] = strength * delta[:, own:]
    model.add_object_patch(EMBEDDING, GrownPatchEmbedding(grown, bias, own))


def with_channels(conditioning: Any, latents_BCFHW: torch.Tensor, controls: int) -> Any:
    """The conditioning with the latents of one more control, behind those of the `controls` channels that the model has."""
    made = []
    for entry in conditioning:
        before = entry[1].get(CONCAT)
        latents = latents_BCFHW if before is None or not controls else torch.cat([before[:, :controls], latents_BCFHW], dim=1)
        made += node_helpers.conditioning_set_values([entry], {CONCAT: latents})
    return made


def empty(*shape: int) -> dict[str, torch.Tensor]:
    """A LATENT of zeros, to sample on; `shape` (B, C, F, H, W)."""
    return {"samples": torch.zeros(shape, device=comfy.model_management.intermediate_device())}


def with_guide(positive: Any, negative: Any, vae: Any, latent: dict[str, Any], frames_FHWC: torch.Tensor) -> tuple[Any, Any, Any]:
    """(positive, negative, LATENT) with a reference beside the video, as ComfyUI's own node for guides adds it.

    Raises ValueError when there is a guide already: ComfyUI could not tell afterwards how much to crop; and for several videos.
    """
    from comfy_extras.nodes_lt import LTXVAddGuide

    if any(entry[1].get(GUIDES) is not None for entry in [*positive, *negative]):
        rule = "there can be one reference, from the first frame on"
        raise ValueError(str(Problem("the conditioning has a guide already", rule, "Wire the conditioning from before the other guide.")))
    if (videos := latent["samples"].shape[0]) != 1:
        rule = "a reference goes with one"
        raise ValueError(str(Problem(f"the latent holds {videos} videos", rule, "Set batch_size to 1.")))
    return tuple(LTXVAddGuide.execute(positive, negative, vae, latent, frames_FHWC, frame_idx=0, strength=1.0).args)


def _unpatched(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Copies of the patch embedding's weight and bias in float32, without what LoRAs in memory add to them now."""
    module = model.get_model_object(EMBEDDING)
    in_use = module is comfy.utils.get_attr(model.model, EMBEDDING)  # only then is what is kept this module's
    found = []
    for name in ("weight", "bias"):
        kept = model.backup.get(f"{EMBEDDING}.{name}") if in_use else None
        stored = kept.weight if kept else getattr(module, name)
        found.append(stored.detach().to("cpu", torch.float32, copy=True))
    return found[0], found[1]


def _delta(tensors: Mapping[str, torch.Tensor], lora: GrownEmbedding) -> torch.Tensor:
    """What the LoRA adds to the grown weight, (out, channels, *patch) in float32."""
    down, up = tensors[lora.down].float(), tensors[lora.up].float()
    scale = tensors[lora.alpha].item() / down.shape[0] if lora.alpha else 1.0
    return scale * (up.flatten(1) @ down.flatten(1)).reshape(up.shape[0], *down.shape[1:])


def _check_shapes(weight: torch.Tensor, delta: torch.Tensor, own: int, tensors: Mapping[str, torch.Tensor], lora: GrownEmbedding) -> None:
    stated = tuple(tensors[lora.shape].tolist()) if lora.shape else tuple(delta.shape)
    fits = delta.shape[0] == weight.shape[0] and delta.shape[2:] == weight.shape[2:]
    if stated == tuple(delta.shape) and fits and delta.shape[1] > own:
        return
    value = f"patch_embedding is {(weight.shape[0], own, *weight.shape[2:])} in the model, {stated} in the LoRA"
    if stated != tuple(delta.shape):
        value = f"reshape_weight says {stated}, but the LoRA's product is {tuple(delta.shape)}"
    rule = "a control LoRA keeps the model's width and patch and adds input channels"
    raise LoraError(str(Problem(value, rule, "Load the model that it was trained on.")))
