"""The shipped workflows, described: `python tests/host/make_workflows.py URL` writes them from a running ComfyUI with the pack.

A test holds the files in `workflows/` against this description.
"""

from __future__ import annotations

import json
import sys
import tomllib
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from control_graphs import ltx_control_apply, wan_control_apply
from graph_builder import BYPASSED, Graph, Node

ROOT = Path(__file__).parents[2]
TINY = "tiny Wan (built in)"
SHAPES = "moving shapes (built in)"

_WAN = "https://huggingface.co/Comfy-Org/Wan_2.1_ComfyUI_repackaged/resolve/main/split_files"


def _file(directory: str, name: str) -> dict[str, str]:
    """What the page needs to offer a download."""
    return {"name": name, "url": f"{_WAN}/{directory}/{name}?download=true", "directory": directory}


WAN_13B = _file("diffusion_models", "wan2.1_t2v_1.3B_fp16.safetensors")
WAN_VAE = _file("vae", "wan_2.1_vae.safetensors")
UMT5 = _file("text_encoders", "umt5_xxl_fp8_e4m3fn_scaled.safetensors")
WAN_NEGATIVE = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，多余的手指，"
    "画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)


def workflows(object_info: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """{file name: workflow} of all that are shipped."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"]
    makers = {
        "wan21_train.json": _wan21_train,
        "wan21_t2v.json": _wan21_t2v,
        "tiny_wan_train_and_sample.json": _tiny_wan,
        "wan_control_apply.json": lambda graph: wan_control_apply(graph, (WAN_13B, UMT5, WAN_VAE), WAN_NEGATIVE, _sample),
        "ltx_control_apply.json": ltx_control_apply,
    }
    made = {}
    for name, make in makers.items():
        graph = Graph(object_info, "video-trainer", version)
        make(graph)
        made[name] = graph.json()
    return made


def _links(*files: Mapping[str, str]) -> str:
    """A list of downloads, in Markdown."""
    return "\n".join(f"- [{file['name']}]({file['url']}) in `models/{file['directory']}`" for file in files)


def text(workflow: Mapping[str, Any]) -> str:
    return json.dumps(workflow, indent=1, ensure_ascii=False) + "\n"


def _wan21_train(graph: Graph) -> None:
    graph.note((0, 40), (320, 640), WAN21_TRAIN_NOTE + _links(WAN_13B, WAN_VAE, UMT5), "Start here")
    base = graph.node(
        "VideoTrainer_BaseModel",
        (380, 60),
        (340, 300),
        transformer=WAN_13B["name"],
        vae=WAN_VAE["name"],
        text_encoder=UMT5["name"],
        models=[WAN_13B, WAN_VAE, UMT5],
    )
    encoders = graph.node("VideoTrainer_LoadEncoders", (380, 420), (340, None), wires={"base": (base, "base")})
    graph.group("Step 1 - Model", 360, 0, 740, 560)
    clips = graph.node("VideoTrainer_DatasetFromFolder", (780, 60), (420, 280), folder="my_clips", held_out=0.1)
    looked_at = graph.node("VideoTrainer_InspectDataset", (780, 400), (420, 620), max_clips=4, wires={"dataset": (clips, "dataset")})
    graph.group("Step 2 - Clips", 760, 0, 1220, 1040)
    size = {"width": 480, "height": 480, "num_frames": 33}
    encoded = graph.node(
        "VideoTrainer_EncodeDataset",
        (1260, 60),
        (320, 400),
        wires={"dataset": (looked_at, "dataset"), "base": (base, "base"), "vae": (encoders, "vae"), "clip": (encoders, "clip")},
        **size,
    )
    previews = graph.node(
        "VideoTrainer_Previews",
        (1260, 520),
        (320, 480),
        prompts="a kitten playing the piano",
        negative=WAN_NEGATIVE,
        wires={"base": (base, "base"), "clip": (encoders, "clip")},
        **size,
    )
    graph.group("Step 3 - Size", 1240, 0, 1600, 1040)
    run = graph.node(
        "VideoTrainer_TrainLoRA",
        (1640, 60),
        (340, 520),
        name="kitten",
        wires={"base": (base, "base"), "encoded": (encoded, "encoded"), "previews": (previews, "previews")},
    )
    graph.group("Step 4 - Train", 1620, 0, 2000, 620)
    graph.node("VideoTrainer_WaitForRun", (1640, 700), (340, 180), mode=BYPASSED, wires={"run": (run, "run")})
    graph.note((1640, 940), (340, 100), WAIT_NOTE, "About Wait For Run")


def _wan21_t2v(graph: Graph) -> None:
    graph.note((0, 40), (300, 420), WAN21_T2V_NOTE, "Start here")
    model = graph.node("UNETLoader", (360, 60), (360, 82), unet_name=WAN_13B["name"], weight_dtype="default", models=[WAN_13B])
    clip = graph.node("CLIPLoader", (360, 200), (360, 106), clip_name=UMT5["name"], type="wan", models=[UMT5])
    vae = graph.node("VAELoader", (360, 360), (360, 60), vae_name=WAN_VAE["name"], models=[WAN_VAE])
    graph.group("Step 1 - Load models", 340, 0, 740, 440)
    lora = graph.node("VideoTrainer_ApplyLoRA", (780, 60), (360, 260), lora="none", wires={"model": (model, "MODEL")})
    graph.group("Step 2 - Your LoRA", 760, 0, 1160, 440)
    latents = graph.node("EmptyHunyuanLatentVideo", (360, 540), (360, 130), width=480, height=480, length=33)
    graph.group("Step 3 - Video size", 340, 480, 740, 860)
    words = "a kitten playing the piano"
    positive = graph.node("CLIPTextEncode", (780, 540), (360, 120), text=words, title="Prompt", wires={"clip": (clip, "CLIP")})
    negative = graph.node(
        "CLIPTextEncode", (780, 710), (360, 130), text=WAN_NEGATIVE, title="Negative prompt", wires={"clip": (clip, "CLIP")}
    )
    graph.group("Step 4 - Prompt", 760, 480, 1160, 860)
    prompt = {"positive": (positive, "CONDITIONING"), "negative": (negative, "CONDITIONING"), "latent_image": (latents, "LATENT")}
    numbers = {"steps": 30, "cfg": 6.0, "sampler_name": "uni_pc", "shift": 8.0, "fps": 16.0}
    _sample(graph, (1200, 60), (lora, "model"), prompt, (vae, "VAE"), prefix="video/kitten", **numbers)
    graph.group("Step 5 - Press Run", 1180, 0, 1880, 860)


def _tiny_wan(graph: Graph) -> None:
    graph.note((0, 40), (340, 400), TINY_NOTE, "Start here")
    base = graph.node("VideoTrainer_BaseModel", (0, 560), (340, 280), transformer=TINY, vae=TINY, text_encoder=TINY)
    encoders = graph.node("VideoTrainer_LoadEncoders", (0, 890), (340, 110), wires={"base": (base, "base")})
    model = graph.node("VideoTrainer_LoadTransformer", (0, 1050), (340, None), wires={"base": (base, "base")})
    graph.group("Step 1 - Model", -20, 500, 360, 1180)
    clips = graph.node("VideoTrainer_DatasetFromFolder", (400, 60), (340, 300), folder=SHAPES, held_out=0.1)
    encoded = graph.node(
        "VideoTrainer_EncodeDataset",
        (400, 420),
        (340, 420),
        width=64,
        height=64,
        num_frames=9,
        wires={"dataset": (clips, "dataset"), "base": (base, "base"), "vae": (encoders, "vae"), "clip": (encoders, "clip")},
    )
    graph.group("Step 2 - Clips", 380, 0, 760, 880)
    run = graph.node(
        "VideoTrainer_TrainLoRA",
        (800, 60),
        (340, 480),
        name="diagonally",
        trigger_words="diagonally",
        steps=100,
        rank=16,
        learning_rate=1e-3,
        batch_size=12,
        save_every=50,
        warmup_steps=10,
        noise="shift",
        held_out_every=50,
        gradient_checkpointing=False,
        wires={"base": (base, "base"), "encoded": (encoded, "encoded")},
    )
    wait = graph.node("VideoTrainer_WaitForRun", (800, 600), (340, 240), wires={"run": (run, "run")})
    graph.group("Step 3 - Train", 780, 0, 1160, 880)
    lora = graph.node(
        "VideoTrainer_ApplyLoRA", (1200, 60), (300, 240), lora="none", wires={"model": (model, "model"), "run": (wait, "run")}
    )
    positive = graph.node(
        "CLIPTextEncode", (1200, 360), (300, 110), text="a red circle moving diagonally", wires={"clip": (encoders, "clip")}
    )
    negative = graph.node("CLIPTextEncode", (1200, 520), (300, 90), text="", wires={"clip": (encoders, "clip")})
    latents = graph.node("EmptyHunyuanLatentVideo", (1200, 670), (300, 130), width=64, height=64, length=9)
    prompt = {"positive": (positive, "CONDITIONING"), "negative": (negative, "CONDITIONING"), "latent_image": (latents, "LATENT")}
    numbers = {"steps": 20, "cfg": 3.0, "sampler_name": "euler", "shift": 3.0, "fps": 8.0}
    _sample(graph, (1540, 60), (lora, "model"), prompt, (encoders, "vae"), prefix="video/with_lora", title="with the LoRA", **numbers)
    _sample(graph, (1540, 680), (model, "model"), prompt, (encoders, "vae"), prefix="video/without", title="without", **numbers)
    graph.group("Step 4 - Use it", 1180, 0, 2240, 1260)


def _sample(
    graph: Graph,
    position: tuple[int, int],
    model: tuple[Node, str],
    prompt: Mapping[str, tuple[Node, str]],
    vae: tuple[Node, str],
    *,
    steps: int,
    cfg: float,
    sampler_name: str,
    shift: float,
    fps: float,
    prefix: str,
    title: str = "",
) -> None:
    """From noise to a saved video: a column for the sampler and what follows, and one for the video."""
    left, top = position
    behind = f" ({title})" if title else ""
    shifted = graph.node("ModelSamplingSD3", (left, top), (300, 58), shift=shift, wires={"model": model})
    sampled = graph.node(
        "KSampler",
        (left, top + 100),
        (300, 262),
        steps=steps,
        cfg=cfg,
        sampler_name=sampler_name,
        scheduler="simple",
        seed=1000,
        title=f"KSampler{behind}",
        wires={"model": (shifted, "MODEL"), **prompt},
    )
    decoded = graph.node("VAEDecode", (left, top + 410), (300, 46), wires={"samples": (sampled, "LATENT"), "vae": vae})
    video = graph.node("CreateVideo", (left + 340, top), (320, 78), fps=fps, wires={"images": (decoded, "IMAGE")})
    graph.node(
        "SaveVideo",
        (left + 340, top + 120),
        (320, 420),
        filename_prefix=prefix,
        title=f"Save Video{behind}",
        wires={"video": (video, "VIDEO")},
    )


WAN21_TRAIN_NOTE = """
## Train a LoRA for Wan 2.1

1. **Clips**: put videos or images into a folder `my_clips` in ComfyUI's `input` folder, each with its caption beside it
   (`kitten.mp4`, `kitten.txt`), and press **R**. Or choose another folder in *Step 2*.
2. **Name** your LoRA in *Step 4*.
3. Press **Run**. Clips and captions are encoded once (the queue waits for that); then training starts in the background and
   the queue is free again.
4. Watch it in the **Video Trainer** tab on the left: loss, time left, pause and stop.
5. **Use it** in the workflow *wan21_t2v*, or in any graph: `output/loras/<name>`.

Pressing Run again attaches to the run, or resumes it. ComfyUI may be closed meanwhile.

### Files
"""

WAIT_NOTE = """
**Wait For Run** is bypassed, so that the queue stays free. Only a graph that goes on with the finished LoRA needs it: select
it and press Ctrl+B.
"""

WAN21_T2V_NOTE = """
## Text to video with your LoRA (Wan 2.1)

1. Choose your LoRA in *Step 2*: a file, or `<run>: newest` for the last one of a run, also while it trains. Press **R** when
   it is not in the list yet.
2. Write a prompt like your captions, with the trigger words.
3. Press **Run**.

With `none` the same prompt shows the model without the LoRA. The three model files are those of *wan21_train*.
"""

TINY_NOTE = """
## Try the whole thing in a few minutes

No download, no GPU: a tiny Wan and its clips come with Video Trainer. The model knows shapes that move left, right, up and
down. The LoRA teaches it **moving diagonally**.

1. Press **Run**.
2. Watch the run in the **Video Trainer** tab on the left (two to four minutes on a laptop). *Wait For Run* holds this graph
   until the LoRA is there.
3. Compare the two videos in *Step 4*: the same noise, with and without the LoRA.

Press Run again: nothing is trained twice. Change the prompt: `a blue square moving diagonally`.

Your own videos: open the workflow *wan21_train*.
"""


if __name__ == "__main__":
    with urllib.request.urlopen(f"{sys.argv[1]}/object_info") as answer:
        info = json.load(answer)
    for file_name, content in workflows(info).items():
        (ROOT / "workflows" / file_name).write_text(text(content), encoding="utf-8", newline="\n")
        print(file_name)
