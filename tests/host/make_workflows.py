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

from graph_builder import BYPASSED, Graph

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
    graph.note((-420, 0), (380, 620), WAN21_TRAIN_NOTE + _links(WAN_13B, WAN_VAE, UMT5), "Start here")
    base = graph.node(
        "VideoTrainer_BaseModel",
        (0, 60),
        (380, None),
        transformer=WAN_13B["name"],
        vae=WAN_VAE["name"],
        text_encoder=UMT5["name"],
        models=[WAN_13B, WAN_VAE, UMT5],
    )
    encoders = graph.node("VideoTrainer_LoadEncoders", (0, 440), (380, None), wires={"base": (base, "base")})
    graph.group("Step 1 - Model", -20, 0, 400, 620)
    clips = graph.node("VideoTrainer_DatasetFromFolder", (440, 60), (380, None), held_out=0.1)
    encoded = graph.node(
        "VideoTrainer_EncodeDataset",
        (440, 400),
        (380, None),
        width=480,
        height=480,
        num_frames=33,
        wires={"dataset": (clips, "dataset"), "base": (base, "base"), "vae": (encoders, "vae"), "clip": (encoders, "clip")},
    )
    graph.group("Step 2 - Your clips", 420, 0, 840, 900)
    previews = graph.node(
        "VideoTrainer_Previews",
        (880, 60),
        (400, 560),
        prompts="a kitten playing the piano",
        width=480,
        height=480,
        num_frames=33,
        every_steps=250,
        wires={"base": (base, "base"), "clip": (encoders, "clip")},
    )
    graph.group("Step 3 - Previews", 860, 0, 1300, 900)
    run = graph.node(
        "VideoTrainer_TrainLoRA",
        (1340, 60),
        (400, 760),
        name="kitten",
        trigger_words="",
        steps=2000,
        wires={"base": (base, "base"), "encoded": (encoded, "encoded"), "previews": (previews, "previews")},
    )
    graph.group("Step 4 - Train: press Run", 1320, 0, 1760, 900)
    graph.node("VideoTrainer_WaitForRun", (1800, 60), (300, None), mode=BYPASSED, wires={"run": (run, "run")})
    graph.note((1800, 260), (300, 200), WAIT_NOTE)


def _wan21_t2v(graph: Graph) -> None:
    graph.note((-420, 0), (380, 420), WAN21_T2V_NOTE, "Start here")
    model = graph.node("UNETLoader", (0, 60), (380, None), unet_name=WAN_13B["name"], weight_dtype="default", models=[WAN_13B])
    clip = graph.node("CLIPLoader", (0, 200), (380, 106), clip_name=UMT5["name"], type="wan", models=[UMT5])
    vae = graph.node("VAELoader", (0, 350), (380, None), vae_name=WAN_VAE["name"], models=[WAN_VAE])
    graph.group("Step 1 - Load models", -20, 0, 400, 440)
    lora = graph.node("VideoTrainer_ApplyLoRA", (440, 60), (380, None), lora="none", wires={"model": (model, "MODEL")})
    graph.group("Step 2 - LoRA", 420, 0, 840, 440)
    latents = graph.node("EmptyHunyuanLatentVideo", (0, 520), (380, 130), width=480, height=480, length=33)
    graph.group("Step 3 - Video size", -20, 460, 400, 680)
    positive = graph.node("CLIPTextEncode", (440, 520), (380, 160), text="a kitten playing the piano", wires={"clip": (clip, "CLIP")})
    negative = graph.node("CLIPTextEncode", (440, 710), (380, 160), text=WAN_NEGATIVE, wires={"clip": (clip, "CLIP")})
    graph.group("Step 4 - Prompt", 420, 460, 840, 890)
    shifted = graph.node("ModelSamplingSD3", (880, 60), (320, 58), shift=8.0, wires={"model": (lora, "model")})
    _sample(
        graph,
        (880, 160),
        shifted,
        "MODEL",
        positive,
        negative,
        latents,
        vae,
        "VAE",
        steps=30,
        cfg=6.0,
        sampler="uni_pc",
        prefix="video/kitten",
    )
    graph.group("Step 5 - Press Run", 860, 0, 1580, 680)


def _tiny_wan(graph: Graph) -> None:
    graph.note((-420, 0), (380, 520), TINY_NOTE, "Start here")
    base = graph.node("VideoTrainer_BaseModel", (0, 60), (340, None), transformer=TINY, vae=TINY, text_encoder=TINY)
    encoders = graph.node("VideoTrainer_LoadEncoders", (0, 440), (340, None), wires={"base": (base, "base")})
    model = graph.node("VideoTrainer_LoadTransformer", (0, 580), (340, None), wires={"base": (base, "base")})
    graph.group("Step 1 - Model", -20, 0, 360, 740)
    clips = graph.node("VideoTrainer_DatasetFromFolder", (400, 60), (340, None), folder=SHAPES, held_out=0.1)
    encoded = graph.node(
        "VideoTrainer_EncodeDataset",
        (400, 400),
        (340, None),
        width=64,
        height=64,
        num_frames=9,
        wires={"dataset": (clips, "dataset"), "base": (base, "base"), "vae": (encoders, "vae"), "clip": (encoders, "clip")},
    )
    graph.group("Step 2 - Clips", 380, 0, 760, 740)
    run = graph.node(
        "VideoTrainer_TrainLoRA",
        (800, 60),
        (360, 640),
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
    wait = graph.node("VideoTrainer_WaitForRun", (800, 760), (360, None), wires={"run": (run, "run")})
    graph.group("Step 3 - Train", 780, 0, 1180, 960)
    lora = graph.node(
        "VideoTrainer_ApplyLoRA", (1220, 60), (320, None), lora="none", wires={"model": (model, "model"), "run": (wait, "run")}
    )
    positive = graph.node(
        "CLIPTextEncode", (1220, 290), (320, 110), text="a red circle moving diagonally", wires={"clip": (encoders, "clip")}
    )
    negative = graph.node("CLIPTextEncode", (1220, 440), (320, 90), text="", wires={"clip": (encoders, "clip")})
    latents = graph.node("EmptyHunyuanLatentVideo", (1220, 570), (320, 130), width=64, height=64, length=9)
    shifted = graph.node("ModelSamplingSD3", (1580, 60), (320, 58), shift=3.0, wires={"model": (lora, "model")})
    _sample(
        graph, (1580, 160), shifted, "MODEL", positive, negative, latents, encoders, "vae",
        steps=20, cfg=3.0, sampler="euler", prefix="video/diagonally", fps=8.0, title="with the LoRA",
    )  # fmt: skip
    before = graph.node("ModelSamplingSD3", (1580, 560), (320, 58), shift=3.0, wires={"model": (model, "model")})
    _sample(
        graph, (1580, 660), before, "MODEL", positive, negative, latents, encoders, "vae",
        steps=20, cfg=3.0, sampler="euler", prefix="video/before", fps=8.0, title="without",
    )  # fmt: skip
    graph.group("Step 4 - Use it", 1200, 0, 2280, 1100)


def _sample(
    graph: Graph,
    position: tuple[int, int],
    model: Any,
    model_output: str,
    positive: Any,
    negative: Any,
    latents: Any,
    vae: Any,
    vae_output: str,
    *,
    steps: int,
    cfg: float,
    sampler: str,
    prefix: str,
    fps: float = 16.0,
    title: str = "",
) -> None:
    """From noise to a saved video: a column for the sampler, and one for what follows."""
    left, top = position
    sampled = graph.node(
        "KSampler",
        (left, top),
        (320, 300),
        steps=steps,
        cfg=cfg,
        sampler_name=sampler,
        scheduler="simple",
        seed=1000,
        title=f"KSampler ({title})" if title else "",
        wires={
            "model": (model, model_output),
            "positive": (positive, "CONDITIONING"),
            "negative": (negative, "CONDITIONING"),
            "latent_image": (latents, "LATENT"),
        },
    )
    decoded = graph.node("VAEDecode", (left + 360, top - 100), (320, 46), wires={"samples": (sampled, "LATENT"), "vae": (vae, vae_output)})
    video = graph.node("CreateVideo", (left + 360, top), (320, 78), fps=fps, wires={"images": (decoded, "IMAGE")})
    graph.node(
        "SaveVideo",
        (left + 360, top + 120),
        (320, 240),
        filename_prefix=prefix,
        title=f"Save Video ({title})" if title else "",
        wires={"video": (video, "VIDEO")},
    )


WAN21_TRAIN_NOTE = """
## Train a LoRA for Wan 2.1

1. **Clips**: put a folder of videos or images into ComfyUI's `input` folder, each with a caption of the same name beside it
   (`kitten.mp4`, `kitten.txt`). Press **R** to refresh, then choose the folder in *Step 2*.
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
