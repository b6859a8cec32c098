"""The workflows that make videos with a LoRA."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import downloads as files
from downloads import Models, links
from graph_builder import Graph, Wire
from graph_layout import NOTE_TOP, Step, frame_row
from sampling_parts import (
    LTX_FPS,
    WAN_NEGATIVE,
    Size,
    Sources,
    apply_lora,
    hunyuan_image,
    hunyuan_images,
    hunyuan_text,
    ksampler,
    load_models,
    ltx,
    ltx_images,
    save,
    switch_step,
    text_to_video,
    two_experts,
    wan22_5b,
    wan_image,
)


@dataclass(frozen=True)
class Sampling:
    """A graph: `condition` draws the steps of the first frame and the prompt, `sample` those up to the images."""

    title: str
    training: str
    models: Models
    condition: Callable[[Step, Step, Sources], Sources]
    sample: Callable[[Step, Sources], Wire]
    fps: float
    first_frame: bool = False
    more: str = ""

    def draw(self, graph: Graph, name: str) -> None:
        graph.note((0, NOTE_TOP), (310, 520), self._note(), "Start here")
        loading, choosing = Step(graph, "Step 1 - Load models", 340, 0), Step(graph, "Step 2 - Your LoRA", 760, 0)
        sources = load_models(loading, self.models)
        sources |= apply_lora(choosing, sources)
        top = frame_row(loading, choosing) + 40
        third, fourth = ("First frame", "Prompt and size") if self.first_frame else ("Video size", "Prompt")
        begin, prompt = Step(graph, f"Step 3 - {third}", 340, top), Step(graph, f"Step 4 - {fourth}", 760, top)
        sources |= self.condition(begin, prompt, sources)
        frame_row(begin, prompt)
        run = Step(graph, "Step 5 - Press Run", 1180, 0, 360)
        images = self.sample(run, sources)
        run.column()
        save(run, images, self.fps, name)
        run.frame()

    def _note(self) -> str:
        note = I2V_NOTE if self.first_frame else T2V_NOTE
        more = f"{self.more.strip()}\n\n" if self.more else ""
        return note.format(title=self.title, training=self.training) + f"\n{more}### Files\n" + links(*self.models.files)


T2V_NOTE = """
## Text to video with your LoRA ({title})

1. Get the files below: put each where the list says, then press **R**. They are those of *{training}*.
2. Choose your LoRA in *Step 2*: a file, or `<run>: newest` for the last one of a run, also while it trains. Press **R** when
   it is not in the list yet.
3. Write a prompt in *Step 4* like your captions, with the trigger words.
4. Press **Run**.

With `none` the same prompt shows the model without the LoRA.
"""

I2V_NOTE = """
## Image to video with your LoRA ({title})

1. Get the files below: put each where the list says, then press **R**. They are those of *{training}*.
2. Choose your LoRA in *Step 2*: a file, or `<run>: newest` for the last one of a run, also while it trains. Press **R** when
   it is not in the list yet.
3. Choose the image that the video starts with in *Step 3*.
4. Write in *Step 4* what happens, like your captions, with the trigger words.
5. Press **Run**.

With `none` the same prompt shows the model without the LoRA.
"""

SWITCH_NOTE = """
**Two models** share the steps. The first one belongs to noise levels from {boundary} on: with {steps} steps and shift {shift:g} these
are the steps 0 to {last}. So its `end_at_step` is {switch}, and the other one's `start_at_step`. Another number of steps, or another
shift, moves both.
*Apply LoRA* gives each model the file that was trained for it.
"""

LTX_MORE = "The noise shift depends on the size: *LTXVScheduler* reads it from the latents. Sides in multiples of 32, 8n+1 frames."
MOCHI_MORE = "Sides in multiples of 16, 6n+1 frames."
HUNYUAN_I2V_MORE = "`image_interleave` 4 and `v2 (replace)` are what this model was made with, and what Video Trainer trains with."

_STEPS, _SHIFT = 20, 8.0
"""Of the templates of Wan 2.2 A14B."""


def _a14b(title: str, training: str, models: Models, condition: Callable[..., Sources], boundary: float, first_frame: bool) -> Sampling:
    switch = switch_step(boundary, _STEPS, _SHIFT)
    more = SWITCH_NOTE.format(boundary=boundary, steps=_STEPS, shift=_SHIFT, last=switch - 1, switch=switch)
    sample = partial(two_experts, steps=_STEPS, shift=_SHIFT, switch=switch)
    return Sampling(title, training, models, condition, sample, 16.0, first_frame, more)


_wan_sampler = partial(ksampler, sampler_name="uni_pc", shift=8.0)
_wan_text = partial(text_to_video, latent="EmptyHunyuanLatentVideo", negative=WAN_NEGATIVE)

SAMPLING = {
    "wan21_t2v": Sampling(
        "Wan 2.1 1.3B",
        "wan21_train",
        files.WAN21_T2V,
        partial(_wan_text, size=Size(480, 480, 33)),
        partial(_wan_sampler, steps=30, cfg=6.0),
        fps=16.0,
    ),
    "wan21_i2v": Sampling(
        "Wan 2.1 I2V 14B",
        "wan21_train_i2v",
        files.WAN21_I2V,
        partial(wan_image, size=Size(512, 512, 33)),
        partial(_wan_sampler, steps=20, cfg=6.0),
        fps=16.0,
        first_frame=True,
    ),
    **{
        f"wan22_5b_{task}": Sampling(
            "Wan 2.2 5B",
            "wan22_5b_train",
            files.WAN22_5B,
            partial(wan22_5b, size=Size(1280, 704, 121), first_frame=task == "i2v"),
            partial(_wan_sampler, steps=20, cfg=5.0),
            fps=24.0,
            first_frame=task == "i2v",
        )
        for task in ("t2v", "i2v")
    },
    "wan22_a14b_t2v": _a14b(
        "Wan 2.2 T2V A14B", "wan22_a14b_train", files.WAN22_T2V, partial(_wan_text, size=Size(640, 640, 81)), 0.875, first_frame=False
    ),
    "wan22_a14b_i2v": _a14b(
        "Wan 2.2 I2V A14B", "wan22_a14b_train_i2v", files.WAN22_I2V, partial(wan_image, size=Size(640, 640, 81)), 0.9, first_frame=True
    ),
    **{
        f"ltx_{task}": Sampling(
            "LTX-Video 2B 0.9.5",
            "ltx_train",
            files.LTX,
            partial(ltx, size=Size(768, 512, 97), first_frame=task == "i2v"),
            ltx_images,
            LTX_FPS,
            first_frame=task == "i2v",
            more=LTX_MORE,
        )
        for task in ("t2v", "i2v")
    },
    "hunyuan_t2v": Sampling(
        "HunyuanVideo",
        "hunyuan_train",
        files.HUNYUAN_T2V,
        partial(hunyuan_text, size=Size(848, 480, 73)),
        hunyuan_images,
        fps=24.0,
    ),
    "hunyuan_i2v": Sampling(
        "HunyuanVideo I2V v2",
        "hunyuan_train_i2v",
        files.HUNYUAN_I2V,
        partial(hunyuan_image, size=Size(848, 480, 73)),
        hunyuan_images,
        fps=24.0,
        first_frame=True,
        more=HUNYUAN_I2V_MORE,
    ),
    "mochi_t2v": Sampling(
        "Mochi 1 preview",
        "mochi_train",
        files.MOCHI,
        partial(text_to_video, latent="EmptyMochiLatentVideo", negative="", size=Size(848, 480, 37)),
        partial(ksampler, steps=30, cfg=4.5, sampler_name="euler"),
        fps=24.0,
        more=MOCHI_MORE,
    ),
}
"""{name of the workflow: its graph}"""
