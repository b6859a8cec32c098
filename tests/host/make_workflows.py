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
    graph.note((-440, 0), (400, 640), WAN21_TRAIN_NOTE + _links(WAN_13B, WAN_VAE, UMT5), "Start here")
    base = graph.node(
        "VideoTrainer_BaseModel",
        (0, 60),
        (380, 300),
        transformer=WAN_13B["name"],
        vae=WAN_VAE["name"],
        text_encoder=UMT5["name"],
        models=[WAN_13B, WAN_VAE, UMT5],
    )
    encoders = graph.node("VideoTrainer_LoadEncoders", (0, 420), (380, None), wires={"base": (base, "base")})
    graph.group("Step 1 - Model", -20, 0, 400, 560)
    clips = graph.node("VideoTrainer_DatasetFromFolder", (440, 60), (400, 300), folder="my_clips", held_out=0.1)
    looked_at = graph.node("VideoTrainer_InspectDataset", (440, 420), (400, 640), max_clips=4, wires={"dataset": (clips, "dataset")})
    graph.group("Step 2 - Your clips", 420, 0, 860, 1080)
    size = {"width": 480, "height": 480, "num_frames": 33}
    encoded = graph.node(
        "VideoTrainer_EncodeDataset",
        (900, 60),
        (380, 400),
        wires={"dataset": (looked_at, "dataset"), "base": (base, "base"), "vae": (encoders, "vae"), "clip": (encoders, "clip")},
        **size,
    )
    previews = graph.node(
        "VideoTrainer_Previews",
        (900, 520),
        (380, 460),
        prompts="a kitten playing the piano",
        negative=WAN_NEGATIVE,
        wires={"base": (base, "base"), "clip": (encoders, "clip")},
        **size,
    )
    graph.group("Step 3 - Size, previews", 880, 0, 1300, 1080)
    run = graph.node(
        "VideoTrainer_TrainLoRA",
        (1340, 60),
        (400, 560),
        name="kitten",
        wires={"base": (base, "base"), "encoded": (encoded, "encoded"), "previews": (previews, "previews")},
    )
    graph.group("Step 4 - Name, then Run", 1320, 0, 1760, 660)
    graph.node("VideoTrainer_WaitForRun", (1340, 760), (400, None), mode=BYPASSED, wires={"run": (run, "run")})
    graph.note((1340, 960), (400, 90), WAIT_NOTE, "About Wait For Run")


def _wan21_t2v(graph: Graph) -> None:
    graph.note((-440, 0), (400, 420), WAN21_T2V_NOTE, "Start here")
    model = graph.node("UNETLoader", (0, 60), (380, 82), unet_name=WAN_13B["name"], weight_dtype="default", models=[WAN_13B])
    clip = graph.node("CLIPLoader", (0, 200), (380, 106), clip_name=UMT5["name"], type="wan", models=[UMT5])
    vae = graph.node("VAELoader", (0, 360), (380, 60), vae_name=WAN_VAE["name"], models=[WAN_VAE])
    graph.group("Step 1 - Load models", -20, 0, 400, 440)
    lora = graph.node("VideoTrainer_ApplyLoRA", (440, 60), (380, 260), lora="none", wires={"model": (model, "MODEL")})
    graph.group("Step 2 - Your LoRA", 420, 0, 840, 440)
    latents = graph.node("EmptyHunyuanLatentVideo", (0, 540), (380, 130), width=480, height=480, length=33)
    graph.group("Step 3 - Video size", -20, 480, 400, 860)
    words = "a kitten playing the piano"
    positive = graph.node("CLIPTextEncode", (440, 540), (380, 120), text=words, title="Prompt", wires={"clip": (clip, "CLIP")})
    negative = graph.node(
        "CLIPTextEncode", (440, 710), (380, 130), text=WAN_NEGATIVE, title="Negative prompt", wires={"clip": (clip, "CLIP")}
    )
    graph.group("Step 4 - Prompt", 420, 480, 840, 860)
    prompt = {"positive": (positive, "CONDITIONING"), "negative": (negative, "CONDITIONING"), "latent_image": (latents, "LATENT")}
    numbers = {"steps": 30, "cfg": 6.0, "sampler_name": "uni_pc", "shift": 8.0, "fps": 16.0}
    _sample(graph, (900, 60), (lora, "model"), prompt, (vae, "VAE"), prefix="video/kitten", **numbers)
    graph.group("Step 5 - Press Run", 880, 0, 1980, 860)


def _tiny_wan(graph: Graph) -> None:
    graph.note((-440, 0), (400, 520), TINY_NOTE, "Start here")
    base = graph.node("VideoTrainer_BaseModel", (0, 60), (340, 300), transformer=TINY, vae=TINY, text_encoder=TINY)
    encoders = graph.node("VideoTrainer_LoadEncoders", (0, 420), (340, 110), wires={"base": (base, "base")})
    model = graph.node("VideoTrainer_LoadTransformer", (0, 580), (340, None), wires={"base": (base, "base")})
    graph.group("Step 1 - Model", -20, 0, 360, 740)
    clips = graph.node("VideoTrainer_DatasetFromFolder", (400, 60), (400, 300), folder=SHAPES, held_out=0.1)
    looked_at = graph.node("VideoTrainer_InspectDataset", (400, 420), (400, 640), max_clips=4, wires={"dataset": (clips, "dataset")})
    graph.group("Step 2 - Clips", 380, 0, 820, 1080)
    encoded = graph.node(
        "VideoTrainer_EncodeDataset",
        (860, 60),
        (340, 400),
        width=64,
        height=64,
        num_frames=9,
        wires={"dataset": (looked_at, "dataset"), "base": (base, "base"), "vae": (encoders, "vae"), "clip": (encoders, "clip")},
    )
    run = graph.node(
        "VideoTrainer_TrainLoRA",
        (1240, 60),
        (360, 460),
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
    wait = graph.node("VideoTrainer_WaitForRun", (1240, 600), (360, 220), wires={"run": (run, "run")})
    graph.group("Step 3 - Encode and train", 840, 0, 1620, 860)
    lora = graph.node(
        "VideoTrainer_ApplyLoRA", (1660, 60), (320, 240), lora="none", wires={"model": (model, "model"), "run": (wait, "run")}
    )
    positive = graph.node(
        "CLIPTextEncode", (1660, 360), (320, 110), text="a red circle moving diagonally", wires={"clip": (encoders, "clip")}
    )
    negative = graph.node("CLIPTextEncode", (1660, 520), (320, 90), text="", wires={"clip": (encoders, "clip")})
    latents = graph.node("EmptyHunyuanLatentVideo", (1660, 670), (320, 130), width=64, height=64, length=9)
    prompt = {"positive": (positive, "CONDITIONING"), "negative": (negative, "CONDITIONING"), "latent_image": (latents, "LATENT")}
    numbers = {"steps": 20, "cfg": 3.0, "sampler_name": "euler", "shift": 3.0, "fps": 8.0}
    _sample(graph, (2020, 60), (lora, "model"), prompt, (encoders, "vae"), prefix="video/with_lora", title="with the LoRA", **numbers)
    _sample(graph, (2020, 560), (model, "model"), prompt, (encoders, "vae"), prefix="video/without", title="without", **numbers)
    graph.group("Step 4 - Use it", 1640, 0, 3120, 1060)


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
    """From noise to a saved video: a column for the sampler, and one for what follows."""
    left, top = position
    behind = f" ({title})" if title else ""
    shifted = graph.node("ModelSamplingSD3", (left, top), (320, 58), shift=shift, wires={"model": model})
    sampled = graph.node(
        "KSampler",
        (left, top + 110),
        (320, 300),
        steps=steps,
        cfg=cfg,
        sampler_name=sampler_name,
        scheduler="simple",
        seed=1000,
        title=f"KSampler{behind}",
        wires={"model": (shifted, "MODEL"), **prompt},
    )
    decoded = graph.node("VAEDecode", (left + 360, top), (320, 46), wires={"samples": (sampled, "LATENT"), "vae": vae})
    video = graph.node("CreateVideo", (left + 360, top + 110), (320, 78), fps=fps, wires={"images": (decoded, "IMAGE")})
    graph.node(
        "SaveVideo",
        (left + 720, top),
        (340, 460),
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
