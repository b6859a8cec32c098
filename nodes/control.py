"""A control LoRA and its control video in a graph."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.model_base
import torch
from comfy_api.latest import io

from ..trainers.control_lora import ControlLora, recognise
from ..trainers.errors import LoraError, Problem
from ..trainers.family import families
from . import host, native_control, native_lora
from .control_frames import Grid, VideoSize, grid_of, own_size, resized, size_of, told
from .schema import ADVANCED, schema

BY_FILE, IC_LORA = "from the file", "IC-LoRA"


class ApplyControlLoRA(io.ComfyNode):
    """Patches a control LoRA into a model, and its control video into the conditioning."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "ApplyControlLoRA",
            "Apply Control LoRA",
            "Applies a control LoRA together with its control video (depth, edges, a blurred video ...): for Wan one that adds "
            "input channels, for LTX-Video an IC-LoRA. The control is brought to a size that the model can make; what was done "
            "is said in the node. For LTX-Video put LTXVCropGuides behind the sampler.",
            inputs=[
                io.Model.Input("model", tooltip="The model. Other LoRAs may be applied before and after this node."),
                io.Conditioning.Input("positive", tooltip="The prompt. LTX-Video: from LTXVConditioning."),
                io.Conditioning.Input("negative", tooltip="The negative prompt. LTX-Video: from LTXVConditioning."),
                io.Vae.Input("vae", tooltip="The model's VAE: the control is encoded by it."),
                io.Image.Input(
                    "control", tooltip="The control's frames, prepared as the LoRA was trained: depth, edges, poses, a blur ..."
                ),
                io.Combo.Input("lora", _choices(), tooltip="The control LoRA's file."),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-20.0,
                    max=20.0,
                    step=0.05,
                    tooltip="How much of the LoRA is added. 1 is as it was trained; much less breaks the control.",
                ),
                io.Combo.Input(
                    "kind",
                    [BY_FILE, IC_LORA],
                    default=BY_FILE,
                    tooltip="An IC-LoRA is known by its metadata or its name; choose it here when neither says so.",
                    extra_dict=ADVANCED,
                ),
                io.Latent.Input(
                    "latent",
                    optional=True,
                    tooltip="The video to make: the control is brought to its size. Empty, of a first frame (LTXVImgToVideo), or "
                    "encoded. Without it: an empty one of the control's own size.",
                ),
            ],
            outputs=[
                io.Model.Output("model", tooltip="The model with the LoRA."),
                io.Conditioning.Output("positive", tooltip="With the control. LTX-Video: also for LTXVCropGuides."),
                io.Conditioning.Output("negative", tooltip="With the control. LTX-Video: also for LTXVCropGuides."),
                io.Latent.Output("latent", tooltip="To sample on. LTX-Video: the control lies behind it until LTXVCropGuides."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, lora: str, **others: Any) -> str:
        if lora == host.NONE:
            return ""
        path = host.lora_path(lora)
        return f"{path} {path.stat().st_mtime_ns}"

    @classmethod
    def execute(
        cls,
        model: Any,
        positive: Any,
        negative: Any,
        vae: Any,
        control: torch.Tensor,
        lora: str,
        strength: float,
        kind: str,
        latent: dict[str, Any] | None = None,
    ) -> io.NodeOutput:
        _check_vae(model, vae)
        grid, found = grid_of(model, vae), size_of(control)
        video = own_size(found, grid) if latent is None else grid.size(latent["samples"])
        if lora == host.NONE:
            latent = latent or _empty(model, video, grid)
            return io.NodeOutput(model, positive, negative, latent, ui={"text": ["no control LoRA chosen: nothing is controlled"]})
        path = host.lora_path(lora)
        known = recognise(path, as_reference=kind == IC_LORA)
        _check_model(model, known, path)
        used = _used(found, video, grid, known)
        patched, matched = _patched(model, known, path, strength)
        frames_FHWC = resized(control, used)
        latent = latent or _empty(model, video, grid)
        if known.kind == "channels":
            _, controls = native_control.input_channels(model)
            latents = vae.encode(frames_FHWC)
            positive, negative = (native_control.with_channels(entry, latents, controls) for entry in (positive, negative))
        else:
            positive, negative, latent = native_control.with_guide(positive, negative, vae, latent, frames_FHWC)
        lines = [f"{path.name}: {_KINDS[known.kind]} for {known.title} ({known.reason})", *matched, told(found, used, grid)]
        return io.NodeOutput(patched, positive, negative, latent, ui={"text": ["\n".join([*lines, f"video: {video}", *_notes(known)])]})


_KINDS = {"channels": "control by input channels", "reference": "IC-LoRA"}


def _choices() -> list[str]:
    return [host.NONE, *host.lora_names()]


def _notes(known: ControlLora) -> list[str]:
    return ["behind the sampler: LTXVCropGuides"] if known.kind == "reference" else []


def _empty(model: Any, video: VideoSize, grid: Grid) -> dict[str, torch.Tensor]:
    shape = (1, model.model.latent_format.latent_channels, (video.frames - 1) // grid.stride + 1)
    return native_control.empty(*shape, video.height // grid.spatial_stride, video.width // grid.spatial_stride)


def _used(found: VideoSize, video: VideoSize, grid: Grid, known: ControlLora) -> VideoSize:
    """What of the control is used: all of the video's size, or fewer frames. Raises ValueError where it is too short."""
    frames = min(grid.floor_frames(found.frames), video.frames)
    if known.kind == "channels" and frames < video.frames:
        problem = Problem(
            f"the control has {found.frames} frames, the video {video.frames}",
            f"a control for {known.title} goes with every frame",
            f"Make the video {frames} frames long, or leave `latent` unconnected.",
        )
        raise ValueError(str(problem))
    return VideoSize(video.width, video.height, frames)


def _patched(model: Any, known: ControlLora, path: Path, strength: float) -> tuple[Any, list[str]]:
    """(the model with the LoRA, which of its layers matched). Raises LoraError for a model of another size."""
    stored = host.read_tensors(path)
    grown = known.embedding.keys if known.embedding else set()
    fit = native_lora.fit(model, {known.native[key]: tensor for key, tensor in stored.items() if key not in grown})
    if fit.misfits or (fit.total and not fit.matched):
        _refuse(fit, path)
    patched = native_lora.patched(model, fit, strength)
    if known.embedding:
        native_control.grow(patched, stored, known.embedding, strength)
    more = bool(known.embedding)
    told = [f"{fit.matched + more} of {fit.total + more} layers matched, strength {strength:g}"]
    return patched, told + [f"not used: {name}" for name in fit.unmatched[:5]]


def _refuse(fit: native_lora.Fit, path: Path) -> None:
    if fit.misfits:
        name, layer, lora = fit.misfits[0]
        value = f"{path.name} is for a model of another size: {name} is {layer} in the model, {lora} in the LoRA"
    else:
        value = f"none of the {fit.total} layers of {path.name} is in this model ({fit.model})"
    raise LoraError(str(Problem(value, "a control LoRA fits the model that it was trained on", "Load that model.")))


def _check_model(model: Any, known: ControlLora, path: Path) -> None:
    """Raises LoraError when the LoRA is for another family, or for text to video where the model has other inputs already."""
    controls = families()[known.family].control
    assert controls is not None
    if not isinstance(model.model, getattr(comfy.model_base, controls.comfyui_model)):
        value = f"{path.name} is a control LoRA for {known.title}, the model is {type(model.model).__name__}"
        raise LoraError(str(Problem(value, "a control LoRA fits the model that it was trained on", f"Load {known.title}.")))
    if known.embedding is None:
        return
    (own, _), latent = native_control.input_channels(model), model.model.latent_format.latent_channels
    further = known.embedding.channels - own
    if own == latent and further == latent:
        return
    problem = Problem(
        f"the model has {own} input channels, {path.name} makes them {known.embedding.channels}; the control has {latent}",
        f"the channels of one control are added to the {latent} of a text to video model",
        "Load the text to video model that it was trained on; for an ordinary LoRA use Apply LoRA.",
    )
    raise LoraError(str(problem))


def _check_vae(model: Any, vae: Any) -> None:
    expected = model.model.latent_format.latent_channels
    if vae.latent_channels != expected or not vae.downscale_index_formula:
        value = f"the VAE's latents have {vae.latent_channels} channels"
        raise ValueError(str(Problem(value, f"this model's have {expected}", "Wire the model's own VAE.")))


NODES = [ApplyControlLoRA]
