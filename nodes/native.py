"""ComfyUI's own objects (MODEL, VAE, CLIP, CLIP_VISION) made of a base model's files, in any form that training reads.

A file that ComfyUI's loaders know is theirs to load. What they do not know (the names and folders of diffusers and
transformers) gets native names first, by the family's own tables.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import comfy.clip_vision
import comfy.latent_formats
import comfy.sd
import comfy.utils
import folder_paths
import torch

from ..trainers.checkpoint import Checkpoint
from ..trainers.errors import CheckpointError, KeyTableError, Problem
from ..trainers.family import IMAGE_TEXT, ComfyNames, Family, Variant, detect_vae
from ..trainers.load import under_native_names
from ..trainers.tensor_files import open_tensor_file
from ..trainers.transformers_folder import TransformersFolder

WEIGHT_DTYPES: Mapping[str, dict[str, Any]] = {
    "default": {},
    "fp8_e4m3fn": {"dtype": torch.float8_e4m3fn},
    "fp8_e4m3fn_fast": {"dtype": torch.float8_e4m3fn, "fp8_optimizations": True},
    "fp8_e5m2": {"dtype": torch.float8_e5m2},
}
"""The choices of ComfyUI's Load Diffusion Model, with the options they stand for."""

_SPIECE_MODEL = "spiece_model"
"""The tensor that holds the tokenizer in text encoder files made for ComfyUI."""

State = dict[str, torch.Tensor]


def latent_format(names: ComfyNames) -> Any:
    """ComfyUI's object that knows how the latents are normalised."""
    return getattr(comfy.latent_formats, names.latent_format)()


def check_parts(family: Family, variant: Variant, vae: Any = None, clip: Any = None, clip_vision: Any = None) -> None:
    """Raises CheckpointError when a VAE, CLIP or CLIP_VISION object is not the variant's or cannot encode; None is not looked at.

    Another CLIP would do no harm that anyone sees: core's Load CLIP reads the right file as another type's without a word.
    """
    names, problems = family.comfyui(variant), []
    if vae is not None and not any(_full_name(vae.first_stage_model).endswith(f".{name}") for name in names.vaes):
        value = f"the VAE is a {type(vae.first_stage_model).__name__}"
        problems.append(Problem(value, f"{family.title} has its own", "Wire the model's VAE, or Load Encoders."))
    elif vae is not None and vae.latent_dim != 3:
        problems.append(Problem("the VAE is one of images", f"{family.title} has its own", "Wire the model's VAE, or Load Encoders."))
    elif vae is not None and vae.latent_channels != (channels := family.latent(variant).channels):
        value, rule = f"the VAE gives {vae.latent_channels} channels", f"{variant.title} has {channels}"
        problems.append(Problem(value, rule, "Wire the model's VAE, or Load Encoders."))
    elif vae is not None and getattr(vae.first_stage_model, "encoder", vae) is None:
        remedy = "Choose a file with the encoder in Base Model."
        problems.append(Problem("the VAE's file holds the decoder only", "clips are encoded with the encoder", remedy))
    if clip is not None and (kind := type(clip.tokenizer).__name__) != names.tokenizer:
        remedy = f"Choose the type {names.clip_type.lower()} in Load CLIP, or wire Load Encoders."
        problems.append(Problem(f"the CLIP reads text with a {kind}", f"{family.title} needs a {names.tokenizer}", remedy))
    if clip_vision is not None and IMAGE_TEXT in family.required(variant) and clip_vision.model.multi_modal_projector is None:
        value, rule = "the CLIP_VISION makes no words of an image", f"{variant.title} reads the first frame with its captions"
        problems.append(Problem(value, rule, "Choose llava_llama3_vision in Load CLIP Vision, or wire Load Encoders."))
    if problems:
        raise CheckpointError(problems)


def _full_name(module: torch.nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def load_transformer(path: Path, family: Family, options: dict[str, Any]) -> Any:
    """The MODEL of a transformer's file or folder. `options` as `comfy.sd.load_diffusion_model` takes them."""
    checkpoint = Checkpoint.open(path)
    if len(checkpoint.files) == 1 and _is_native(checkpoint, family):
        return comfy.sd.load_diffusion_model(str(checkpoint.files[0]), model_options=options)
    state, metadata = _read(checkpoint.files)
    if not _is_native(checkpoint, family):
        state = under_native_names(state, family.keys)
        found = family.detect(checkpoint)
        metadata |= dict(found.native_metadata) if found else {}
    model = comfy.sd.load_diffusion_model_state_dict(state, model_options=options, metadata=metadata)
    if model is None:
        raise CheckpointError(Problem(f"ComfyUI does not know the model in {path.name}", f"it should be {family.title}", "Update ComfyUI."))
    return model


def load_vae(path: Path, family: Family, variant: Variant) -> Any:
    """The VAE of a file, a folder, or a checkpoint that has one; of a file with the decoder only it has no encoder."""
    checkpoint = Checkpoint.open(path, "vae")
    found = detect_vae(checkpoint, family, variant)
    stored, metadata = _read(checkpoint.files)
    state = {name: stored[tensor.key] for name, tensor in checkpoint.tensors.items()}
    vae = comfy.sd.VAE(sd=under_native_names(state, found.vae.keys), metadata=metadata)
    vae.throw_exception_if_invalid()
    if not found.encodes:
        vae.first_stage_model.encoder = None  # else its weights would be whatever the memory held
    return vae


def load_text_encoders(paths: Sequence[Path], family: Family, variant: Variant) -> Any:
    """The CLIP of a variant's text encoders: files made for ComfyUI, or folders in transformers' layout."""
    names, folders = family.comfyui(variant), [_transformers_folder(path) for path in paths]
    if names.t5 and len(folders) == 1 and folders[0]:
        return _load_t5(folders[0], names)
    parts = [folder.files() if folder else (path,) for path, folder in zip(paths, folders, strict=True)]
    if names.t5 is None and any(folders):
        return _load_llama_and_clip(parts, names)
    files = [file for part in parts for file in part]
    if names.t5 and names.t5.tokenizer_in_file and _SPIECE_MODEL not in open_tensor_file(files[0]).tensors:
        raise _no_tokenizer(files[0])
    return comfy.sd.load_clip(
        [str(file) for file in files],
        embedding_directory=folder_paths.get_folder_paths("embeddings"),
        clip_type=getattr(comfy.sd.CLIPType, names.clip_type),
    )


def load_clip_vision(path: Path) -> Any:
    """The CLIP_VISION of a file."""
    clip_vision = comfy.clip_vision.load(str(path))
    if clip_vision is None:
        raise CheckpointError(Problem(f"{path.name} is no image encoder", "ComfyUI must know it", "Choose a clip_vision file."))
    return clip_vision


def _is_native(checkpoint: Checkpoint, family: Family) -> bool:
    """Whether the names are those that ComfyUI knows."""
    try:
        family.keys.map_file(checkpoint.tensors)
    except KeyTableError:
        return False
    return True


def _read(files: Sequence[Path]) -> tuple[State, dict[str, str]]:
    """Every tensor as ComfyUI reads it, and the metadata of the first file that has any."""
    state: State = {}
    metadata: dict[str, str] = {}
    for file in files:
        tensors, told = comfy.utils.load_torch_file(str(file), safe_load=True, return_metadata=True)
        state.update(tensors)
        metadata = metadata or dict(told or {})
    return state, metadata


def _transformers_folder(path: Path) -> TransformersFolder | None:
    """The folder layout that a choice belongs to; None for a file that holds its own tokenizer, or has none at all."""
    if path.is_file() and _SPIECE_MODEL in open_tensor_file(path).tensors:
        return None
    found = TransformersFolder.find(path)
    if found is None and path.is_dir():
        raise _no_tokenizer(path)
    return found


def _no_tokenizer(path: Path) -> CheckpointError:
    return CheckpointError(
        Problem(
            f"{path.name} has no tokenizer",
            "a text encoder comes with one: in ComfyUI's file, or as a folder `tokenizer` beside `text_encoder`",
            "Choose a file made for ComfyUI (umt5_xxl_...), or the folder of a diffusers model.",
        )
    )


def _load_llama_and_clip(parts: Sequence[Sequence[Path]], names: ComfyNames) -> Any:
    """ComfyUI's CLIP of Llama and CLIP-L, each from its files in transformers' layout (or ComfyUI's)."""
    return comfy.sd.load_text_encoder_state_dicts(
        [llama_or_clip_names(_read(files)[0]) for files in parts],
        embedding_directory=folder_paths.get_folder_paths("embeddings"),
        clip_type=getattr(comfy.sd.CLIPType, names.clip_type),
    )


def llama_or_clip_names(state: State) -> State:
    """A Llama (by itself or inside a Llava, whose image half is left out) or a CLIP text model under ComfyUI's names.

    transformers has named them differently over time, with and without what the model is wrapped in.
    """
    for prefix in ("model.language_model.", "language_model.model."):
        inside = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
        if inside:
            return {f"model.{name}": tensor for name, tensor in inside.items()}
    bare = {"layers.0.input_layernorm.weight": "model.", "encoder.layers.0.layer_norm1.weight": "text_model."}
    prefix = next((prefix for name, prefix in bare.items() if name in state), "")
    return {prefix + name: tensor for name, tensor in state.items()}


def _load_t5(folder: TransformersFolder, names: ComfyNames) -> Any:
    """ComfyUI's T5 of any size, with the tokenizer beside it where ComfyUI has none. Text is padded as the family's is."""
    import comfy.text_encoders.sd3_clip

    t5 = names.t5
    assert t5 is not None
    spiece = folder.tokenizer / "spiece.model"
    if t5.tokenizer_in_file and not spiece.is_file():
        raise _no_tokenizer(folder.weights)
    state, _ = _read(folder.files())
    if (tied := state.pop("encoder.embed_tokens.weight", None)) is not None:
        state.setdefault("shared.weight", tied)  # the same tensor; a file has one of the names, or both
    module = importlib.import_module(f"comfy.text_encoders.{t5.module}")
    model_class = getattr(module, t5.function)(**comfy.text_encoders.sd3_clip.t5_xxl_detect(state))
    return comfy.sd.CLIP(
        SimpleNamespace(clip=model_class, tokenizer=getattr(module, names.tokenizer), params={}),
        embedding_directory=folder_paths.get_folder_paths("embeddings"),
        tokenizer_data={_SPIECE_MODEL: spiece.read_bytes()} if t5.tokenizer_in_file else {},
        parameters=comfy.utils.calculate_parameters(state),
        state_dict=[state],
        model_options={f"{t5.name}_model_config": _t5_config(folder.config)},
    )


def _t5_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """What ComfyUI's T5 is told, from transformers' config.json."""
    projection = str(config.get("feed_forward_proj", "gated-gelu"))
    sizes = {name: config[name] for name in ("d_model", "d_kv", "d_ff", "num_layers", "num_heads", "vocab_size")}
    activation = "gelu_pytorch_tanh" if projection.endswith("gelu") else "relu"
    return {**sizes, "is_gated_act": projection.startswith("gated-"), "dense_act_fn": activation}
