"""The workflows that apply a control LoRA, described (see `make_workflows.py`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from downloads import MOCHI, WAN21_T2V, Download, download, links
from graph_builder import Graph, Node
from sampling_graphs import WAN_NEGATIVE

CONTROL_VIDEO = "control.mp4"
"""What the graphs load; a user chooses another one."""

TILE = download("spacepxl/Wan2.1-control-loras", "loras", "wan2.1-1.3b-control-lora-tile-v1.1_comfy.safetensors", "1.3b/tile")
CANNY = download("Lightricks/LTX-Video-ICLoRA-canny-13b-0.9.7", "loras", "ltxv-097-ic-lora-canny-control-comfyui.safetensors")
LTX_13B = download("Lightricks/LTX-Video", "checkpoints", "ltxv-13b-0.9.7-dev.safetensors")
(T5,) = MOCHI.text_encoders


def wan_control_apply(graph: Graph) -> None:
    """Wan with input channels."""
    transformer, text_encoder, vae_file = files = WAN21_T2V.files
    graph.note((0, 40), (300, 560), WAN_NOTE + links(TILE, *files), "Start here")
    model = graph.node("UNETLoader", (360, 60), (360, 82), unet_name=transformer["name"], weight_dtype="default", models=[transformer])
    clip = graph.node("CLIPLoader", (360, 200), (360, 106), clip_name=text_encoder["name"], type="wan", models=[text_encoder])
    vae = graph.node("VAELoader", (360, 360), (360, 60), vae_name=vae_file["name"], models=[vae_file])
    graph.group("Step 1 - Load models", 340, 0, 740, 440)
    control = _video(graph, 560, width=832, height=480, frames=33)
    for title, scale in (("Lose the details", 0.25), ("Back to size", 4.0)):
        place, size = (780, 860 if scale < 1 else 985), (360, 82)
        control = (
            graph.node("ImageScaleBy", place, size, upscale_method="bilinear", scale_by=scale, title=title, wires={"image": control}),
            "IMAGE",
        )
    blurred = graph.node("ImageBlur", (780, 1110), (360, 82), blur_radius=7, sigma=0.4, wires={"image": control})
    graph.group("Step 2 - Control video, blurred as the tile LoRA was trained", 340, 480, 1160, 1240)
    words = "a kitten playing the piano"
    positive, negative = _prompts(graph, (780, 60), (clip, "CLIP"), words, WAN_NEGATIVE)
    graph.group("Step 3 - Prompt", 760, 0, 1160, 440)
    controlled = _control(
        graph,
        (1200, 60),
        TILE,
        model=(model, "MODEL"),
        positive=(positive, "CONDITIONING"),
        negative=(negative, "CONDITIONING"),
        vae=(vae, "VAE"),
        control=(blurred, "IMAGE"),
    )
    graph.group("Step 4 - Control LoRA", 1180, 0, 1580, 460)
    _sample_wan(graph, (1620, 60), controlled, (vae, "VAE"))
    graph.group("Step 5 - Press Run", 1600, 0, 2300, 640)


def ltx_control_apply(graph: Graph) -> None:
    """LTX-Video with an IC-LoRA."""
    graph.note((0, 40), (300, 560), LTX_NOTE + links(CANNY, LTX_13B, T5), "Start here")
    model = graph.node("CheckpointLoaderSimple", (360, 60), (360, 98), ckpt_name=LTX_13B["name"], models=[LTX_13B])
    clip = graph.node("CLIPLoader", (360, 220), (360, 106), clip_name=T5["name"], type="ltxv", models=[T5])
    graph.group("Step 1 - Load models", 340, 0, 740, 440)
    cut = _video(graph, 300, width=768, height=512, frames=97)
    edges = graph.node("Canny", (780, 860), (360, 82), low_threshold=0.4, high_threshold=0.8, wires={"image": cut})
    graph.group("Step 2 - Control video, its edges", 340, 480, 1160, 980)
    words = "A kitten plays the piano in a sunlit living room. Its paws press the keys one after the other while the camera stays still."
    unwanted = "worst quality, inconsistent motion, blurry, jittery, distorted"
    positive, negative = _prompts(graph, (780, 60), (clip, "CLIP"), words, unwanted)
    rated = graph.node(
        "LTXVConditioning",
        (780, 360),
        (360, 78),
        frame_rate=25.0,
        wires={"positive": (positive, "CONDITIONING"), "negative": (negative, "CONDITIONING")},
    )
    graph.group("Step 3 - Prompt", 760, 0, 1160, 460)
    controlled = _control(
        graph,
        (1200, 60),
        CANNY,
        model=(model, "MODEL"),
        positive=(rated, "positive"),
        negative=(rated, "negative"),
        vae=(model, "VAE"),
        control=(edges, "IMAGE"),
    )
    graph.group("Step 4 - Control LoRA", 1180, 0, 1580, 460)
    _sample_ltx(graph, (1620, 60), controlled, (model, "VAE"))
    graph.group("Step 5 - Press Run", 1600, 0, 2300, 740)


def _video(graph: Graph, load_height: int, width: int, height: int, frames: int) -> tuple[Node, str]:
    """From a video, chosen in a column of its own, to its first frames at a size."""
    video = graph.node("LoadVideo", (360, 540), (360, load_height), file=CONTROL_VIDEO)
    parts = graph.node("GetVideoComponents", (360, 580 + load_height), (360, 66), wires={"video": (video, "VIDEO")})
    cut = graph.node("ImageFromBatch", (780, 540), (360, 82), length=frames, title="How long", wires={"image": (parts, "images")})
    numbers = {"upscale_method": "bilinear", "width": width, "height": height, "crop": "center"}
    sized = graph.node("ImageScale", (780, 665), (360, 154), title="How large", wires={"image": (cut, "IMAGE")}, **numbers)
    return sized, "IMAGE"


def _prompts(graph: Graph, position: tuple[int, int], clip: tuple[Node, str], words: str, unwanted: str) -> tuple[Node, Node]:
    left, top = position
    positive = graph.node("CLIPTextEncode", (left, top), (360, 110), text=words, title="Prompt", wires={"clip": clip})
    negative = graph.node("CLIPTextEncode", (left, top + 155), (360, 100), text=unwanted, title="Negative prompt", wires={"clip": clip})
    return positive, negative


def _control(graph: Graph, position: tuple[int, int], lora: Download, **wires: tuple[Node, str]) -> Node:
    return graph.node("VideoTrainer_ApplyControlLoRA", position, (360, 370), lora=lora["name"], models=[lora], wires=wires)


def _sample_wan(graph: Graph, position: tuple[int, int], controlled: Node, vae: tuple[Node, str]) -> None:
    """From noise to a saved video: a column for the sampler and what follows, and one for the video."""
    left, top = position
    shifted = graph.node("ModelSamplingSD3", (left, top), (300, 58), shift=8.0, wires={"model": (controlled, "model")})
    numbers = {"steps": 30, "cfg": 6.0, "sampler_name": "uni_pc", "scheduler": "simple", "seed": 1000}
    given = {name: (controlled, name) for name in ("positive", "negative")} | {"latent_image": (controlled, "latent")}
    sampled = graph.node("KSampler", (left, top + 100), (300, 262), wires={"model": (shifted, "MODEL"), **given}, **numbers)
    decoded = graph.node("VAEDecode", (left, top + 410), (300, 46), wires={"samples": (sampled, "LATENT"), "vae": vae})
    video = graph.node("CreateVideo", (left + 340, top), (320, 78), fps=16.0, wires={"images": (decoded, "IMAGE")})
    graph.node("SaveVideo", (left + 340, top + 120), (320, 420), filename_prefix="video/controlled", wires={"video": (video, "VIDEO")})


def _sample_ltx(graph: Graph, position: tuple[int, int], controlled: Node, vae: tuple[Node, str]) -> None:
    """From noise to a saved video: a column for the sampler and what follows, and one for the video."""
    left, top = position
    sampler = graph.node("KSamplerSelect", (left, top), (300, 58), sampler_name="euler")
    sigmas = graph.node(
        "LTXVScheduler", (left, top + 100), (300, 154), steps=30, max_shift=2.05, base_shift=0.95, stretch=True, terminal=0.1
    )
    conditioning: dict[str, Any] = {name: (controlled, name) for name in ("positive", "negative")}
    sampled = graph.node(
        "SamplerCustom",
        (left, top + 300),
        (300, 230),
        add_noise=True,
        noise_seed=1000,
        cfg=3.0,
        wires={
            "model": (controlled, "model"),
            **conditioning,
            "sampler": (sampler, "SAMPLER"),
            "sigmas": (sigmas, "SIGMAS"),
            "latent_image": (controlled, "latent"),
        },
    )
    cropped = graph.node("LTXVCropGuides", (left, top + 570), (300, 66), wires={**conditioning, "latent": (sampled, "output")})
    decoded = graph.node("VAEDecode", (left + 340, top), (320, 46), wires={"samples": (cropped, "latent"), "vae": vae})
    video = graph.node("CreateVideo", (left + 340, top + 90), (320, 78), fps=25.0, wires={"images": (decoded, "IMAGE")})
    graph.node("SaveVideo", (left + 340, top + 210), (320, 420), filename_prefix="video/controlled", wires={"video": (video, "VIDEO")})


WAN_NOTE = """
## A control LoRA for Wan 2.1

The control video goes into the model as further input channels. The **tile** LoRA makes a sharp video of a blurred one.

1. Choose a video in *Step 2*. It is cut to 33 frames of 832 x 480 and blurred.
2. Describe it in *Step 3*.
3. Press **Run**. The node in *Step 4* says what became of the control.

Another control LoRA: choose it in *Step 4* and prepare its control as it was trained, e.g. depth instead of the blur. Works with
little VRAM, where ComfyUI's own LoRA loader fails.

### Files
"""

LTX_NOTE = """
## An IC-LoRA for LTX-Video

The control video is a reference beside the video that is made. The **canny** LoRA follows edges.

1. Choose a video in *Step 2*. It is cut to 97 frames of 768 x 512, and its edges are found.
2. Describe the new video in *Step 3*.
3. Press **Run**. The node in *Step 4* says what became of the control.

*LTXVCropGuides* behind the sampler takes the reference away again. Another IC-LoRA: choose it in *Step 4* and give it its
control, e.g. depth or poses.

### Files
"""


CONTROL: Mapping[str, Callable[[Graph], None]] = {"wan_control_apply": wan_control_apply, "ltx_control_apply": ltx_control_apply}
