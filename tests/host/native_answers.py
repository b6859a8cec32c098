"""Under ComfyUI's Python: what its own objects answer, made by the pack's loaders. Tensors go both ways as files."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from inside import load_pack
from safetensors.torch import load_file, save_file


def main(pack: str, tasks: list[dict[str, Any]]) -> list[Any]:
    """What the function of each `task` returns, one after the other; as in a node, under inference mode."""
    name = load_pack(pack).__name__
    with torch.inference_mode():
        return [_answer(lambda module: importlib.import_module(f"{name}.{module}"), **task) for task in tasks]


Modules = Callable[[str], Any]


def _answer(modules: Modules, task: str, **arguments: Any) -> Any:
    return _TASKS[task](modules, **arguments)


def _velocity(modules: Modules, base: Mapping[str, Any], inputs: str, output: str, lora: str | None, weight_dtype: str | None) -> Any:
    """The velocity that ComfyUI's model means, as its samplers ask for it, with the LoRA by core's own loader."""
    import comfy.model_management

    log = _Log()
    model = _with_lora(_model(modules, base, weight_dtype), lora)
    comfy.model_management.load_models_gpu([model])
    given = load_file(inputs)
    x, sigma = given["noisy_BCFHW"], given["sigma_B"]
    clean = model.model.apply_model(x, sigma, c_crossattn=given["text_BLD"])
    velocity = (x - clean.float()) / sigma.reshape(-1, 1, 1, 1, 1)
    save_file({"velocity": velocity.clone()}, output)
    return {
        "class": type(model.model).__name__,
        "dtype": str(model.model.get_dtype()),
        "patched": len(model.patches),
        "log": log.lines,
    }


def _denoise(
    modules: Modules, base: Mapping[str, Any], inputs: str, output: str, lora: str | None = None, options: Mapping[str, Any] | None = None
) -> Any:
    """One step of ComfyUI's own sampler, conditioning and masks included: {"velocity", "noisy"}, for one clip in float32.

    `inputs` holds clean_BCFHW and noise_BCFHW (normalised, B = 1), sigma (a number), text_BLD, perhaps noise_mask (1 where
    something is predicted), and "cond/<key>" tensors of the conditioning, latents among them normalised; `options` are its
    plain values. With an image encoder's rows: "cond/image_embeds".
    """
    import comfy.samplers

    log = _Log()
    model = _with_lora(_model(modules, base, None), lora)
    given, seen = load_file(inputs), {}

    def one_step(model_k: Any, x: torch.Tensor, sigmas: torch.Tensor, extra_args: Any, **_: Any) -> torch.Tensor:
        seen["noisy"], seen["clean"] = x, model_k(x, sigmas[:1].expand(len(x)), **extra_args)
        return seen["clean"]

    conditioning = [[given["text_BLD"], _conditioning(model, given) | dict(options or {})]]
    sigma = given["sigma"].reshape(1)
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(conditioning, conditioning)
    guider.set_cfg(1.0)
    guider.sample(
        given["noise_BCFHW"],
        model.model.process_latent_out(given["clean_BCFHW"]),
        comfy.samplers.KSAMPLER(one_step),
        torch.cat([sigma, torch.zeros(1)]),
        denoise_mask=given.get("noise_mask"),
        disable_pbar=True,
        seed=0,
    )
    save_file({"velocity": (seen["noisy"] - seen["clean"]) / sigma, "noisy": seen["noisy"].clone()}, output)
    return {"class": type(model.model).__name__, "patched": len(model.patches), "log": log.lines}


def _sample(
    modules: Modules,
    base: Mapping[str, Any],
    inputs: str,
    output: str,
    steps: int,
    cfg: float,
    shift: float | None = None,
    sampler: str = "euler",
    scheduler: str = "simple",
    lora: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Any:
    """What ComfyUI's KSampler makes of given noise in float32: {"latents" (normalised), "sigmas"}.

    `inputs` as for `_denoise`: clean_BCFHW (the latent image; none: zeros), negative_BLD, "negative/<key>" tensors where the
    negative conditioning has others than "cond/<key>", and "sigmas" where not those of `scheduler`. `shift`: of Model
    Sampling SD3 (None: without that node).
    """
    import comfy.sample
    import comfy.samplers
    from comfy_extras.nodes_model_advanced import ModelSamplingSD3

    log = _Log()
    model = _with_lora(_model(modules, base, None), lora)
    if shift is not None:
        model = ModelSamplingSD3().patch(model, shift)[0]
    given = load_file(inputs)
    sigmas = given.get("sigmas", comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), scheduler, steps))
    noise, clean = given["noise_BCFHW"], given.get("clean_BCFHW")
    positive = _conditioning(model, given) | dict(options or {})
    negative = positive | _conditioning(model, given, "negative/")
    samples = comfy.sample.sample(
        model,
        noise,
        steps,
        cfg,
        sampler,
        scheduler,
        [[given["text_BLD"], positive]],
        [[given["negative_BLD"], negative]],
        torch.zeros_like(noise) if clean is None else model.model.process_latent_out(clean),
        noise_mask=given.get("noise_mask"),
        sigmas=sigmas,
        disable_pbar=True,
        seed=0,
    )
    save_file({"latents": model.model.process_latent_in(samples).contiguous(), "sigmas": sigmas.clone()}, output)
    return {"class": type(model.model).__name__, "patched": len(model.patches), "log": log.lines}


def _bare_vae(modules: Modules, kind: str, arguments: Mapping[str, Any], weights: str, inputs: str, output: str) -> Any:
    """What a VAE class of ComfyUI, `kind` "module:class", gives in float32: {"moments", "pixels"} of pixels_BCFHW and latents_BCFHW."""
    module, _, name = kind.partition(":")
    vae = getattr(importlib.import_module(module), name)(**arguments).eval()
    vae.load_state_dict(load_file(weights), strict=True)
    given = load_file(inputs)
    found = {"moments": vae.encode(given["pixels_BCFHW"]), "pixels": vae.decode(given["latents_BCFHW"])}
    save_file({name: tensor.clone().contiguous() for name, tensor in found.items()}, output)


def _clip_vision(modules: Modules, config: str, weights: str, image: str, output: str) -> Any:
    """What CLIP Vision Encode gives for an image_HWC with crop "none": {"rows"} before the last layer."""
    import comfy.clip_vision

    encoder = comfy.clip_vision.ClipVisionModel(config)
    missing, unexpected = encoder.load_sd(load_file(weights))
    found = encoder.encode_image(load_file(image)["image_HWC"][None], crop=False)
    save_file({"rows": found["penultimate_hidden_states"][0].clone()}, output)
    return {"missing": missing, "unexpected": unexpected}


def _vae_of_another_variant(modules: Modules, base: Mapping[str, Any], variant: str) -> str:
    """What is said about the VAE of a base when it is wired to another variant."""
    vae = _run(modules, "LoadEncoders", base)[1]
    try:
        modules("nodes.graph_encoder").GraphEncoder(_base(modules, {**base, "variant": variant}), vae)
    except modules("trainers.errors").CheckpointError as error:
        return str(error)
    return ""


_LATENTS = ("concat_latent_image", "ref_latent")


def _conditioning(model: Any, given: Mapping[str, torch.Tensor], prefix: str = "cond/") -> dict[str, Any]:
    """The conditioning's own values, latents as a VAE gives them."""
    import comfy.clip_vision

    found: dict[str, Any] = {name.removeprefix(prefix): tensor for name, tensor in given.items() if name.startswith(prefix)}
    for name in _LATENTS:
        if name in found:
            found[name] = model.model.process_latent_out(found[name])
    if "image_embeds" in found:
        output = comfy.clip_vision.Output()
        output["penultimate_hidden_states"] = found.pop("image_embeds")
        found["clip_vision_output"] = output
    return found


def _vae_both_ways(modules: Modules, base: Mapping[str, Any], inputs: str, output: str) -> Any:
    """{"latents", "pixels"} of ComfyUI's VAE for `inputs`' pixels_BCFHW in [-1, 1] and normalised latents_BCFHW, one clip.

    What a decoder draws it draws after the seed 0.
    """
    family, variant = modules("trainers.family").family_of(base["variant"])
    vae = modules("nodes.native").load_vae(Path(base["vae"]), family, variant)
    given, latent_format = load_file(inputs), modules("nodes.native").latent_format(family.comfyui(variant))
    encoded = vae.encode(given["pixels_BCFHW"][0].permute(1, 2, 3, 0).add(1.0).div(2.0))
    torch.manual_seed(0)
    pixels_BFHWC = vae.decode(latent_format.process_out(given["latents_BCFHW"]))
    pixels_BCFHW = pixels_BFHWC.reshape(1, *pixels_BFHWC.shape[-4:]).permute(0, 4, 1, 2, 3).mul(2.0).sub(1.0)
    save_file({"latents": latent_format.process_in(encoded).contiguous(), "pixels": pixels_BCFHW.contiguous()}, output)
    return {"class": type(vae.first_stage_model).__name__, "dtype": str(vae.vae_dtype)}


def _with_lora(model: Any, lora: str | None) -> Any:
    """The model with a LoRA by core's own loader."""
    import comfy.sd
    import comfy.utils

    return comfy.sd.load_lora_for_models(model, None, comfy.utils.load_torch_file(lora), 1.0, 0.0)[0] if lora else model


def _model(modules: Modules, base: Mapping[str, Any], weight_dtype: str | None) -> Any:
    """What LoadTransformer gives; without `weight_dtype` in float32."""
    if weight_dtype is not None:
        return _run(modules, "LoadTransformer", base, weight_dtype)[0]
    path, family = Path(base["transformer"]), modules("trainers.family").families()[base["family"]]
    if path not in _LAST_MODEL:
        _LAST_MODEL.clear()
        _LAST_MODEL[path] = modules("nodes.native").load_transformer(path, family, {"dtype": torch.float32})
    return _LAST_MODEL[path].clone()


_LAST_MODEL: dict[Path, Any] = {}
"""The bare model that was asked last: what is put on it is put on a clone, as graphs do."""


def _node_sigmas(modules: Modules, module: str, node: str, arguments: Mapping[str, Any], latent: list[int] | None = None) -> list[float]:
    """The noise levels that a scheduler node gives, for a latent of that shape."""
    given = dict(arguments) | ({"latent": {"samples": torch.zeros(latent)}} if latent else {})
    (sigmas,) = getattr(importlib.import_module(module), node).execute(**given).args
    return [float(sigma) for sigma in sigmas]


def _weights(modules: Modules, base: Mapping[str, Any], output: str) -> Any:
    """The state dict of the MODEL and VAE of a base, as they were loaded."""
    model = _run(modules, "LoadTransformer", base)[0]
    state = {f"model.{name}": tensor for name, tensor in model.model.diffusion_model.state_dict().items()}
    if base.get("vae"):
        vae = _run(modules, "LoadEncoders", base)[1]
        state |= {f"vae.{name}": tensor for name, tensor in vae.first_stage_model.state_dict().items()}
    save_file({name: tensor.clone().contiguous() for name, tensor in state.items()}, output)
    return len(state)


def _encode(modules: Modules, base: Mapping[str, Any], pixels: str, prompts: list[str], output: str) -> Any:
    """Latents and text by the graph's encoder, and what ComfyUI's own nodes give for the same prompts without escapes."""
    import nodes

    clip, vae, _ = _run(modules, "LoadEncoders", base)
    encoder = modules("nodes.graph_encoder").GraphEncoder(_base(modules, base), vae, clip)
    found = {"latents": encoder.encode_video(load_file(pixels)["pixels_BCFHW"]).contiguous()}
    for index, record in enumerate(encoder.encode_text(prompts)):
        found[f"text{index}"] = record.embeds_LD
        ((conditioning, _),) = nodes.CLIPTextEncode().encode(clip, prompts[index])[0]
        found[f"node{index}"] = conditioning.clone()
    save_file(found, output)
    return {"identities": [encoder.identity_vae, encoder.identity_text], "vae_dtype": str(vae.vae_dtype)}


def _refusal(modules: Modules, base: Mapping[str, Any]) -> str:
    """What LoadEncoders says about a base that it cannot load."""
    try:
        _run(modules, "LoadEncoders", base)
    except modules("trainers.errors").CheckpointError as error:
        return str(error)
    return ""


def _misfits(modules: Modules, base: Mapping[str, Any]) -> str:
    """What is said about a VAE and a CLIP of other models: core's pixel space, and UMT5 loaded as another type."""
    import comfy.sd
    from comfy.text_encoders.genmo import MochiT5Tokenizer

    vae, clip = comfy.sd.VAE(sd={"pixel_space_vae": torch.tensor(1.0)}), comfy.sd.CLIP(no_init=True)
    clip.tokenizer = MochiT5Tokenizer()
    try:
        modules("nodes.graph_encoder").GraphEncoder(_base(modules, base), vae, clip)
    except modules("trainers.errors").CheckpointError as error:
        return str(error)
    return ""


def _clip_identity(modules: Modules, base: Mapping[str, Any]) -> str:
    return modules("nodes.identity").identity_of_clip(_run(modules, "LoadEncoders", base)[0])


def _unpadded(modules: Modules) -> list[int]:
    """How many rows stay: by the rows, by a mask, of nothing but zeros."""
    rows = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
    unpadded = modules("nodes.graph_encoder").unpadded
    return [len(unpadded(rows, None)), len(unpadded(rows, torch.tensor([[1, 1, 1, 1]]))), len(unpadded(0 * rows, None))]


def _escapes(modules: Modules, prompts: list[str]) -> Any:
    """For each prompt: what reaches the tokenizer when it is escaped, and with which weights."""
    from comfy.sd1_clip import escape_important, token_weights, unescape_important

    escaped = modules("nodes.graph_encoder").escaped
    parsed = [token_weights(escape_important(escaped(prompt)), 1.0) for prompt in prompts]
    return [[(unescape_important(text), weight) for text, weight in parts] for parts in parsed]


def _identities(modules: Modules, base: Mapping[str, Any]) -> Any:
    """{what was done to it: identity} of the base's VAE and CLIP."""
    import time

    import comfy.model_management

    identity = modules("nodes.identity")
    vae, clip = _encoders(modules, base)
    again_vae, again_clip = _encoders(modules, base)
    found = {"vae": identity.identity_of_vae(vae), "clip": identity.identity_of_clip(clip)}
    found |= {"vae, loaded again": identity.identity_of_vae(again_vae), "clip, loaded again": identity.identity_of_clip(again_clip)}

    patched = clip.clone()
    name = next(name for name, _ in patched.patcher.model.named_parameters() if name.endswith("SelfAttention.q.weight"))
    shape = dict(patched.patcher.model.named_parameters())[name].shape
    patched.add_patches({name: ("diff", (torch.ones(shape),))}, 0.5)
    found["clip, patched"] = identity.identity_of_clip(patched)
    comfy.model_management.load_models_gpu([patched.patcher])
    found["clip, patched and applied"] = identity.identity_of_clip(patched)
    found["clip, unpatched while the other is applied"] = identity.identity_of_clip(clip)
    patched.patcher.unpatch_model()

    skipping, shorter = clip.clone(), clip.clone()
    skipping.clip_layer(-2)
    shorter.set_tokenizer_option("umt5xxl_min_length", 256)
    found["clip, another layer"] = identity.identity_of_clip(skipping)
    found["clip, shorter"] = identity.identity_of_clip(shorter)

    weight = next(again_vae.first_stage_model.parameters())
    weight.view(-1)[0] += 1
    found["vae, one number changed"] = identity.identity_of_vae(again_vae)
    vae.first_stage_model.to(torch.bfloat16)
    found["vae, in bfloat16"] = identity.identity_of_vae(vae)
    started = time.perf_counter()
    identity.identity_of_vae(vae)
    identity.identity_of_clip(clip)
    return {"identities": found, "seconds": time.perf_counter() - started}


def _encoders(modules: Modules, base: Mapping[str, Any]) -> tuple[Any, Any]:
    clip, vae, _ = _run(modules, "LoadEncoders", base)
    return vae, clip


def _run(modules: Modules, node: str, base: Mapping[str, Any], *more: Any) -> tuple[Any, ...]:
    """What a node of `nodes.models` gives outside of any graph."""
    prepared = getattr(modules("nodes.models"), node).PREPARE_CLASS_CLONE(None)
    return prepared.execute(_base(modules, base), *more).args


def _base(modules: Modules, values: Mapping[str, Any]) -> Any:
    return modules("nodes.records").Base(**{**values, "text_encoders": tuple(values.get("text_encoders", ()))})


class _Log(logging.Handler):
    """Warnings and errors from here on."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []
        logging.getLogger().addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


_TASKS: dict[str, Callable[..., Any]] = {
    "velocity": _velocity,
    "denoise": _denoise,
    "sample": _sample,
    "bare_vae": _bare_vae,
    "clip_vision": _clip_vision,
    "vae_of_another_variant": _vae_of_another_variant,
    "vae_both_ways": _vae_both_ways,
    "node_sigmas": _node_sigmas,
    "weights": _weights,
    "encode": _encode,
    "escapes": _escapes,
    "refusal": _refusal,
    "clip_identity": _clip_identity,
    "unpadded": _unpadded,
    "misfits": _misfits,
    "identities": _identities,
}
