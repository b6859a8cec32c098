"""Under ComfyUI's Python: what its VAE and text encoders of HunyuanVideo answer. Tensors go both ways as files."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from inside import load_pack
from safetensors.torch import load_file, save_file


def main(pack: str, tasks: list[dict[str, Any]]) -> list[Any]:
    """What the function of each `task` returns, one after the other."""
    name = load_pack(pack).__name__
    functions = {"vae": _vae, "text": _text, "graph_text": _graph_text, "sigmas": _sigmas}
    with torch.inference_mode():
        return [functions[task.pop("task")](lambda module: importlib.import_module(f"{name}.{module}"), **task) for task in tasks]


def _vae(modules: Any, vae: str, inputs: str, output: str) -> dict[str, str]:
    """Normalised latents of each clip of `inputs` in -1..1 ("pixels..."), and each latents' pixels ("latents...") in -1..1."""
    family = modules("trainers.family").families()["hunyuan"]
    loaded = modules("nodes.native").load_vae(Path(vae), family, family.variants[0])
    latent_format = modules("nodes.native").latent_format(family.comfyui(family.variants[0]))
    found = {}
    for name, given in load_file(inputs).items():
        if name.startswith("pixels"):
            found[name] = latent_format.process_in(loaded.encode(given[0].permute(1, 2, 3, 0).add(1).div(2)).float())
        else:
            found[name] = loaded.decode(latent_format.process_out(given)).permute(0, 4, 1, 2, 3).mul(2).sub(1)
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, output)
    return {"class": type(loaded.first_stage_model).__name__, "dtype": str(loaded.vae_dtype)}


def _sigmas(modules: Any, steps: list[int]) -> dict[str, list[float]]:
    """What ModelSamplingSD3 (shift 7) and BasicScheduler (simple) give."""
    import comfy.model_sampling
    import comfy.samplers

    class Sampling(comfy.model_sampling.ModelSamplingDiscreteFlow, comfy.model_sampling.CONST):
        pass

    sampling = Sampling(None)
    sampling.set_parameters(shift=7.0, multiplier=1000)
    return {str(number): comfy.samplers.calculate_sigmas(sampling, "simple", number).tolist() for number in steps}


def _text(modules: Any, folder: str, llama: Mapping[str, Any], clip: Mapping[str, Any], prompts: list[str]) -> list[list[str]]:
    """Cond and pooled output of each prompt, by CLIPTextEncode and by the node of image to video (interleave 2 and 4).

    `folder` holds what `_loaded` asks for, and image_rows (what the image encoder gives). The answer, in `folder`/answer, is
    named "<prompt> <kind> text" and "... pooled".
    """
    from comfy_extras.nodes_hunyuan import TextEncodeHunyuanVideo_ImageToVideo

    from nodes import CLIPTextEncode

    loaded = _loaded(modules, folder, llama, clip)
    seen = SimpleNamespace(mm_projected=load_file(Path(folder) / "image_rows")["rows"][None])
    found = {}
    for index, prompt in enumerate(prompts):
        answers = {"plain": CLIPTextEncode().encode(loaded, prompt)[0]}
        for interleave in (2, 4):
            answers[f"image{interleave}"] = TextEncodeHunyuanVideo_ImageToVideo.execute(loaded, seen, prompt, interleave).args[0]
        for kind, (((text, options),),) in ((kind, (answer,)) for kind, answer in answers.items()):
            assert "attention_mask" not in options
            found |= {f"{index} {kind} text": text[0].clone(), f"{index} {kind} pooled": options["pooled_output"][0].clone()}
    save_file(found, Path(folder) / "answer")
    return sorted(found)


def _loaded(modules: Any, folder: str, llama: Mapping[str, Any], clip: Mapping[str, Any]) -> Any:
    """The CLIP of small encoders.

    `folder` holds llama, llava and clip.safetensors as transformers writes them, and llama's tokenizer: this ComfyUI may lack
    the file of its own.
    """
    import comfy.sd
    from comfy.text_encoders import hunyuan_video
    from transformers import PreTrainedTokenizerFast

    def init(self: Any, min_length: int = 256, pad_token: int = 128258, **_: Any) -> None:
        kinds = {"tokenizer_class": PreTrainedTokenizerFast, "has_start_token": True, "has_end_token": False, "pad_with_end": False}
        lengths = {"pad_to_max_length": False, "max_length": 99999999, "min_length": min_length, "pad_token": pad_token}
        super(hunyuan_video.LLAMA3Tokenizer, self).__init__(folder, embedding_key="llama", embedding_size=4096, **kinds, **lengths)

    hunyuan_video.LLAMA3Tokenizer.__init__ = init
    target = SimpleNamespace(clip=hunyuan_video.hunyuan_video_clip(torch.float32), tokenizer=hunyuan_video.HunyuanVideoTokenizer, params={})
    rename = modules("nodes.native").llama_or_clip_names
    language, whole, files_of_clip = (
        load_file(Path(folder) / name) for name in ("llama.safetensors", "llava.safetensors", "clip.safetensors")
    )
    files = [rename(whole), rename(files_of_clip)]
    assert files[0].keys() == rename(language).keys() == rename(rename(language)).keys()
    options = {"llama_model_config": dict(llama), "clip_l_model_config": dict(clip), "dtype": torch.float32}
    return comfy.sd.CLIP(target, state_dict=files, model_options=options, parameters=1)


def _graph_text(modules: Any, folder: str, llama: Mapping[str, Any], clip: Mapping[str, Any], vision: str, prompts: list[str]) -> Any:
    """{variant: how far each prompt's text and pooled output by the graph's encoder are from those of core's nodes}, with an image.

    `vision` is the config of a small image encoder; its projector is core's, at the width of the small language model.
    """
    import comfy.clip_vision
    import comfy.ops
    from comfy.clip_model import LlavaProjector
    from comfy_extras.nodes_hunyuan import TextEncodeHunyuanVideo_ImageToVideo

    from nodes import CLIPVisionEncode

    loaded, image_HWC = _loaded(modules, folder, llama, clip), load_file(Path(folder) / "image")["image_HWC"]
    seer = comfy.clip_vision.ClipVisionModel(vision)
    refused = _refused(modules, loaded, seer)
    width = seer.model.vision_model.post_layernorm.weight.shape[0]
    seer.model.multi_modal_projector = LlavaProjector(width, llama["hidden_size"], torch.float32, "cpu", comfy.ops.manual_cast)
    torch.manual_seed(0)
    for parameter in seer.model.parameters():
        parameter.normal_(0.0, 0.2)
    seen, found = CLIPVisionEncode().encode(seer, image_HWC[None], "none")[0], {}
    records = modules("nodes.records")
    for variant, interleave in (("hunyuan-i2v-v1", 2), ("hunyuan-i2v-v2", 4)):
        encoder = modules("nodes.graph_encoder").GraphEncoder(records.Base("hunyuan", variant, ""), None, loaded, seer)
        theirs = [TextEncodeHunyuanVideo_ImageToVideo.execute(loaded, seen, prompt, interleave).args[0][0] for prompt in prompts]
        found[variant] = [
            [_apart(record.embeds_LD, text[0]), _apart(record.pooled_D, options["pooled_output"][0]), len(record.embeds_LD)]
            for record, (text, options) in zip(encoder.encode_text(prompts, image_HWC), theirs, strict=True)
        ]
    return {"refused": refused, **found}


def _refused(modules: Any, clip: Any, clip_vision: Any) -> str:
    base = modules("nodes.records").Base("hunyuan", "hunyuan-i2v-v2", "")
    try:
        modules("nodes.graph_encoder").GraphEncoder(base, None, clip, clip_vision)
    except modules("trainers.errors").CheckpointError as error:
        return str(error)
    return ""


def _apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected.cpu()).norm() / expected.cpu().norm()) if found.shape == expected.shape else float("inf")
