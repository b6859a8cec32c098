"""The model of a training: its files by their headers, and ComfyUI's own objects made of them when a graph needs them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from comfy_api.latest import io, ui

from ..trainers.checkpoint import Checkpoint
from ..trainers.errors import CheckpointError, Problem
from ..trainers.family import Detection, detect, detect_vae, families, family_of
from ..trainers.text_encoders import encoder_problem
from . import host, native
from .prompt import wired_outputs
from .records import BASE, Base
from .schema import ADVANCED, schema

FROM_THE_FILE = "read from the file"
TINY_WAN = "tiny Wan (built in)"
"""The choice of the model that comes with the pack, to try things out."""


class BaseModel(io.ComfyNode):
    """Names the files of a model and says what they are; loads nothing."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        variants = [variant.id for family in families().values() for variant in family.variants]
        transformers = [*host.model_choices("diffusion_models"), TINY_WAN]
        vaes = [host.NONE, *host.model_choices("vae"), TINY_WAN]
        text_encoders = [host.NONE, *host.model_choices("text_encoders"), TINY_WAN]
        return schema(
            "BaseModel",
            "Base Model",
            "The model that the LoRA is for: its files, as they lie in ComfyUI's folders. Only their headers are read; "
            "training never loads the transformer inside ComfyUI.",
            inputs=[
                io.Combo.Input("transformer", transformers, tooltip="The diffusion model to train a LoRA for. Any precision, fp8 too."),
                io.Combo.Input(
                    "variant",
                    [FROM_THE_FILE, *variants],
                    default=FROM_THE_FILE,
                    tooltip="Which published model it is. Choose one only when the report says that the file cannot tell.",
                ),
                io.Combo.Input("vae", vaes, tooltip="The model's VAE. The training decodes its preview videos with it."),
                io.Combo.Input("text_encoder", text_encoders, tooltip="The model's text encoder, for the Load Encoders node."),
                io.Combo.Input(
                    "text_encoder_2",
                    text_encoders,
                    optional=True,
                    extra_dict=ADVANCED,
                    tooltip="The second text encoder, for models that have two (Hunyuan).",
                ),
                io.Combo.Input(
                    "transformer_low_noise",
                    [host.NONE, *transformers],
                    optional=True,
                    extra_dict=ADVANCED,
                    tooltip="The low-noise expert of Wan 2.2 A14B, when `transformer` is its high-noise expert.",
                ),
                io.Combo.Input(
                    "clip_vision",
                    [host.NONE, *host.model_choices("clip_vision")],
                    optional=True,
                    extra_dict=ADVANCED,
                    tooltip="The image encoder, for models that look at a first frame with one (Wan 2.1 image to video).",
                ),
            ],
            outputs=[
                BASE.Output("base", tooltip="The model, for the other Video Trainer nodes."),
                io.String.Output("report", tooltip="What the files are."),
            ],
        )

    @classmethod
    def execute(
        cls,
        transformer: str,
        variant: str,
        vae: str,
        text_encoder: str,
        text_encoder_2: str = host.NONE,
        transformer_low_noise: str = host.NONE,
        clip_vision: str = host.NONE,
    ) -> io.NodeOutput:
        path = chosen_path("transformer", transformer)
        assert path is not None
        detection = detect(Checkpoint.open(path), None if variant == FROM_THE_FILE else variant)
        encoders = (chosen_path("text_encoder", text_encoder), chosen_path("text_encoder_2", text_encoder_2))
        chosen_encoders = [encoder for encoder in encoders if encoder]
        if problem := encoder_problem(chosen_encoders, detection.family, detection.variant, detection.config):
            raise CheckpointError(problem)
        base = Base(
            family=detection.family.id,
            variant=detection.variant.id,
            transformer=str(path),
            transformer_low_noise=_text(_checked_expert(chosen_path("transformer_low_noise", transformer_low_noise), detection)),
            vae=_text(_checked_vae(chosen_path("vae", vae), detection)),
            text_encoders=tuple(str(encoder) for encoder in chosen_encoders),
            clip_vision=_text(chosen_path("clip_vision", clip_vision)),
        )
        report = _report(base, detection)
        return io.NodeOutput(base, report, ui=ui.PreviewText(report))


class LoadTransformer(io.ComfyNode):
    """ComfyUI's MODEL of the base."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "LoadTransformer",
            "Load Transformer",
            "Loads the model itself, to sample with it. Also takes what ComfyUI's own loader does not: folders in diffusers' "
            "layout, and models in several files. Training does not need this node.",
            inputs=[
                BASE.Input("base", tooltip="The model, from Base Model."),
                io.Combo.Input(
                    "weight_dtype",
                    list(native.WEIGHT_DTYPES),
                    default="default",
                    optional=True,
                    tooltip="Precision of the weights in memory; default: as the file has them.",
                    extra_dict=ADVANCED,
                ),
            ],
            outputs=[
                io.Model.Output("model", tooltip="The model, for ComfyUI's samplers."),
                io.Model.Output("model_low_noise", tooltip="The low-noise expert, of models that have two (Wan 2.2 A14B)."),
            ],
            hidden=[io.Hidden.prompt, io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, base: Base, weight_dtype: str = "default") -> io.NodeOutput:
        paths = {"transformer": base.transformer, "transformer_low_noise": base.transformer_low_noise}
        family, options = families()[base.family], native.WEIGHT_DTYPES[weight_dtype]
        nothing = _nothing(cls.hidden, paths)
        return io.NodeOutput(*(native.load_transformer(Path(path), family, options) if path else nothing for path in paths.values()))


class LoadEncoders(io.ComfyNode):
    """ComfyUI's CLIP, VAE and CLIP_VISION of the base."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "LoadEncoders",
            "Load Encoders",
            "Loads the text encoder, the VAE and the image encoder that Base Model names. Also takes folders in diffusers' and "
            "transformers' layout. ComfyUI's own loaders do as well, where they know the files.",
            inputs=[BASE.Input("base", tooltip="The model, from Base Model.")],
            outputs=[
                io.Clip.Output("clip", tooltip="The text encoder."),
                io.Vae.Output("vae", tooltip="The VAE."),
                io.ClipVision.Output("clip_vision", tooltip="The image encoder, for models that have one."),
            ],
            hidden=[io.Hidden.prompt, io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, base: Base) -> io.NodeOutput:
        family, variant = family_of(base.variant)
        texts = [Path(path) for path in base.text_encoders]
        nothing = _nothing(cls.hidden, {"text_encoder": texts, "vae": base.vae, "clip_vision": base.clip_vision})
        return io.NodeOutput(
            native.load_text_encoders(texts, family, variant) if texts else nothing,
            native.load_vae(Path(base.vae), family, variant) if base.vae else nothing,
            native.load_clip_vision(Path(base.clip_vision)) if base.clip_vision else nothing,
        )


def _nothing(hidden: Any, chosen: Mapping[str, object]) -> Any:
    """What an output gives for which no file is `chosen`, given for each output in order.

    Raises CheckpointError, before anything is loaded, when a node is wired to one.
    """
    wired = wired_outputs(hidden.prompt, str(hidden.unique_id))
    rule, remedy = "a node is wired to its output", "Choose one in Base Model, or wire that node to another loader."
    missing = [name for index, (name, file) in enumerate(chosen.items()) if index in wired and not file]
    if missing:
        raise CheckpointError([Problem(f"no {name} is chosen", rule, remedy) for name in missing])
    return host.blocked(f"No file is chosen for this output. {remedy}")


_LISTS = {
    "transformer": "diffusion_models",
    "transformer_low_noise": "diffusion_models",
    "vae": "vae",
    "text_encoder": "text_encoders",
    "text_encoder_2": "text_encoders",
    "clip_vision": "clip_vision",
}
"""ComfyUI's list of files behind each input of Base Model."""


def chosen_path(input_id: str, name: str) -> Path | None:
    """What an input of Base Model names; None for no file. Raises ValueError when it is there no longer."""
    if name == host.NONE:
        return None
    return _tiny_wan(_LISTS[input_id]) if name == TINY_WAN else host.model_path(_LISTS[input_id], name)


def _tiny_wan(kind: str) -> Path:
    from ..trainers.demo import demo

    return {"diffusion_models": demo.TRANSFORMER, "vae": demo.VAE, "text_encoders": demo.BASE}[kind]


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _checked_expert(path: Path | None, detection: Detection) -> Path | None:
    """The path of a low-noise expert of the same model. Raises CheckpointError for another file."""
    if path and detection.variant.boundary is None:
        value, rule = f"transformer_low_noise is {path.name}", f"{detection.variant.title} has one transformer"
        raise CheckpointError(Problem(value, rule, "Choose none."))
    if path:
        detect(Checkpoint.open(path), detection.variant.id)
    return path


def _checked_vae(path: Path | None, detection: Detection) -> Path | None:
    """The path of a VAE of the model's own family. Raises CheckpointError for another file."""
    if path:
        detect_vae(Checkpoint.open(path, "vae"), detection.family, detection.variant)
    return path


def _report(base: Base, detection: Detection) -> str:
    lines = [f"{detection.variant.title} ({base.variant})", *([f"told by {detection.reason}"] if detection.reason else [])]
    lines += detection.notes
    if detection.variant.boundary is not None and base.transformer_low_noise is None:
        lines.append("one of two experts: choose the other as transformer_low_noise, or set Train LoRA's `experts` to this one")
    missing = [name for name, given in (("VAE", base.vae), ("text encoder", base.text_encoders)) if not given]
    lines += [f"no {name} chosen" for name in missing]
    return "\n".join(lines)


NODES = [BaseModel, LoadTransformer, LoadEncoders]
