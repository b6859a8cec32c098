"""Under ComfyUI's Python: what nodes that encode ask for, make and keep of first frames; on small objects of ComfyUI's classes."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from inside import load_pack

SIZE = {"width": 64, "height": 64, "num_frames": 9}
CLIPS = {"fps": 0.0, "bucketing": True, "clip_mode": "first", "clips_per_video": 0}
SAMPLING = {"every_steps": 50, "sampling_steps": 8, "cfg": 3.0, "shift": 0.0, "seed": 0}
I2V, T2V = "wan2.1-i2v", "wan2.1-t2v"

Modules = Callable[[str], Any]


def main(pack: str, folder: str, vision: str, text_encoder: str, vae: str, clips: str) -> dict[str, Any]:
    """`folder` is a place of its own: nothing of this ComfyUI's user is read or written."""
    import folder_paths

    folder_paths.set_user_directory(f"{folder}/user")
    name = load_pack(pack).__name__

    def modules(module: str) -> Any:
        return importlib.import_module(f"{name}.{module}")

    with torch.inference_mode():
        made = Made(modules, Path(folder), vision, text_encoder, vae)
        return {
            "objects": _objects(made),
            "identities": _identities(made),
            "lazy": _lazy(made, clips),
            "encoded": _encoded(made, clips),
            "previews": _previews(made, clips),
            "refused": _refused(made, clips),
        }


class Made:
    """Small objects of ComfyUI's classes, and files that stand before them as loaders would name them."""

    def __init__(self, modules: Modules, folder: Path, vision: str, text_encoder: str, vae: str) -> None:
        import folder_paths

        self.modules, self.vision = modules, vision
        family, variant = modules("trainers.family").family_of(I2V)
        self.clip = modules("nodes.native").load_text_encoders([Path(text_encoder)], family, variant)
        self.vae = modules("nodes.native").load_vae(Path(vae), family, variant)
        self.seer = self.image_encoder(0)
        for kind in ("vae", "text_encoders", "clip_vision"):
            (folder / kind).mkdir()
            (folder / kind / "small.safetensors").write_bytes(b"stands for a file")
            folder_paths.add_model_folder_path(kind, str(folder / kind))

    def image_encoder(self, seed: int) -> Any:
        import comfy.clip_vision

        seer = comfy.clip_vision.ClipVisionModel(self.vision)
        torch.manual_seed(seed)
        for parameter in seer.model.parameters():
            parameter.normal_(0.0, 0.2)
        return seer

    @property
    def objects(self) -> dict[str, Any]:
        return {"vae": self.vae, "clip": self.clip, "clip_vision": self.seer}

    def base(self, variant: str) -> Any:
        return self.modules("nodes.records").Base("wan", variant, "")

    def encoder(self, variant: str = I2V) -> Any:
        return self.modules("nodes.graph_encoder").GraphEncoder(self.base(variant), **self.objects)

    def node(self, name: str, *wired: str) -> Any:
        """A class of a node in a prompt, with these inputs wired to core's loaders."""
        loaders = {
            "vae": ("VAELoader", {"vae_name": "small.safetensors"}),
            "clip": ("CLIPLoader", {"clip_name": "small.safetensors", "type": "wan"}),
            "clip_vision": ("CLIPVisionLoader", {"clip_name": "small.safetensors"}),
        }
        prompt = {key: {"class_type": loaders[key][0], "inputs": loaders[key][1]} for key in wired}
        prompt["node"] = {"class_type": f"VideoTrainer_{name}", "inputs": {key: [key, 0] for key in wired}}
        node = getattr(self.modules("nodes.encode"), name)
        node.hidden = SimpleNamespace(prompt=prompt, unique_id="node")
        return node


def _objects(made: Made) -> dict[str, Any]:
    """How far the graph's encoder is from core's nodes for the same image: rows of the image encoder, first frame and then grey."""
    import comfy_extras.nodes_wan

    import nodes

    image_HWC = torch.rand(48, 64, 3, generator=torch.Generator().manual_seed(1)).mul(255).round() / 255
    encoder, encoding = made.encoder(), made.modules("trainers.encoding")
    theirs = nodes.CLIPVisionEncode().encode(made.seer, image_HWC[None], "none")[0]["penultimate_hidden_states"][0]
    rows = encoder.encode_image(image_HWC)
    conditioning = [[torch.zeros(1, 1, 8), {}]]
    node = comfy_extras.nodes_wan.WanImageToVideo.execute(conditioning, conditioning, made.vae, 64, 48, 9, 1, start_image=image_HWC[None])
    family, variant = made.modules("trainers.family").family_of(I2V)
    latent_format = made.modules("nodes.native").latent_format(family.comfyui(variant))
    built = latent_format.process_in(node.args[0][0][1]["concat_latent_image"])
    frames = image_HWC.mul(255).round().to(torch.uint8)[None].numpy()
    clip = encoder.encode_video(encoding._pixels("first_frame_clip", frames, 9))
    return {"rows": list(rows.shape), "rows_apart": _apart(rows, theirs), "clip": list(clip.shape), "clip_apart": _apart(clip, built)}


def _apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected.cpu()).norm() / expected.cpu().norm())


def _identities(made: Made) -> dict[str, str]:
    identity = made.modules("nodes.identity").identity_of_clip_vision
    again, other, another_mean = made.image_encoder(0), made.image_encoder(1), made.image_encoder(0)
    another_mean.image_mean = [0.5, 0.5, 0.5]
    made.seer.encode_image(torch.zeros(1, 32, 32, 3), crop=False)
    seers = {"used": made.seer, "again": again, "other weights": other, "another mean": another_mean}
    return {name: identity(seer) for name, seer in seers.items()}


def _dataset(made: Made, clips: str) -> Any:
    return made.modules("trainers.data.scan").scan_folder(clips)


def _lazy(made: Made, clips: str) -> dict[str, Any]:
    """What Encode Dataset asks for before and after it ran, and for a model that needs no image encoder."""
    everything = ("vae", "clip", "clip_vision")
    values = {"dataset": _dataset(made, clips), **SIZE, **CLIPS}

    def asked(variant: str, *wired: str) -> Any:
        try:
            return made.node("EncodeDataset", *wired).check_lazy_status(base=made.base(variant), **values)
        except made.modules("trainers.errors").DatasetError as error:
            return str(error)

    found = {"before": asked(I2V, *everything), "not wired": asked(I2V, "vae", "clip"), "text to video": asked(T2V, "vae", "clip")}
    made.node("EncodeDataset", *everything).execute(base=made.base(I2V), **values, **made.objects)
    found |= {"after": asked(I2V, *everything), "text to video after": asked(T2V, "vae", "clip")}
    (Path(made.modules("nodes.host").state_folder()).parent.parent / "clip_vision" / "small.safetensors").write_bytes(b"another file")
    return found | {"another image encoder": asked(I2V, *everything)}


def _encoded(made: Made, clips: str) -> dict[str, Any]:
    output = made.node("EncodeDataset", "vae", "clip", "clip_vision").execute(
        base=made.base(I2V), dataset=_dataset(made, clips), **SIZE, **CLIPS, **made.objects
    )
    record, told = output.args
    encoded = made.modules("trainers.data.encoded").Encoded.open(record.folder, record.identity)
    item = encoded.items[0]
    shapes = {kind: list(encoded.extra(kind, key).shape) for kind, key in item.extras.items()}
    return {"told": told, "shapes": shapes, "latents": list(encoded.latents_CFHW(item).shape), "problems": len(encoded.problems())}


def _preview_values(count: int) -> dict[str, Any]:
    images = torch.rand(count, 40, 80, 3, generator=torch.Generator().manual_seed(2)) if count else None
    return {"prompts": "a star\na circle", "negative": "", **SIZE, **SAMPLING, **({"images": images} if count else {})}


def _previews(made: Made, clips: str) -> dict[str, Any]:
    """Previews with one image for both prompts: what is handed over, and what is asked for afterwards."""
    wired = ("vae", "clip", "clip_vision")
    node = made.node("Previews", *wired)
    before = node.check_lazy_status(base=made.base(I2V), **_preview_values(1))
    (settings,) = node.execute(base=made.base(I2V), **_preview_values(1), **made.objects).args
    after = node.check_lazy_status(base=made.base(I2V), **_preview_values(1))
    data = made.node("EncodeDataset", *wired).execute(base=made.base(I2V), dataset=_dataset(made, clips), **SIZE, **CLIPS, **made.objects)
    version = made.modules("nodes.train")._version(data.args[0], settings)
    paths = settings.spec["images"]
    image = version.image(paths[0], 9, 64, 64)
    spec = made.modules("trainers.job").PreviewSpec(**settings.spec)
    return {
        "before": before,
        "after": after,
        "files": [Path(path).suffix for path in paths if Path(path).is_file()],
        "stays in the user's folder": all(Path(path).parent == made.modules("nodes.host").state_folder() / "clips" for path in paths),
        "kinds": sorted(image.extras),
        "both": [spec.image_of(0), spec.image_of(1)] == [paths[0]] * 2,
        "problems": len(version.problems()),
    }


def _refused(made: Made, clips: str) -> dict[str, str]:
    errors = made.modules("trainers.errors")

    def told(variant: str, count: int, *wired: str) -> str:
        try:
            made.node("Previews", *wired).check_lazy_status(base=made.base(variant), **_preview_values(count))
        except errors.DatasetError as error:
            return str(error)
        return ""

    return {
        "images for text to video": told(T2V, 1, "clip"),
        "none for image to video": told(I2V, 0, "clip"),
        "three for two prompts": told("wan2.2-ti2v", 3, "clip", "vae"),
        "nothing wired": told("wan2.2-ti2v", 2, "clip"),
    }
