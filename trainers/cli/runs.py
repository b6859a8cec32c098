"""Verbs about runs: plan, train, status, pause, resume, stop."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING

from .. import steering
from ..errors import JobError, Problem, RunError
from ..launch import last_log_lines, launch
from ..run import Run, attach_or_create, find_run, list_runs, not_taken, run_of
from ..run_status import last_measures
from .follow import follow, measured, one_line
from .verbs import add_verb

if TYPE_CHECKING:
    from ..job import Job
    from ..machine import Machine
    from .verbs import Verbs

RUNS_FOLDER = "output/runs"
_SHOWN_EVENTS = 8
_USUAL_RAM_GIB = 32.0
_MOST_GIB = 1e6


def add_verbs(verbs: Verbs) -> None:
    """Add this module's verbs to the parser."""
    parser = add_verb(verbs, "plan", plan, "check a job and say what it would train, what that takes and how long")
    parser.add_argument("job", type=Path, metavar="JOB")
    other = parser.add_argument_group("another machine than this one")
    other.add_argument("--vram", type=_gib, metavar="GIB", help="memory of its card; the card of that size that most people have")
    other.add_argument("--ram", type=_gib, metavar="GIB", help=f"memory of the machine that is free ({_USUAL_RAM_GIB:g})")
    other.add_argument("--card", metavar="NAME", help="a card by its name, such as T4")
    parser.add_argument("--json", action="store_true", help="as JSON, for other programs")
    parser = add_verb(verbs, "train", train, "train a job in the background and follow it; the same job again attaches or resumes")
    parser.add_argument("job", type=Path, metavar="JOB", help="a .json or .toml file")
    parser.add_argument("--resume", action="store_true", help="only go on with a run that exists")
    parser.add_argument("--detach", action="store_true", help="return at once")
    for name, function, text in (
        ("status", status, "say how a run is going; without RUN list all"),
        ("pause", pause, "pause a run after its current step"),
        ("resume", resume, "go on with a paused, stopped, failed or interrupted run, in the background"),
        ("stop", stop, "stop a run after its current step; `resume` goes on from there"),
    ):
        parser = add_verb(verbs, name, function, text)
        parser.add_argument("run", metavar="RUN", nargs="?" if name == "status" else None, help="a run's name or folder")
        parser.add_argument("--runs", type=Path, default=Path(RUNS_FOLDER), metavar="DIR", help=f"where the runs are ({RUNS_FOLDER})")


def _gib(text: str) -> float:
    """A size that a machine can have. Raises ArgumentTypeError for anything else."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= _MOST_GIB:
        raise argparse.ArgumentTypeError(f"it is {text}; it must be above 0 and at most {_MOST_GIB:,.0f} GiB. Give a number, such as 12.")
    return value


def plan(options: argparse.Namespace) -> None:
    """Print what a job would train; all its problems at once when it cannot."""
    from ..job import read_job
    from ..plan import make_plan

    found = make_plan(read_job(options.job), _other_machine(options))
    print(json.dumps(found.as_values(), indent=2) if options.json else found)


def _other_machine(options: argparse.Namespace) -> Machine | None:
    """The machine that the options describe; None: this one. Raises JobError for a card that is not known, or none."""
    from ..machine import card_of

    if options.vram is None and options.card is None:
        if options.ram is not None:
            remedy = "Add one of them; for less of this machine's memory, set memory.ram_gib in the job."
            raise JobError(Problem(f"--ram is {options.ram:g}", "another machine has a card, which --vram or --card names", remedy))
        return None
    return card_of(options.card, options.vram).machine(options.ram or _USUAL_RAM_GIB, options.vram)


def train(options: argparse.Namespace) -> int:
    """Attach to, resume or start the run of a job, and follow it."""
    from ..job import read_job
    from ..plan import hand_over

    job = hand_over(read_job(options.job))
    if options.resume and run_of(job) is None:
        raise RunError(f"No run in {job.runs_folder} has this job; --resume goes on with one that exists. Leave --resume out to start it.")
    run, how = attach_or_create(job)
    if how == "created" and run.name != job.name:
        print(_why_another_name(run, job))
    if how == "attached" and (told := not_taken(run, job)):
        print(told)
    return _start_and_follow(run, how, options.detach)


def _why_another_name(run: Run, job: Job) -> str:
    """That a run of this name exists with another job, what differs, and how to go on with it."""
    folder = Path(job.runs_folder) / job.name
    if not (folder / "job.json").is_file():
        return f"{job.name} has files of an earlier run; this one is {run.name}."
    earlier = Run.open(folder)
    mine, theirs = job.model_dump(mode="json"), earlier.job.with_memory_of(job).model_dump(mode="json")
    changed = ", ".join("memory.quantise" if field == "memory" else field for field in mine if mine[field] != theirs[field])
    text = f"{job.name} exists with another job (different: {changed}); this is a new run, {run.name}, from the beginning."
    if step := earlier.latest_checkpoint():
        text += f'\nTo go on from there instead: [start] extends = "{job.name}@{step}"'
    return text


def _start_and_follow(run: Run, how: str, detach: bool) -> int:
    if how == "done":
        print(f"{run.name} is done already: {_output(run.job)}")
        return 0
    if how != "attached":
        process_id = launch(run)
        print(f"{run.name}: {how}, worker {process_id}, folder {run.folder}")
    if detach:
        print(_how_to_steer(run))
        return 0
    try:
        code = follow(run)
    except KeyboardInterrupt:
        print(f"\n{run.name} goes on in the background.\n{_how_to_steer(run)}")
        return 130
    if code == 0:
        print(f"{'LoRA' if run.job.method == 'lora' else 'model'} files: {_output(run.job)}")
    return code


def _output(job: Job) -> Path:
    return job.output_folder / job.name


def _how_to_steer(run: Run) -> str:
    return "\n".join(f"  python -m trainers {verb:<6} {_quoted(run.folder)}" for verb in ("status", "pause", "stop"))


def _quoted(path: Path) -> str:
    return f'"{path}"' if " " in str(path) else str(path)


def status(options: argparse.Namespace) -> None:
    """One line per run, or all about one."""
    if options.run is not None:
        print(describe(find_run(options.runs, options.run)))
        return
    found = list_runs(options.runs)
    print("\n".join(one_line(run.status()) for run in found) or f"There are no runs in {options.runs}.")


def describe(run: Run) -> str:
    """A run's state, progress, last events, and the end of its log when it failed."""
    now = run.status()
    lines = [one_line(now), f"folder: {run.folder}"]
    if now.message:
        lines.append(f"message: {now.message}")
    if now.memory:
        lines.append(f"memory: {now.memory}")
    if now.warning:
        lines.append(f"warning: {now.warning}")
    if now.request:
        lines.append(f"asked to {now.request}")
    events = run.read_events()
    if measures := last_measures(events):
        lines.append(f"previews of step {measures['step']}: {measured(measures)}")
    lines += ["last events:", *(_event_line(event) for event in events[-_SHOWN_EVENTS:])]
    if now.state in ("failed", "interrupted") and (log := last_log_lines(run, 15)):
        lines += [f"end of {run.log_file}:", *(f"  {line}" for line in log.splitlines())]
    return "\n".join(lines)


def _event_line(event: dict[str, object]) -> str:
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(float(str(event.get("time", 0)))))
    rest = " ".join(f"{key}={value}" for key, value in event.items() if key not in ("time", "event", "measures"))
    return f"  {when}  {event.get('event')} {rest}".rstrip()


def pause(options: argparse.Namespace) -> None:
    """Ask a live run to pause."""
    print(steering.pause(find_run(options.runs, options.run)))


def stop(options: argparse.Namespace) -> None:
    """Ask a live run to stop."""
    print(steering.stop(find_run(options.runs, options.run)))


def resume(options: argparse.Namespace) -> None:
    """Take back a pause, or start a run again that ended before its last step."""
    run = find_run(options.runs, options.run)
    was_live = run.live
    print(steering.resume(run))
    if not was_live:
        print(_how_to_steer(run))
