"""The workflow that shows everything with the model that comes with the pack: training, waiting, and videos with and without the LoRA."""

from __future__ import annotations

from graph_builder import Graph, Wire
from graph_layout import NOTE_TOP, Step
from sampling_parts import Sources, ksampler, save

TINY = "tiny Wan (built in)"
SHAPES = "moving shapes (built in)"
SIZE = {"width": 64, "height": 64}


def draw_tiny_wan(graph: Graph) -> None:
    graph.note((0, NOTE_TOP), (340, 400), TINY_NOTE, "Start here")
    base, encoders, model = _models(graph)
    run = _train(graph, base, encoders)
    use = Step(graph, "Step 4 - Use it", 1180, 0, 340)
    lora = use.node("VideoTrainer_ApplyLoRA", 240, lora="none", wires={"model": model, "run": run})
    clip = {"clip": encoders["clip"]}
    positive = use.node("CLIPTextEncode", 110, text="a red circle moving diagonally", wires=clip)
    negative = use.node("CLIPTextEncode", 90, text="", wires=clip)
    latent = use.node("EmptyHunyuanLatentVideo", 130, length=9, **SIZE)
    prompt: Sources = {"positive": (positive, "CONDITIONING"), "negative": (negative, "CONDITIONING"), "latent": (latent, "LATENT")}
    _videos(use, {**prompt, "vae": encoders["vae"]}, {"with the LoRA": (lora, "model"), "without": model})
    use.frame()


def _models(graph: Graph) -> tuple[Wire, Sources, Wire]:
    """Base, what encodes, and what samples."""
    step = Step(graph, "Step 1 - Model", -20, 480, 380)
    base = step.node("VideoTrainer_BaseModel", 280, transformer=TINY, vae=TINY, text_encoder=TINY), "base"
    encoders = step.node("VideoTrainer_LoadEncoders", wires={"base": base})
    model = step.node("VideoTrainer_LoadTransformer", wires={"base": base})
    step.frame()
    return base, {name: (encoders, name) for name in ("clip", "vae")}, (model, "model")


def _train(graph: Graph, base: Wire, encoders: Sources) -> Wire:
    """The run, once it has ended."""
    clips = Step(graph, "Step 2 - Clips", 380, 0, 380)
    dataset = clips.node("VideoTrainer_DatasetFromFolder", 300, folder=SHAPES, held_out=0.1), "dataset"
    encoded = clips.node("VideoTrainer_EncodeDataset", 420, num_frames=9, wires={"dataset": dataset, "base": base, **encoders}, **SIZE)
    clips.frame()
    step = Step(graph, "Step 3 - Train", 780, 0, 380)
    run = step.node(
        "VideoTrainer_TrainLoRA",
        480,
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
        wires={"base": base, "encoded": (encoded, "encoded")},
    )
    wait = step.node("VideoTrainer_WaitForRun", 240, wires={"run": (run, "run")})
    step.frame()
    return wait, "run"


def _videos(step: Step, sources: Sources, models: Sources) -> None:
    """The same noise by each of the models, by what a title says of it: samplers in one column, videos in the next."""
    step.column(300)
    images = {
        said: ksampler(step, {**sources, "model": model}, steps=20, cfg=3.0, sampler_name="euler", shift=3.0, title=f"KSampler ({said})")
        for said, model in models.items()
    }
    step.column(320)
    for (said, frames), name in zip(images.items(), ("with_lora", "without"), strict=True):
        save(step, frames, 8.0, name, title=f"Save Video ({said})")


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
