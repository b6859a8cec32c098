"""Under ComfyUI's Python: what its models answer with a control LoRA by the pack's node. Tensors go both ways as files."""

from __future__ import annotations

import importlib
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from inside import load_pack
from safetensors.torch import load_file, save_file

SIGMA = 0.7
FPS = 25.0


def main(pack: str, tasks: list[dict[str, Any]]) -> list[Any]:
    """What each task finds, one after the other; as in a node, under inference mode."""
    name = load_pack(pack).__name__
    with torch.inference_mode():
        return [_answer(name, **task) for task in tasks]


def _answer(pack: str, family: str, refused: bool = False, **arguments: Any) -> Any:
    import comfy.model_management

    make = {"wan": _wan, "ltx": _ltx}[family]
    comfy.model_management.unload_all_models()  # one task leaves nothing to the next
    try:
        return make(pack, **arguments)
    except Exception as error:
        if not refused:
            raise
        return {"error": f"{type(error).__name__}: {error}"}


def _wan(
    pack: str,
    transformer: str,
    vae: str,
    inputs: str,
    steps: list[dict[str, Any]],
    output: str,
    tight: bool = False,
    dtype: str = "float32",
    between: bool = False,
    latent: list[int] | None = None,
) -> Any:
    """One Euler step from SIGMA to 0 with the LoRAs of `steps`, in this order; `tight`: nothing fits into memory.

    With `between` the model is also sampled after each step, and in the end as it was loaded: models that share their weights.
    """
    model, given = _model(transformer, dtype), load_file(inputs)
    graph = _Graph(pack, model, _wan_vae(vae), given)
    graph.latent = None if latent is None else {"samples": torch.zeros(latent)}
    with _log() as lines, _memory(tight):
        for step in steps:
            if "back" in step:
                graph.back_to(step.pop("back"))
            graph.apply(**step)
            graph.branches.append((graph.model, graph.positive, graph.negative, graph.latent))
            if between:
                graph.sample(graph.model, given["noise"])
        found = {"x0": graph.sample(graph.model, given["noise"]), **graph.control()}
        partial = graph.model.model.model_lowvram
        if between:
            found["bare"] = graph.sample(model, given["noise"])
    for name in found.keys() - {"control"}:
        found[name] = model.model.process_latent_in(found[name])
    save_file({name: tensor.clone().contiguous() for name, tensor in found.items()}, output)
    dtypes = sorted({str(tensor.dtype) for tensor in model.model.diffusion_model.state_dict().values()})
    return {"reports": graph.reports, "log": lines, "partial": partial, "dtypes": dtypes}


def _ltx(
    pack: str, transformer: str, inputs: str, steps: list[dict[str, Any]], output: str, tight: bool = False, latent: list[int] | None = None
) -> Any:
    """The same with a guide, cropped afterwards; `x0` is what was sampled, with the guide behind it."""
    from comfy_extras.nodes_lt import LTXVConditioning, LTXVCropGuides

    model, given = _model(transformer, "float32"), load_file(inputs)
    graph = _Graph(pack, model, _ltx_vae(), given)
    graph.positive, graph.negative = LTXVConditioning.execute(graph.positive, graph.negative, FPS).args
    graph.latent = None if latent is None else {"samples": torch.zeros(latent)}
    with _log() as lines, _memory(tight):
        for step in steps:
            graph.apply(**step)
        samples = graph.sample(graph.model, given["noise"])
    positive, _, cropped = LTXVCropGuides.execute(graph.positive, graph.negative, {**graph.latent, "samples": samples}).args
    found = {"x0": samples, "guide": graph.latent["samples"], "cropped": cropped["samples"]}
    save_file({name: tensor.clone().contiguous() for name, tensor in found.items()}, output)
    left = positive[0][1].get("keyframe_idxs") is not None
    return {"reports": graph.reports, "log": lines, "partial": model.model.model_lowvram, "guides left": left}


class _Graph:
    """The wires between the nodes of a graph."""

    def __init__(self, pack: str, model: Any, vae: Any, given: Mapping[str, torch.Tensor]) -> None:
        self.pack, self.model, self.vae, self.given = pack, model, vae, given
        self.positive = [[given["text"], {"attention_mask": given["mask"]} if "mask" in given else {}]]
        self.negative = [[0 * given["text"], {}]]
        self.latent: Any = None
        self.reports: list[str] = []
        self.branches = [(model, self.positive, self.negative, self.latent)]

    def back_to(self, steps: int) -> None:
        """To where the graph was after the first `steps` LoRAs: from there another branch goes on."""
        self.model, self.positive, self.negative, self.latent = self.branches[steps]

    def apply(self, path: str, strength: float = 1.0, by: str = "control", kind: str = "from the file", control: str = "control") -> None:
        """One LoRA: by the node for controls, by Apply LoRA, or by core's loader and, with a control, core's conditioning."""
        import comfy.sd
        import comfy.utils
        from comfy_extras.nodes_ip2p import InstructPixToPixConditioning

        if by == "core":
            tensors = comfy.utils.load_torch_file(path)
            self.model, _ = comfy.sd.load_lora_for_models(self.model, None, tensors, strength, 0.0)
            if control:
                wires = (self.positive, self.negative, self.given[control], self.vae)
                self.positive, self.negative, self.latent = InstructPixToPixConditioning.execute(*wires).args
            return
        if by == "apply":
            node = importlib.import_module(f"{self.pack}.nodes.lora").ApplyLoRA.PREPARE_CLASS_CLONE(None)
            self.model = node.execute(self.model, path, strength).args[0]
            return
        node = importlib.import_module(f"{self.pack}.nodes.control").ApplyControlLoRA.PREPARE_CLASS_CLONE(None)
        wires = (self.model, self.positive, self.negative, self.vae, self.given[control])
        answer = node.execute(*wires, path, strength, kind, self.latent)
        self.model, self.positive, self.negative, self.latent = answer.args
        self.reports.append(answer.ui["text"][0])

    def sample(self, model: Any, noise: torch.Tensor) -> torch.Tensor:
        """One step to a clean video, CFG 1: by core's sampler, with all that core does on the way."""
        import comfy.sample
        import comfy.samplers

        start = torch.zeros_like(noise) if self.latent is None else self.latent["samples"]
        mask = None if self.latent is None else self.latent.get("noise_mask")
        noise = torch.nn.functional.pad(noise, (0, 0, 0, 0, 0, start.shape[2] - noise.shape[2]))
        sigmas, euler = torch.tensor([SIGMA, 0.0]), comfy.samplers.sampler_object("euler")
        wires = (self.positive, self.negative, start)
        return comfy.sample.sample_custom(model, noise, 1.0, euler, sigmas, *wires, noise_mask=mask, disable_pbar=True)

    def control(self) -> dict[str, torch.Tensor]:
        """The control in the conditioning, normalised as the model sees it."""
        latents = self.positive[0][1].get("concat_latent_image")
        if latents is None:
            return {}
        return {"control": torch.cat([self.model.model.process_latent_in(part) for part in latents.split(16, dim=1)], dim=1)}


@cache
def _model(path: str, dtype: str) -> Any:
    import comfy.sd

    return comfy.sd.load_diffusion_model(path, model_options={"dtype": getattr(torch, dtype)})


@cache
def _wan_vae(path: str) -> Any:
    import comfy.sd
    import comfy.utils

    return comfy.sd.VAE(sd=comfy.utils.load_torch_file(path))


@cache
def _ltx_vae() -> Any:
    """ComfyUI's VAE of LTX-Video, small, with random weights."""
    import comfy.sd
    from comfy.ldm.lightricks.vae.causal_video_autoencoder import VideoVAE

    blocks = [["res_x", 1], *[["compress_all", 1]] * 3, ["res_x", 1]]
    config = {"dims": 3, "latent_channels": 128, "blocks": blocks, "patch_size": 4, "norm_layer": "pixel_norm", "latent_log_var": "uniform"}
    torch.manual_seed(0)
    state = {name: 0.05 * torch.randn_like(tensor) for name, tensor in VideoVAE(config=config).state_dict().items()}
    state["per_channel_statistics.std-of-means"] = torch.full((128,), 0.05)
    return comfy.sd.VAE(sd=state, metadata={"config": json.dumps({"vae": config})})


@contextmanager
def _memory(tight: bool) -> Iterator[None]:
    """Every model gets a budget of 0.1 byte when `tight`, which is what ComfyUI gives under --novram: nothing is materialised."""
    from comfy.model_management import LoadedModel

    load = LoadedModel.model_load
    if tight:
        LoadedModel.model_load = lambda self, _budget=0, **more: load(self, 0.1, **more)
    try:
        yield
    finally:
        LoadedModel.model_load = load


@contextmanager
def _log() -> Iterator[list[str]]:
    """Warnings and errors of ComfyUI."""
    lines: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger().addHandler(handler)
    try:
        yield lines
    finally:
        logging.getLogger().removeHandler(handler)
