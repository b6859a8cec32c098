"""The workflows that train a LoRA: the same steps for every model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import downloads as files
from downloads import Models, links
from graph_builder import BYPASSED, Graph, Wire
from graph_layout import NOTE_TOP, Step
from sampling_parts import FIRST_FRAME, LTX_NEGATIVE, PROMPT, WAN_NEGATIVE, Size


@dataclass(frozen=True)
class Training:
    """A graph. `sizes` says which clips the model takes."""

    title: str
    samples: str
    models: Models
    size: Size
    sizes: str
    negative: str = ""
    first_frame: bool = False
    more: str = ""

    def draw(self, graph: Graph) -> None:
        graph.note((0, NOTE_TOP), (330, 700), self._note(), "Start here")
        step = Step(graph, "Step 1 - Model", 360, 0, 460)
        base, encoders = _base(step, self.models)
        clips = Step(graph, "Step 2 - Clips", 840, 0, 460)
        folder = clips.node("VideoTrainer_DatasetFromFolder", 280, folder="my_clips", held_out=0.1)
        dataset = clips.node("VideoTrainer_InspectDataset", 620, max_clips=4, wires={"dataset": (folder, "dataset")}), "dataset"
        image = self._image(Step(graph, "First frame of the previews", step.left, step.bottom + 40, 460)) if self.first_frame else {}
        size = Step(graph, "Step 3 - Size", 1320, 0, 360)
        geometry = {"width": self.size.width, "height": self.size.height, "num_frames": self.size.length}
        looks = {name: wire for name, wire in encoders.items() if name == "clip_vision"}
        wires = {"dataset": dataset, "base": base, "vae": encoders["vae"], "clip": encoders["clip"], **looks}
        encoded = size.node("VideoTrainer_EncodeDataset", 400, wires=wires, **geometry), "encoded"
        starts = {"vae": encoders["vae"], **looks, **image} if image else {}
        wires = {"base": base, "clip": encoders["clip"], **starts}
        words = {"prompts": PROMPT, "negative": self.negative}
        previews = size.node("VideoTrainer_Previews", 480, wires=wires, **words, **geometry), "previews"
        clips.frame(size.frame(clips.bottom))
        _train(graph, {"base": base, "encoded": encoded, "previews": previews})

    def _image(self, step: Step) -> dict[str, Wire]:
        image = step.node("LoadImage", 326, image=FIRST_FRAME)
        step.frame()
        return {"images": (image, "IMAGE")}

    def _note(self) -> str:
        more = "\n\n".join(part.strip() for part in (FIRST_FRAME_NOTE if self.first_frame else "", self.more) if part)
        note = TRAIN_NOTE.format(title=self.title, samples=self.samples, sizes=self.sizes)
        return f"{note}\n{more}\n\n### Files\n" + links(*self.models.files)


def _base(step: Step, models: Models) -> tuple[Wire, dict[str, Wire]]:
    """The model's files, and what ComfyUI loads of them."""
    second = models.text_encoders[1:] + models.transformers[1:]
    chosen = {"text_encoder_2": models.text_encoders[1:], "transformer_low_noise": models.transformers[1:]}
    chosen["clip_vision"] = (models.clip_vision,) if models.clip_vision else ()
    unfolded = bool(second or models.clip_vision)
    base = step.node(
        "VideoTrainer_BaseModel",
        400 if unfolded else 300,
        transformer=models.transformers[0]["name"],
        vae=(models.vae or models.transformers[0])["name"],
        text_encoder=models.text_encoders[0]["name"],
        models=models.files,
        unfolded=unfolded,
        **{name: of[0]["name"] for name, of in chosen.items() if of},
    )
    encoders = step.node("VideoTrainer_LoadEncoders", wires={"base": (base, "base")})
    step.frame()
    names = ("clip", "vae", *(("clip_vision",) if models.clip_vision else ()))
    return (base, "base"), {name: (encoders, name) for name in names}


def _train(graph: Graph, wires: Mapping[str, Wire]) -> None:
    step = Step(graph, "Step 4 - Train", 1700, 0, 380)
    run = step.node("VideoTrainer_TrainLoRA", 520, name="kitten", wires=wires)
    step.frame()
    waiting = Step(graph, "Wait for the LoRA (off)", 1700, step.bottom + 40, 380)
    waiting.node("VideoTrainer_WaitForRun", 180, mode=BYPASSED, wires={"run": (run, "run")})
    waiting.note(100, WAIT_NOTE, "About Wait For Run")
    waiting.frame()


TRAIN_NOTE = """
## Train a LoRA for {title}

1. **Files**: put each where the list below says (ComfyUI offers to download what is missing), then press **R**.
2. **Clips**: put videos or images into a folder `my_clips` in ComfyUI's `input` folder, each with its caption beside it
   (`kitten.mp4`, `kitten.txt`), and press **R**. Or choose another folder in *Step 2*.
3. **Size** in *Step 3*: {sizes}. Smaller needs less memory. Write a prompt of yours for the previews.
4. **Name** your LoRA in *Step 4*.
5. Press **Run**. Clips and captions are encoded once (the queue waits for that); then training starts in the background and
   the queue is free again.
6. Watch it in the **Video Trainer** tab on the left: loss, time left, previews, pause and stop.
7. **Use it** in {samples}, or in any graph: `output/loras/<name>`.

Pressing Run again attaches to the run, or resumes it. ComfyUI may be closed meanwhile.
"""

FIRST_FRAME_NOTE = """
**First frames**: each clip is learned together with its own first frame. The previews start from the image below *Step 1*:
choose one of yours.
"""

MAYBE_FIRST_FRAME = """
**Image to video too**: for some of the clips the first frame is given. How often: `first_frame_probability` of *Train LoRA*.
"""

TWO_EXPERTS = """
**Two models**: both are trained in one run, in turns, a LoRA each: `<name>-high-...` and `<name>-low-...`. *Apply LoRA* puts
each on its model.
"""

WAIT_NOTE = """
**Wait For Run** is bypassed, so that the queue stays free. Only a graph that goes on with the finished LoRA needs it: select
it and press Ctrl+B.
"""

_WAN = "sides in multiples of 16, 4n+1 frames (33, 49, 81)"

TRAINING: Mapping[str, Training] = {
    "wan21_train": Training(
        "Wan 2.1 1.3B",
        "*wan21_t2v*",
        files.WAN21_T2V,
        Size(480, 480, 33),
        _WAN,
        WAN_NEGATIVE,
    ),
    "wan21_train_i2v": Training(
        "Wan 2.1 I2V 14B",
        "*wan21_i2v*",
        files.WAN21_I2V,
        Size(480, 480, 33),
        _WAN,
        WAN_NEGATIVE,
        first_frame=True,
    ),
    "wan22_5b_train": Training(
        "Wan 2.2 5B",
        "*wan22_5b_t2v* and *wan22_5b_i2v*",
        files.WAN22_5B,
        Size(640, 640, 49),
        "sides in multiples of 32, 4n+1 frames (33, 49, 81)",
        WAN_NEGATIVE,
        more=MAYBE_FIRST_FRAME,
    ),
    "wan22_a14b_train": Training(
        "Wan 2.2 T2V A14B",
        "*wan22_a14b_t2v*",
        files.WAN22_T2V,
        Size(480, 480, 33),
        _WAN,
        WAN_NEGATIVE,
        more=TWO_EXPERTS,
    ),
    "wan22_a14b_train_i2v": Training(
        "Wan 2.2 I2V A14B",
        "*wan22_a14b_i2v*",
        files.WAN22_I2V,
        Size(480, 480, 33),
        _WAN,
        WAN_NEGATIVE,
        first_frame=True,
        more=TWO_EXPERTS,
    ),
    "ltx_train": Training(
        "LTX-Video 2B 0.9.5",
        "*ltx_t2v* and *ltx_i2v*",
        files.LTX,
        Size(512, 512, 49),
        "sides in multiples of 32, 8n+1 frames (25, 49, 97)",
        LTX_NEGATIVE,
        more=MAYBE_FIRST_FRAME,
    ),
    "hunyuan_train": Training(
        "HunyuanVideo",
        "*hunyuan_t2v*",
        files.HUNYUAN_T2V,
        Size(480, 480, 33),
        _WAN,
    ),
    "hunyuan_train_i2v": Training(
        "HunyuanVideo I2V v2",
        "*hunyuan_i2v*",
        files.HUNYUAN_I2V,
        Size(480, 480, 33),
        _WAN,
        first_frame=True,
    ),
    "mochi_train": Training(
        "Mochi 1 preview",
        "*mochi_t2v*",
        files.MOCHI,
        Size(480, 480, 37),
        "sides in multiples of 16, 6n+1 frames (25, 37, 61)",
    ),
}
"""{name of the workflow: its graph}"""
