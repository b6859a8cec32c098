"""Training: hand a job over to a process of its own, and wait for one if a graph must."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from comfy_api.latest import io

from ..trainers.data.encoded import Encoded
from ..trainers.errors import DatasetError, JobError, Problem, RunError
from ..trainers.job import Job, parse_job
from ..trainers.launch import last_log_lines, launch
from ..trainers.plan import planned
from ..trainers.preflight import check_settings
from ..trainers.run import HowFound, Run, attach_or_create, not_taken
from ..trainers.run_status import RunStatus
from . import host
from .records import BASE, ENCODED, PREVIEWS, RUN, Base, EncodedData, PreviewSettings, RunFolder
from .schema import schema
from .settings import job_values, settings

if TYPE_CHECKING:
    from ..trainers.memory_plan import MemoryPlan

FREE_CARD, FREE_ALL, FREE_NOTHING = "free the card", "free the card and RAM", "keep its models loaded"

_POLL_SECONDS = 0.5
_SHOWN_LOG_LINES = 60


class TrainLoRA(io.ComfyNode):
    """Hands a job to a worker process and returns at once."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        main, advanced = _split_settings()
        return schema(
            "TrainLoRA",
            "Train LoRA",
            "Starts training in the background and returns at once: the queue stays free, and ComfyUI may even be closed. "
            "Pressing Run again attaches to the run, or resumes it if it was paused, stopped or interrupted.",
            inputs=[
                BASE.Input("base", tooltip="The model to train a LoRA for."),
                ENCODED.Input("encoded", lazy=True, tooltip="The encoded data set to train on."),
                *main,
                PREVIEWS.Input("previews", optional=True, lazy=True, tooltip="Videos to sample while training."),
                io.Combo.Input(
                    "comfyui_memory",
                    [FREE_CARD, FREE_ALL, FREE_NOTHING],
                    default=FREE_CARD,
                    optional=True,
                    tooltip="What ComfyUI gives up when the training starts. RAM too: it forgets all loaded models, "
                    "which training of a large model on a small card can need.",
                ),
                *advanced,
            ],
            outputs=[RUN.Output("run", tooltip="The run, for Wait For Run and Apply LoRA.")],
            is_output_node=True,
            not_idempotent=True,
        )

    @classmethod
    def fingerprint_inputs(cls, **values: Any) -> float:
        # The state of the run is no input: only by looking again can a second click attach to it, or resume it.
        return time.time()

    @classmethod
    def check_lazy_status(cls, base: Base, **values: Any) -> list[str]:
        # Encoding may take an hour: what is wrong with the settings is said before it begins.
        job = parse_job(_fields(base, values) | {"encoded": str(host.encoded_folder())})
        check_settings(job, started=(host.runs_folder() / job.name).is_dir())
        return [name for name in ("encoded", "previews") if name in values and values[name] is None]

    @classmethod
    def execute(
        cls,
        base: Base,
        encoded: EncodedData,
        previews: PreviewSettings | None = None,
        comfyui_memory: str = FREE_CARD,
        **values: Any,
    ) -> io.NodeOutput:
        job, plan = planned(_job(base, encoded, previews, values))
        run, how = attach_or_create(job)
        if how in ("created", "resumed"):
            if comfyui_memory != FREE_NOTHING:
                host.free_memory(also_ram=comfyui_memory == FREE_ALL)
            launch(run)
        shown = {"text": [_told(run, how, plan, job)], "video_trainer_run": [run.name]}
        return io.NodeOutput(RunFolder(str(run.folder)), ui=shown)


class WaitForRun(io.ComfyNode):
    """Holds the queue until a run has ended; for graphs that use the finished LoRA."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "WaitForRun",
            "Wait For Run",
            "Holds the queue until the training has ended, then gives its LoRA. Only needed in a graph that goes on with the "
            "finished LoRA. Cancelling ends the waiting; the training goes on.",
            inputs=[RUN.Input("run", tooltip="The run to wait for.")],
            outputs=[
                io.LoraModel.Output("lora", tooltip="The trained LoRA, for ComfyUI's Load LoRA Model."),
                io.LossMap.Output("loss", tooltip="The loss of every step, for ComfyUI's Plot Loss Graph."),
                io.String.Output("file_name", tooltip="Name of the LoRA as the LoRA loaders list it."),
                io.Image.Output("plot", tooltip="The loss curve."),
                RUN.Output("run", tooltip="The same run, for Apply LoRA once it has ended."),
            ],
            is_output_node=True,
            not_idempotent=True,
        )

    @classmethod
    def execute(cls, run: RunFolder) -> io.NodeOutput:
        opened = Run.open(Path(run.folder))
        check_trains_lora(opened)
        status = _wait(opened)
        if status.state != "done":
            raise RunError(_why_not_done(opened, status))
        lora = newest_lora(opened)
        metrics = opened.read_metrics()
        losses = {"loss": [float(line["loss"]) for line in metrics if "loss" in line]}
        told = f"{opened.name}: done, {status.step} steps"
        return io.NodeOutput(
            host.read_tensors(lora),
            losses,
            lora.relative_to(opened.job.loras_folder).as_posix(),
            _plot(metrics, opened.name),
            run,
            ui={"text": [told], "video_trainer_run": [opened.name]},
        )


def newest_lora(run: Run) -> Path:
    """The LoRA file of the run's last step, of two experts the high-noise one. Raises RunError when there is none."""
    check_trains_lora(run)
    folder = Path(run.job.loras_folder) / run.name
    files = list(folder.glob(f"{run.name}-*.safetensors"))
    if not files:
        every = run.job.checkpoints.every_steps
        raise RunError(f"{run.name} has no LoRA in {folder}; one is written every {every} steps. Wait for the first, or choose a file.")
    return max(files, key=lambda file: (int(file.stem.rpartition("-")[2]), "-high-" in file.name))


def check_trains_lora(run: Run) -> None:
    """Raises RunError for a run of the command line that trains all weights: what it writes are models."""
    if run.job.method != "lora":
        where = run.job.output_folder / run.name
        raise RunError(f"{run.name} trains a whole model, no LoRA; it is used with Load Diffusion Model. Its files are in {where}.")


def _split_settings() -> tuple[list[Any], list[Any]]:
    inputs = [setting.input for setting in settings()]
    return [item for item in inputs if not item.optional], [item for item in inputs if item.optional]


def _job(base: Base, encoded: EncodedData, previews: PreviewSettings | None, values: Mapping[str, Any]) -> Job:
    """The job of the node's inputs. Raises JobError with every value that is out of range."""
    if previews and (previews.family, previews.variant) != (base.family, base.variant):
        value = f"the previews are for {previews.variant}, the base is {base.variant}"
        raise JobError(Problem(value, "prompts are encoded for one model", "Connect the same Base Model to both."))
    version = _version(encoded, previews)
    data = {"encoded": encoded.folder, "encoded_identity": version.identity}
    return parse_job(_fields(base, values) | data | ({"previews": dict(previews.spec)} if previews else {}))


def _fields(base: Base, values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a job but those of its data."""
    fields = job_values(values)
    start = fields["start"]
    if start["initial_lora"]:
        start["initial_lora"] = str(host.lora_path(start["initial_lora"]))
    folders = {"runs_folder": str(host.runs_folder()), "loras_folder": str(host.loras_folder())}
    files = {name: getattr(base, name) for name in ("transformer", "transformer_low_noise", "vae", "variant")}
    return {**fields, **folders, "base": files}


def _version(encoded: EncodedData, previews: PreviewSettings | None) -> Encoded:
    """The encoded data with the prompts and images of the previews. Raises DatasetError for files that are gone."""
    try:
        version = Encoded.open(encoded.folder, encoded.identity)
        version = version.with_prompts(previews.texts, previews.images) if previews else version
        problems = version.problems()
    except DatasetError as error:
        problems = list(error.problems)
    if problems:
        host.note_missing()
        value = f"{len(problems)} of the encoded files cannot be used" if len(problems) > 1 else problems[0].value
        raise DatasetError(Problem(value, "all of them are needed", "Press Run again: what is missing is encoded again."))
    version.keep_version()
    return version


def _told(run: Run, how: HowFound, plan: MemoryPlan | None, job: Job) -> str:
    status = run.status()
    steps = f"{status.step} of {status.total_steps or '?'} steps"
    what = {
        "created": f"{run.name}: training starts in the background",
        "resumed": f"{run.name}: training goes on in the background, {steps} done",
        "attached": f"{run.name}: is already training, {steps} done",
        "done": f"{run.name}: was trained already, {steps} done. Change what is trained, or the name, to train another",
    }[how]
    memory = _plan_told(plan) if plan and how in ("created", "resumed") else ""
    if how == "attached" and (other := not_taken(run, job)):
        memory = f"\n{other}"
    return f"{what}.\nLoRA files: {Path(run.job.loras_folder).name}/{run.name}\nProgress: the Video Trainer tab in the sidebar.{memory}"


def _plan_told(plan: MemoryPlan) -> str:
    from ..trainers.memory_report import summary  # there was a plan, so all of it is loaded

    return f"\nThe plan, with nothing else on the card: {summary(plan)}"


def _wait(run: Run) -> RunStatus:
    """The status of the run when nothing more will happen. Ends as a cancelled node does when the user cancels."""
    show = host.progress()
    while True:
        host.stop_if_cancelled()
        status = run.status()
        show(status.step, max(status.total_steps or 1, 1), status.state)
        if status.ended:
            return status
        time.sleep(_POLL_SECONDS)


def _why_not_done(run: Run, status: RunStatus) -> str:
    if status.state == "failed":
        return f"{run.name} failed: {status.message}\nThe end of {run.log_file}:\n{last_log_lines(run, _SHOWN_LOG_LINES)}"
    done = f"{status.step} of {status.total_steps or '?'} steps are done"
    return f"{run.name} is {status.state}; {done}. Resume it in the Video Trainer tab, or press Run on the training graph."


def _plot(metrics: Sequence[dict[str, Any]], name: str) -> torch.Tensor:
    """The loss curve as ComfyUI's IMAGE, (1, H, W, 3) in 0..1."""
    from ..trainers.plot import loss_plot

    return torch.from_numpy(loss_plot(metrics, f"{name}: loss")).float().div(255).unsqueeze(0)


NODES = [TrainLoRA, WaitForRun]
