"""The workflows that apply a control LoRA."""

from __future__ import annotations

from downloads import LTX, WAN21_T2V, Download, Models, download, links
from graph_builder import Graph, Wire
from graph_layout import NOTE_TOP, Step, frame_row
from sampling_parts import (
    LTX_FPS,
    LTX_NEGATIVE,
    LTX_PROMPT,
    PROMPT,
    WAN_NEGATIVE,
    Size,
    Sources,
    decoded,
    ksampler,
    load_models,
    ltx_sampler,
    prompts,
    save,
)

CONTROL_VIDEO = "control.mp4"
"""What the graphs load; a user chooses another one."""

TILE = download("spacepxl/Wan2.1-control-loras", "loras", "wan2.1-1.3b-control-lora-tile-v1.1_comfy.safetensors", "1.3b/tile")
CANNY = download("Lightricks/LTX-Video-ICLoRA-canny-13b-0.9.7", "loras", "ltxv-097-ic-lora-canny-control-comfyui.safetensors")
LTX_13B = Models((download("Lightricks/LTX-Video", "checkpoints", "ltxv-13b-0.9.7-dev.safetensors"),), LTX.text_encoders, LTX.clip_type)


def draw_wan_control(graph: Graph) -> None:
    """Wan with input channels."""
    sources, top = _begin(graph, WAN_NOTE, TILE, WAN21_T2V, WAN_NEGATIVE, PROMPT)
    video = Step(graph, "Step 2 - Control video, blurred as the tile LoRA was trained", 340, top)
    control = _video(video, 500, Size(832, 480, 33))
    for title, scale in (("Lose the details", 0.25), ("Back to size", 4.0)):
        scaled = video.node("ImageScaleBy", 82, upscale_method="bilinear", scale_by=scale, title=title, wires={"image": control})
        control = scaled, "IMAGE"
    blurred = video.node("ImageBlur", 82, blur_radius=7, sigma=0.4, wires={"image": control})
    video.frame()
    sources |= _control(graph, TILE, sources, (blurred, "IMAGE"))
    run = Step(graph, "Step 5 - Press Run", 1600, 0, 360)
    images = ksampler(run, sources, steps=30, cfg=6.0, sampler_name="uni_pc", shift=8.0)
    _end(run, images, fps=16.0)


def draw_ltx_control(graph: Graph) -> None:
    """LTX-Video with an IC-LoRA."""
    sources, top = _begin(graph, LTX_NOTE, CANNY, LTX_13B, LTX_NEGATIVE, LTX_PROMPT)
    video = Step(graph, "Step 2 - Control video, its edges", 340, top)
    cut = _video(video, 300, Size(768, 512, 97))
    edges = video.node("Canny", 82, low_threshold=0.4, high_threshold=0.8, wires={"image": cut})
    video.frame()
    controlled = _control(graph, CANNY, sources, (edges, "IMAGE"))
    run = Step(graph, "Step 5 - Press Run", 1600, 0, 360)
    sampled = ltx_sampler(run, sources | controlled, {})  # a shift read from the latents would count the reference too
    wires = {name: controlled[name] for name in ("positive", "negative")}
    cropped = run.node("LTXVCropGuides", 66, wires={**wires, "latent": sampled})
    _end(run, decoded(run, sources, (cropped, "latent")), LTX_FPS)


def _begin(graph: Graph, note: str, lora: Download, models: Models, negative: str, prompt: str) -> tuple[Sources, int]:
    """The note, models and prompts; also where the next row begins."""
    graph.note((0, NOTE_TOP), (310, 600), note + links(lora, *models.files), "Start here")
    loading, words = Step(graph, "Step 1 - Load models", 340, 0), Step(graph, "Step 3 - Prompt", 760, 0)
    sources = load_models(loading, models)
    sources |= prompts(words, sources, negative, prompt)
    if models.clip_type == "ltxv":
        told = {name: sources[name] for name in ("positive", "negative")}
        rated = words.node("LTXVConditioning", 78, frame_rate=LTX_FPS, wires=told)
        sources |= {name: (rated, name) for name in told}
    return sources, frame_row(loading, words) + 40


def _video(step: Step, load_height: int, size: Size) -> Wire:
    """From a video, in a column of its own, to its first frames at a size."""
    video = step.node("LoadVideo", load_height, file=CONTROL_VIDEO)
    parts = step.node("GetVideoComponents", 66, wires={"video": (video, "VIDEO")})
    step.column(400)
    cut = step.node("ImageFromBatch", 82, length=size.length, title="How long", wires={"image": (parts, "images")})
    numbers = {"upscale_method": "bilinear", "width": size.width, "height": size.height, "crop": "center"}
    return step.node("ImageScale", 154, title="How large", wires={"image": (cut, "IMAGE")}, **numbers), "IMAGE"


def _control(graph: Graph, lora: Download, sources: Sources, control: Wire) -> Sources:
    step = Step(graph, "Step 4 - Control LoRA", 1180, 0)
    wires = {name: sources[name] for name in ("model", "positive", "negative", "vae")}
    node = step.node("VideoTrainer_ApplyControlLoRA", 370, lora=lora["name"], models=[lora], wires={**wires, "control": control})
    step.frame()
    return {name: (node, name) for name in ("model", "positive", "negative", "latent")}


def _end(step: Step, images: Wire, fps: float) -> None:
    step.column(340)
    save(step, images, fps, "controlled")
    step.frame()


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

CONTROL = {"wan_control_apply": draw_wan_control, "ltx_control_apply": draw_ltx_control}
"""{name of the workflow: its graph}"""
