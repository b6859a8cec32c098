"""The job: the one validated description of a training run, shared by the CLI, the nodes and the worker.

Every field has a range and its unit; an unknown field is an error. A job is read from JSON (canonical) or TOML, and is
immutable: two jobs are the same run exactly when their canonical JSON is the same.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from .errors import JobError, Problem

SCHEMA_VERSION = 1
DEVICE_PATTERN = r"^(auto|cpu|cuda(:\d+)?|mps)$"

_WINDOWS_DEVICES = frozenset({"CON", "PRN", "AUX", "NUL", *(f"{port}{number}" for port in ("COM", "LPT") for number in range(1, 10))})

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
PositiveInt = Annotated[int, Field(ge=1)]
Steps = Annotated[int, Field(ge=0)]


class _Spec(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, defer_build=True)


class BaseSpec(_Spec):
    """The frozen model that the LoRA is trained on. Paths may point at single files or diffusers folders."""

    transformer: str
    """File, shard index or folder of the transformer (or a whole diffusers folder); of two experts the high-noise one."""
    transformer_low_noise: str | None = None
    """The low-noise expert, of models that have two (Wan 2.2 A14B)."""
    vae: str | None = None
    """File or folder of the VAE; needed for previews."""
    variant: str | None = None
    """Variant id, when the file's name does not tell; None: what `inspect` says."""


class LoraSpec(_Spec):
    """The shape of the adapter."""

    rank: Annotated[int, Field(ge=1, le=1024)] = 32
    """Rank of every adapter."""
    alpha: Annotated[float, Field(gt=0)] | None = None
    """Scale is alpha / rank; None: alpha = rank, scale 1."""
    targets: Literal["attention", "attention+feed_forward"] = "attention+feed_forward"
    """Which Linears of the blocks are adapted."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Dropout on the adapter's input."""
    dora: bool = False
    """Also train the length of each row of the weights (DoRA); slower, and not over fp8."""


class OptimizerSpec(_Spec):
    """How the adapter's weights move."""

    kind: Literal["adamw", "adamw8bit", "adamw_kahan", "prodigy"] = "adamw"
    """adamw8bit needs bitsandbytes, adamw_kahan (for weights in bf16) torch-optimi, prodigy needs prodigyopt."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    """Peak learning rate (Prodigy: use 1.0)."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.99)
    """Adam's averages."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Decoupled weight decay."""
    epsilon: Annotated[float, Field(gt=0)] = 1e-8
    """Adam's epsilon."""
    max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Gradients are clipped to this norm; None: not clipped."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """After the warm-up: constant, or down to zero at the last step."""
    warmup_steps: Steps = 0
    """Steps of linear warm-up."""


class NoiseSpec(_Spec):
    """Which noise levels are trained. sigma in [0, 1], 1 is pure noise."""

    distribution: Literal["logit_normal", "uniform", "shift"] = "logit_normal"
    """logit_normal: sigmoid(mean + std * normal); shift: uniform u moved to shift*u / (1 + (shift-1)*u)."""
    mean: float = 0.0
    """Mean of the logit-normal."""
    std: Annotated[float, Field(gt=0)] = 1.0
    """Standard deviation of the logit-normal."""
    shift: Annotated[float, Field(gt=0)] = 3.0
    """Shift of "shift"."""


class ExpertsSpec(_Spec):
    """Models of two experts (Wan 2.2 A14B); others have no use for it."""

    train: Literal["both", "high", "low"] = "both"
    """Which of them is trained. With one file, `base.transformer` is that one."""
    turn_steps: PositiveInt = 20
    """With both: steps before the other one has its turn. Changing over loads its weights, some seconds on a card."""
    overlap: Annotated[float, Field(ge=0.0, le=0.2)] = 0.03
    """How far each is trained beyond the boundary, since samplers do not switch exactly there."""
    learning_rate_low: Annotated[float, Field(gt=0)] | None = None
    """Peak learning rate of the low-noise expert; None: `optimizer.learning_rate`."""


class MemorySpec(_Spec):
    """How a model that is larger than the card is trained. What is left out or "auto", the plan chooses.

    All but `quantise` says only where things wait, and `chunks` (its sums differ by rounding) in what order they come; a run goes
    on with other such settings.
    """

    vram_gib: Annotated[float, Field(gt=0)] | None = None
    """What training may take of the card, in GiB; None: what is free when it starts."""
    ram_gib: Annotated[float, Field(gt=0)] | None = None
    """What it may take of the machine's memory, in GiB (mapped files do not count); None: what is free when it starts."""
    quantise: Literal["none", "fp8", "nf4"] = "none"
    """How 16-bit weights of the blocks are kept: as they are, as fp8 with scales, or as nf4 (needs bitsandbytes)."""
    stream: Literal["auto", "never", "always"] = "auto"
    """Whether blocks come from the machine's memory when they are used: as many as the card cannot hold, none, or all."""
    host: Literal["auto", "mapped", "pinned"] = "auto"
    """Where streamed weights wait: in the mapped file, or copied into pinned memory (faster, takes their bytes)."""
    activations: Literal["auto", "device", "host"] = "auto"
    """Where the input of each block waits for the backward pass."""
    chunks: Annotated[int, Field(ge=1, le=64)] | None = None
    """Parts in which all of a block but attention is computed on a long sequence, to save memory; None: the plan chooses."""


class SpeedSpec(_Spec):
    """How fast it is computed."""

    attention: Literal["auto", "native", "flash", "flash_3", "xformers"] = "auto"
    """Which library computes attention: auto and native are PyTorch's own; flash needs flash-attn, xformers needs xformers."""
    compile: bool = False
    """Compile the blocks (torch.compile): the first steps take minutes longer, every later one is faster."""


class HeldOutSpec(_Spec):
    """Loss on the held-out clips at fixed noise and fixed noise levels."""

    every_steps: Steps = 100
    """Steps between two measurements; 0: never."""
    sigmas: Annotated[tuple[Fraction, ...], Field(min_length=1)] = (0.1, 0.3, 0.5, 0.7, 0.9)
    """The noise levels that are measured."""
    max_clips: PositiveInt = 16
    """At most this many held-out clips, so that a measurement stays short."""


class PreviewSpec(_Spec):
    """Videos sampled while training."""

    every_steps: Steps = 0
    """Steps between two previews; 0: never."""
    prompts: tuple[str, ...] = ()
    """One video each. They must be encoded together with the data set (`encode --prompt`)."""
    negative: str | None = None
    """What guidance steers away from, encoded like the prompts; None: the family's own."""
    width: PositiveInt = 832
    """Pixels."""
    height: PositiveInt = 480
    """Pixels."""
    num_frames: PositiveInt = 33
    """Frames of each video."""
    sampling_steps: PositiveInt | None = None
    """Solver steps; None: the family's."""
    cfg: Annotated[float, Field(ge=1.0)] | None = None
    """Guidance scale; None: the family's."""
    shift: Annotated[float, Field(gt=0)] | None = None
    """Shift of the sampling sigmas; None: the family's."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Noise of the first prompt; each further prompt uses the next seed."""
    before_training: bool = True
    """Also sample once before the first step."""
    clip_folder: str | None = None
    """Folder of a CLIP or SigLIP model (transformers' layout) that measures how well each video fits its prompt; None: not measured."""
    images: tuple[str, ...] = ()
    """What the videos start from, for models that can: a picture file for each prompt ("": none), or a single one for all.
    They must be encoded together with the data set (`encode --image`)."""

    def image_of(self, index: int) -> str:
        """The path of what preview `index` starts from; "" for none."""
        return self.images[index if len(self.images) > 1 else 0] if self.images else ""


class FirstFrame(_Spec):
    """Clips that keep their first frame: the model is given it and learns what follows."""

    kind: Literal["first_frame"] = "first_frame"
    """The kind of condition."""
    probability: Fraction
    """How often a clip keeps it."""


class CheckpointSpec(_Spec):
    """What is kept on the way."""

    every_steps: PositiveInt = 250
    """Steps between two checkpoints (each writes a LoRA file too); the last step always writes one."""
    keep_last: PositiveInt = 3
    """How many checkpoints stay for resuming; LoRA files are never deleted."""


class ContinueSpec(_Spec):
    """Where a run starts when it does not start from nothing."""

    extends: str | None = None
    """"RUN@STEP" (RUN a name in runs_folder or a path): go on exactly from there, with the optimizer."""
    initial_lora: str | None = None
    """A LoRA file in any format to start from; its rank must be `lora.rank`."""

    @model_validator(mode="after")
    def _only_one(self) -> ContinueSpec:
        if self.extends and self.initial_lora:
            raise ValueError("extends and initial_lora are both given; a run starts from one of them")
        return self


class Job(_Spec):
    """One training run."""

    schema_version: Literal[1] = 1
    """Version of this description."""
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]
    """Name of the run and of its LoRA files."""
    base: BaseSpec
    encoded: str
    """Folder that `encode` wrote."""
    encoded_identity: str | None = None
    """Identity of the encoded data, filled in when the job is handed over: a run never goes on over other data."""
    runs_folder: str = "output/runs"
    """Where the run's folder is made."""
    loras_folder: str = "output/loras"
    """Where `<name>/<name>-000500.safetensors` is written."""
    models_folder: str | None = None
    """With method "full": where `<name>/<name>-000500.safetensors` is written, a whole model; None: `models` beside `loras_folder`."""
    trigger_words: tuple[str, ...] = ()
    """Written into the LoRA's metadata."""

    method: Literal["lora", "full"] = "lora"
    """What is trained: a LoRA, or all weights of a model of up to 3 billion (written as a model file with native names)."""
    steps: PositiveInt | None = None
    """Optimizer steps; give this or `epochs`."""
    epochs: PositiveInt | None = None
    """Passes over the data set, repeats counted; give this or `steps`."""
    batch_size: PositiveInt = 1
    """Clips per forward pass."""
    accumulation: PositiveInt = 1
    """Forward passes per optimizer step."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Every draw is a function of this, the step and the sample."""
    caption_dropout: Fraction = 0.1
    """How often a sample is trained without its caption."""
    conditions: Annotated[tuple[FirstFrame, ...], Field(max_length=1)] | None = None
    """What samples are conditioned on besides text; None: as the model was trained."""
    guidance: Annotated[float, Field(ge=0.0, le=100.0)] | None = None
    """What a guidance-distilled model is told while training; None: the family's own."""
    gradient_checkpointing: bool = True
    """Recompute each block in the backward pass: a third more time for a fraction of the memory."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """auto: bf16 on GPUs that have it (RTX 30 and newer); on older ones fp16 for Wan and fp32 for other models; fp32 on the CPU."""
    device: Annotated[str, Field(pattern=DEVICE_PATTERN)] = "auto"
    """auto: the first CUDA GPU; without one the CPU, for models of up to 2 billion parameters."""
    deterministic: bool = False
    """Bit-for-bit repeatable on CUDA too, where PyTorch can; slower."""
    tensorboard: bool = True
    """Also write TensorBoard scalars into the run's folder, if tensorboard is installed."""

    lora: LoraSpec = Field(default_factory=LoraSpec)
    optimizer: OptimizerSpec = Field(default_factory=OptimizerSpec)
    noise: NoiseSpec = Field(default_factory=NoiseSpec)
    experts: ExpertsSpec = Field(default_factory=ExpertsSpec)
    memory: MemorySpec = Field(default_factory=MemorySpec)
    speed: SpeedSpec = Field(default_factory=SpeedSpec)
    held_out: HeldOutSpec = Field(default_factory=HeldOutSpec)
    previews: PreviewSpec = Field(default_factory=PreviewSpec)
    checkpoints: CheckpointSpec = Field(default_factory=CheckpointSpec)
    start: ContinueSpec = Field(default_factory=ContinueSpec)

    @model_validator(mode="after")
    def _steps_or_epochs(self) -> Job:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give either steps or epochs; exactly one of them says how long to train")
        return self

    @field_validator("name")
    @classmethod
    def _name_of_a_file_everywhere(cls, name: str) -> str:
        if name.endswith(".") or name.split(".")[0].upper() in _WINDOWS_DEVICES:
            raise ValueError(f"name is {name!r}; Windows cannot have a folder of that name")
        return name

    @property
    def output_folder(self) -> Path:
        """Where the run's folder of LoRA or model files is made: no list of LoRAs ever shows a whole model."""
        if self.method == "lora":
            return Path(self.loras_folder)
        return Path(self.models_folder) if self.models_folder else Path(self.loras_folder).with_name("models")

    def with_absolute_paths(self, folder: Path) -> Job:
        """The same job with every relative path starting at `folder`."""

        def absolute(path: str | None) -> str | None:
            return None if path is None else str(folder / Path(path).expanduser())

        files = {field: absolute(getattr(self.base, field)) for field in ("transformer", "transformer_low_noise", "vae")}
        base = self.base.model_copy(update=files)
        extends = self.start.extends
        if extends and (folder / extends.rpartition("@")[0] / "job.json").is_file():
            extends = absolute(extends)
        start = self.start.model_copy(update={"initial_lora": absolute(self.start.initial_lora), "extends": extends})
        images = tuple((absolute(path) or "") if path else "" for path in self.previews.images)
        previews = self.previews.model_copy(update={"clip_folder": absolute(self.previews.clip_folder), "images": images})
        paths = {field: absolute(getattr(self, field)) for field in ("encoded", "runs_folder", "loras_folder", "models_folder")}
        return self.model_copy(update={"base": base, "start": start, "previews": previews, **paths})

    def canonical_json(self) -> str:
        """The job as sorted JSON: equal strings are equal jobs."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, indent=2, ensure_ascii=False) + "\n"

    def trains_the_same(self, other: Job) -> bool:
        """Whether a run of the one job is a run of the other, under its own name: where things wait in memory may differ."""
        mine = self.with_memory_of(other).model_copy(update={"name": other.name})
        return mine.canonical_json() == other.canonical_json()

    def with_memory_of(self, other: Job) -> Job:
        """This job with the settings of `other` that say where things wait: all of `memory` but `quantise`."""
        memory = other.memory.model_copy(update={"quantise": self.memory.quantise})
        return self.model_copy(update={"memory": memory})

    def hash(self) -> str:
        """Hash of what is trained: folders, the run's name, where the output goes and where things wait do not count."""
        content = self.model_dump(mode="json", exclude={"name", "runs_folder", "loras_folder", "models_folder", "encoded"})
        content["memory"] = {"quantise": self.memory.quantise}
        for (*tables, field), unset in _later().items():
            table = content[tables[0]] if tables else content
            if table[field] == unset:
                del table[field]
        content["base"] = {field: Path(value).name if value else None for field, value in content["base"].items()}
        if initial := self.start.initial_lora:
            content["start"]["initial_lora"] = Path(initial).name
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


@cache
def _later() -> dict[tuple[str, ...], Any]:
    """Fields that came after the first release, with what they are when they are not used: then a job keeps its hash."""
    return {
        ("conditions",): None,
        ("guidance",): None,
        ("lora", "dora"): False,
        ("experts",): ExpertsSpec().model_dump(mode="json"),
        ("memory",): {"quantise": "none"},
        ("speed",): SpeedSpec().model_dump(mode="json"),
        ("method",): "lora",
        ("base", "transformer_low_noise"): None,
        ("previews", "clip_folder"): None,
        ("previews", "images"): [],
    }


def due(step: int, every_steps: int, last: bool) -> bool:
    """Whether something that happens every `every_steps` (0: never) happens at `step`; the last step counts too."""
    return every_steps > 0 and (last or step % every_steps == 0)


def parse_job(values: dict[str, Any]) -> Job:
    """A job from plain values. Raises JobError with every problem at once."""
    try:
        return Job.model_validate(values)
    except ValidationError as error:
        raise JobError([_problem(details) for details in error.errors()], subject="The job cannot run") from None


def read_job(path: Path) -> Job:
    """A job from a .json or .toml file; relative paths in it start at the file's folder.

    Raises JobError with every problem at once.
    """
    try:
        text = path.read_text("utf-8")
        values = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except (OSError, ValueError) as error:
        raise JobError(
            Problem(f"{path} cannot be read ({error})", "a job is a JSON or TOML file", "Check the path and the syntax.")
        ) from None
    if not isinstance(values, dict):
        raise JobError(Problem(f"{path} holds a {type(values).__name__}", "a job is an object of fields", "See the README for an example."))
    return parse_job(values).with_absolute_paths(path.resolve().parent)


def _problem(details: Any) -> Problem:
    """A pydantic error as value, rule and remedy."""
    field = ".".join(str(part) for part in details["loc"]) or "the job"
    message = details["msg"].removeprefix("Value error, ")
    if details["type"] == "extra_forbidden":
        return Problem(f"{field} is no field of a job", "every field must be known", _did_you_mean(field))
    if details["type"] == "missing":
        return Problem(f"{field} is missing", "a job must have it", "Add it.")
    if details["type"] == "value_error":
        return Problem(message.split("; ")[0], message.split("; ")[-1], "Change it." if details["loc"] else "Change one of them.")
    rule = message[0].lower() + message[1:]
    if details["type"] == "string_pattern_mismatch" and field == "name":
        rule = "a name has up to 100 letters a to z, digits, dots, dashes and underscores, no spaces, and begins with a letter or digit"
        if fitting := re.sub(r"[^A-Za-z0-9._-]+", "-", str(details["input"])).strip("-._")[:100]:
            return Problem(f"name is {details['input']!r}", rule, f"Use {fitting!r}.")
    if details["type"] in ("tuple_type", "list_type"):
        rule = 'it must be a list, as in ["one", "two"]'
    return Problem(f"{field} is {details['input']!r}", rule, "Change it.")


def _did_you_mean(field: str) -> str:
    """The field that was meant, by its own name in another place, or by its spelling."""
    known = list(_field_names(Job))
    last = field.rpartition(".")[2]
    near = [name for name in known if name.rpartition(".")[2] == last] or difflib.get_close_matches(field, known, n=1)
    return f"Did you mean {' or '.join(near)}?" if near else "Check its spelling, and the table it stands in."


def _field_names(spec: type[BaseModel], before: str = "") -> Iterator[str]:
    for name, info in spec.model_fields.items():
        inner = info.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from _field_names(inner, f"{before}{name}.")
        else:
            yield before + name
