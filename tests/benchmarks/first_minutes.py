"""The first fifteen minutes on a real GPU: what only a real one can tell, most telling first, and what each answer means.

    python tests/benchmarks/first_minutes.py --out OUT                       # both parts, 12.5 minutes: the rest is for starting
    python tests/benchmarks/first_minutes.py --out OUT --part 1              # 7 minutes; then --part 2, 6 minutes
    python tests/benchmarks/first_minutes.py --out OUT --answer              # only reads what is in OUT

It runs `python -m trainers check` and cases of `full_size.py`, each in a process of its own, and writes OUT/check.json,
OUT/part1.json, OUT/part2.json and OUT/answers.md anew after each: a run that is cut off keeps what it has. See README.md in this folder.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
CHECK_SECONDS = 100
PART_SECONDS = (400, 340)
LAST_ROUND_SECONDS = 60
STOPPING_SECONDS = 30
NOT_MEASURED = "not measured"

Found = Mapping[str, Mapping[str, Any]]
"""What `full_size.py` found, by the name of the case."""

IN_12, IN_8 = "wan-14b 512x512x81 in 12 GiB", "wan-14b 256x256x33 in 8 GiB"
CHUNKS = {count: f"wan-14b 512x512x81 in {count} chunks" for count in (1, 2, 4)}
STREAMED, MAPPED = "wan-14b streamed beside resident", "wan-14b mapped beside resident"
BARE, SCRIPT = "wan-14b resident beside the bare loop", "wan-14b beside diffusers' script"
SMALL, ASYNC = "wan-1.3b 480x832x33 in 16 GiB", "wan-1.3b 480x832x33 with cudaMallocAsync"
MIXED = "wan-1.3b eight sizes in turn"
COMPILED, EXACT = "wan-14b compiled, streamed", "wan-14b deterministic, streamed"
OTHERS = (
    "ltx-2b 512x768x89 in 8 GiB",
    "wan-5b 704x1280x49 in 16 GiB",
    "hunyuan-13b 544x544x33 in 16 GiB",
    "mochi-10b 480x848x37 in 24 GiB",
)


@dataclass(frozen=True)
class Question:
    """`answer` reads what the cases found; `then` is what to do with it."""

    text: str
    cases: tuple[str, ...]
    answer: Callable[[Found], str]
    then: str


def _trains(name: str) -> Callable[[Found], str]:
    def answer(found: Found) -> str:
        case = found[name]
        return f"yes, {case['card']['peak_reserved_gib']:.2f} GiB reserved, context {case['card']['context_gib']:.2f}, {_seconds(case)}"

    return answer


def _seconds(case: Mapping[str, Any]) -> str:
    return f"{case['step_seconds']:.2f} s a step"


def _ratio(name: str) -> Callable[[Found], str]:
    def answer(found: Found) -> str:
        case, idle = found[name], found[name].get("profile", {}).get("idle_share")
        return f"ratio {case['ratio_median']:.3f} ({_seconds(case)}" + (f", GPU idle {idle:.1%})" if idle is not None else ")")

    return answer


def _chunks(found: Found) -> str:
    parts = [f"{count}: {found[name]['card']['peak_reserved_gib']:.2f} GiB, {_seconds(found[name])}" for count, name in CHUNKS.items()]
    return "; ".join(parts)


def _plans(found: Found) -> str:
    """Reserved bytes, which is what the limit counts; the plan names allocated ones and a reserve."""
    rows = []
    for name, case in _as_planned(found).items():
        measured, planned = case["card"]["peak_allocated_gib"], case["predicted"]["allocated_gib"]
        rows.append(f"{name}: {planned / max(measured, 1e-9):.2f}")
    return "; ".join(rows) or NOT_MEASURED


def _as_planned(found: Found) -> Found:
    """The cases that ran alone and as their plan says: others have a price of something else, or a second model beside it."""
    return {
        name: case
        for name, case in found.items()
        if "predicted" in case and "ratio_median" not in case and case["arrangement"] == case["predicted"]["arrangement"]
    }


def _step_seconds(found: Found) -> str:
    rows = [
        f"{name}: {case['predicted']['step_seconds'] / case['step_seconds']:.2f}"
        for name, case in _as_planned(found).items()
        if case.get("step_seconds")
    ]
    return "; ".join(rows) or NOT_MEASURED


def _weights_back(found: Found) -> str:
    seen = {name: case["profile"].get("host_bytes_beside_activations") for name, case in found.items() if case.get("profile")}
    known = {name: value for name, value in seen.items() if value is not None}
    return "; ".join(f"{name}: {value:.0f} bytes" for name, value in known.items()) or NOT_MEASURED


def _allocators(found: Found) -> str:
    return "; ".join(
        f"{label}: {found[name]['card']['peak_reserved_gib']:.2f} GiB reserved, {found[name]['card']['peak_allocated_gib']:.2f} allocated, "
        f"{_seconds(found[name])}"
        for label, name in (("expandable segments", SMALL), ("cudaMallocAsync", ASYNC))
    )


def _new_sizes(found: Found) -> str:
    case = found[MIXED]
    more = sum(case["first_step_seconds_each"]) - sum(case["second_step_seconds_each"])
    count = len(case["sizes"])
    return f"{count} first steps took {more:.2f} s more than the second ones ({case['ratio_median']:.2f} times as long, median)"


def _deterministic(found: Found) -> str:
    exact = found[EXACT]
    opened = f"opened in {exact['opened_seconds']:.0f} s beside {found[COMPILED]['opened_seconds']:.0f}; {_seconds(exact)}"
    return opened + (f" beside {found[STREAMED]['step_seconds']:.2f}" if STREAMED in found else "")


def _all_train(found: Found) -> str:
    return "; ".join(f"{name}: {_trains(name)(found)}" for name in OTHERS if name in found)


PARTS: tuple[tuple[Question, ...], ...] = (
    (
        Question(
            "Does Wan 14B, rank 32, 512x512x81 train within 12 GiB?",
            (IN_12,),
            _trains(IN_12),
            "Yes: write it into the README's table as measured. Out of memory: compare plan and peak below, then the run's events.",
        ),
        Question(
            "Do chunks save anything?",
            tuple(CHUNKS.values()),
            _chunks,
            "If 2 and 4 chunks save less than 5 %, remove chunks from the plan's candidates (memory_plan.CHUNKS) and from the README; "
            "if they cost more than 10 % time, keep them last.",
        ),
        Question(
            "Does Wan 14B, rank 32, 256x256x33 train within 8 GiB?",
            (IN_8,),
            _trains(IN_8),
            "As for 12 GiB.",
        ),
        Question(
            "Is a streamed step as fast as a resident one (target 1.05, pinned)?",
            (STREAMED,),
            _ratio(STREAMED),
            "Above 1.05 with the GPU idle: copies are late; look at `check`'s overlap line, then at Stream._send_ahead. Not idle: the GPU "
            "computes more than the plain loop; profile one block.",
        ),
    ),
    (
        Question(
            "Are plan and peak within 10 % (0.95 to 1.10)?",
            (),
            _plans,
            "Outside: add the case to tests/simulated_gpu/test_plan.py; what the simulated GPU does not show is workspace or "
            "fragmentation (WORKSPACE_BYTES, ROUNDING in memory_plan.py).",
        ),
        Question(
            "Are the plan's seconds right (0.7 to 1.4)?",
            (),
            _step_seconds,
            "Off by one factor everywhere: ATTENTION_EFFICIENCY or PRODUCT_EFFICIENCY in memory_plan.py.",
        ),
        Question(
            "Do weights ever go back to the host (must be 0 bytes)?",
            (),
            _weights_back,
            "More than a few MB (losses, norms): find the copy in the profile by its size.",
        ),
        Question(
            "Is the trainer's step as fast as the bare loop (target 1.03)?",
            (BARE,),
            _ratio(BARE),
            "Above 1.03: profile both; the first suspects are the LoRA's casts and the optimizer.",
        ),
        Question(
            "What does mapped mode cost beside pinned?",
            (MAPPED,),
            _ratio(MAPPED),
            "Much above the pinned ratio: the staging thread; `check` says how fast it reads the file.",
        ),
        Question(
            "What does ComfyUI's allocator change (the worker drops cudaMallocAsync)?",
            (SMALL, ASYNC),
            _allocators,
            "If cudaMallocAsync reserves less or is faster, keep it (environment.py); if it reserves more, dropping it was right.",
        ),
        Question(
            "What does the first step of a new clip size cost (cuDNN attention plans for each shape)?",
            (MIXED,),
            _new_sizes,
            "More than a second a size: take cuDNN's attention out of the backends (attention.py), or let the probe run each size once.",
        ),
        Question(
            "What does deterministic = true cost?",
            (COMPILED, EXACT),
            _deterministic,
            "Write both figures into the description of `deterministic`. Minutes to open: PyTorch fills memory we asked it not to fill.",
        ),
        Question(
            "Do the other families train within their GPUs?",
            OTHERS,
            _all_train,
            "Each that does: its row of the README's table becomes measured.",
        ),
        Question(
            "What do compiled blocks gain?",
            (COMPILED,),
            _trains(COMPILED),
            "Less than 10 % faster than the same streamed steps: say so in speed.compile's description.",
        ),
        Question(
            "And beside diffusers' own script?",
            (SCRIPT,),
            _ratio(SCRIPT),
            "A figure for the README.",
        ),
    ),
)


def main(arguments: list[str] | None = None) -> int:
    options = _options(arguments)
    options.out = options.out.absolute()  # what is started runs in the root of the repository
    options.out.mkdir(parents=True, exist_ok=True)
    if not options.answer:
        with tempfile.TemporaryDirectory(prefix="first-minutes-", ignore_cleanup_errors=True) as temporary:
            for part in [options.part] if options.part else [1, 2]:
                _run_part(part, options, options.folder or temporary)
    print(_write_answers(options.out))
    return 0


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--part", type=int, choices=(1, 2))
    parser.add_argument("--answer", action="store_true", help="measure nothing: read what is there")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--folder", help="where models are made, 60 GB; default: a temporary folder")
    parser.add_argument("--tiny", action="store_true", help="tiny models: tries this script")
    return parser.parse_args(arguments)


def _run_part(part: int, options: argparse.Namespace, folder: str) -> None:
    """All rounds within the part's seconds: the last one has what the others left, which is at least `LAST_ROUND_SECONDS`."""
    end, rounds = time.monotonic() + PART_SECONDS[part - 1], _rounds(part)
    if part == 1:
        check = [sys.executable, "-m", "trainers", "check", "--device", options.device, "--runs", str(options.out)]
        _limited(check, CHECK_SECONDS)
    for round_, names in enumerate(rounds):
        seconds = end - time.monotonic() - LAST_ROUND_SECONDS * (len(rounds) - 1 - round_)
        out = options.out / f"part{part}{'' if round_ == 0 else '_async'}.json"
        command = [sys.executable, str(Path(__file__).with_name("full_size.py")), "--device", options.device, "--out", str(out)]
        command += ["--budget-seconds", f"{seconds:.0f}", "--cases", ",".join(names), "--folder", folder]
        command += ["--keep-last", *["--tiny"] * options.tiny]  # the second part begins with the model that the first one ends with
        _limited(command, seconds + STOPPING_SECONDS, {"PYTORCH_CUDA_ALLOC_CONF": "backend:cudaMallocAsync"} if round_ else {})
        _write_answers(options.out)


def _rounds(part: int) -> list[list[str]]:
    """Names of cases as `--cases` takes them (parts of names, without a comma); those under ComfyUI's allocator run apart."""
    names = [name.partition(",")[0] for question in PARTS[part - 1] for name in question.cases]
    return [[name for name in names if name != ASYNC], *([[SMALL]] if ASYNC in names else [])]


def _limited(command: list[str], seconds: float, environment: Mapping[str, str] | None = None) -> None:
    try:
        subprocess.run(command, cwd=ROOT, check=False, timeout=seconds, env=os.environ | dict(environment or {}))
    except subprocess.TimeoutExpired:
        print(f"{command[2]}: stopped after {seconds:.0f} s", flush=True)


def found_in(folder: Path) -> dict[str, Mapping[str, Any]]:
    """The cases that were measured, by name."""
    found = {}
    for file in ("part1.json", "part2.json", "part2_async.json"):
        path = folder / file
        for case in json.loads(path.read_text())["cases"] if path.exists() else []:
            name = ASYNC if file == "part2_async.json" else case["case"]
            if "step_seconds" in case:
                found[name] = case
    return found


def _write_answers(folder: Path) -> str:
    found = found_in(folder)
    lines = ["# The first minutes on a GPU", ""]
    for question in (question for part in PARTS for question in part):
        lines += [f"**{question.text}** {_answer(question, found)}", f"  -> {question.then}", ""]
    text = "\n".join(lines)
    (folder / "answers.md").write_text(text)
    return text


def _answer(question: Question, found: Found) -> str:
    missing = [name for name in question.cases if name not in found]
    enough = not missing or (question.answer is _all_train and len(missing) < len(question.cases))
    return question.answer(found) if enough else f"{NOT_MEASURED} ({', '.join(missing)})"


if __name__ == "__main__":
    sys.exit(main())
