"""Full-size models on a card: seconds of a step, memory, copies, idle share, under a hard cap, beside other loops and trainers.

    python tests/benchmarks/full_size.py --out RESULT.json [--budget-seconds 540] [--cases wan-14b,ltx] [--peer musubi=FOLDER]
    python tests/benchmarks/full_size.py --device cpu --tiny        # the same code in a minute, here

Models have random weights and are made on the machine, as native files (`full_size_files.py`); the cases are data (`cases.py`).
Each case runs in a process of its own with a time limit; RESULT.json is written anew after each. One that fails is reported, the
next one runs. What no time was left for is named, to be asked for with `--cases` in another call. See README.md in this folder.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "trainers"), str(Path(__file__).parent)]

from cases import CASES, Case, case_of


def main(arguments: list[str] | None = None) -> int:
    options = _options(arguments)
    if options.one:
        return _child(options)
    cases = _asked(options)
    result: dict[str, Any] = {"command": " ".join(["full_size.py", *_shown(arguments)]), "cases": []}
    folder = Path(options.folder or tempfile.mkdtemp(prefix="full-size-"))
    folder.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    try:
        for index, case in enumerate(cases):
            left = options.budget_seconds - (time.monotonic() - started)
            result["cases"].append(_run(case, options, folder, left))
            result.setdefault("hardware", result["cases"][-1].get("hardware"))
            _write(options.out, result)
            if not options.keep_last or cases[index + 1 :]:
                _delete_unneeded(folder, case, cases[index + 1 :])
    finally:
        if not options.folder:
            shutil.rmtree(folder, ignore_errors=True)
    print("\n".join(_line(found) for found in result["cases"]))
    return int(any("error" in found for found in result["cases"]))


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--out", type=Path, default=Path("full_size.json"))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--tiny", action="store_true", help="models of a few narrow blocks and the smallest clips: tries the script")
    parser.add_argument("--cases", default="", help="parts of names of cases, with commas; default: all")
    parser.add_argument("--budget-seconds", type=float, default=540.0, help="no case begins after that, and none runs on")
    parser.add_argument("--folder", help="where models are made, 60 GB; default: a temporary folder")
    parser.add_argument("--keep-last", action="store_true", help="the last case's model stays in --folder, for another call")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=FOLDER", help="a checkout of another trainer: musubi=...")
    parser.add_argument("--list", action="store_true", help="names of the cases")
    parser.add_argument("--in-process", action="store_true", help="cases in this process, one after the other: for tests")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.list:
        print("\n".join(case.name for case in CASES))
        sys.exit(0)
    return options


def _shown(arguments: list[str] | None) -> list[str]:
    """The arguments as they may stand in a result file: without folders of the machine."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    return ["..." if value.startswith("/") else value.split("=")[0] if "=/" in value else value for value in given]


def _asked(options: argparse.Namespace) -> list[Case]:
    parts = [part for part in options.cases.split(",") if part]
    peers = {peer.partition("=")[0] for peer in options.peer}
    cases = [case for part in parts or [""] for case in CASES if part in case.name]
    cases = list({case.name: case for case in cases}.values())  # in the order of the names
    return [case for case in cases if case.kind != "peer" or case.name.split()[0] in peers]


def _run(case: Case, options: argparse.Namespace, folder: Path, left_seconds: float) -> dict[str, Any]:
    """What a case's own process found, or why it found nothing."""
    found: dict[str, Any] = {"case": case.name}
    if left_seconds < 30:
        return found | {"left_out": "no time was left"}
    print(f"--- {case.name}", flush=True)
    answer, log = folder / "answer.json", folder / "log.txt"
    answer.unlink(missing_ok=True)
    command = [sys.executable, __file__, "--one", case.name, "--out", str(answer), "--device", options.device, "--folder", str(folder)]
    command += [part for peer in options.peer for part in ("--peer", peer)] + ["--tiny"] * options.tiny
    limit = min(case.limit_seconds, left_seconds)
    started = time.monotonic()
    error = _in_process(command[2:]) if options.in_process else _watched(command, log, limit)
    found["wall_seconds"] = round(time.monotonic() - started, 1)
    if answer.exists():
        found |= json.loads(answer.read_text())
    if error and "error" not in found:
        found["error"] = error
        found["log"] = log.read_text(errors="replace")[-1500:].replace(str(folder), "FOLDER").replace(str(ROOT), "ROOT")
    for name in ("runs", "loras", "clips"):
        shutil.rmtree(folder / name, ignore_errors=True)
    print(_line(found), flush=True)
    return found


def _in_process(arguments: list[str]) -> str:
    return "failed" if main(arguments) else ""


def _watched(command: list[str], log: Path, limit_seconds: float) -> str:
    """Runs a command and all that it starts, at most so long; what went wrong, if anything did."""
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True, env=environment)
        try:
            code = process.wait(limit_seconds)
            return f"ended with {code}" if code else ""
        except subprocess.TimeoutExpired:
            return f"took longer than {limit_seconds:.0f} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _delete_unneeded(folder: Path, done: Case, rest: list[Case]) -> None:
    """Model files are up to 29 GB: only what the rest needs stays."""
    if any((case.model, case.dtype) == (done.model, done.dtype) for case in rest):
        return
    for file in (path for kind in ("tiny", "full") for path in (folder / f"{kind}_{done.dtype}").glob("*")):
        file.unlink()


def _write(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".partial")
    beside.write_text(json.dumps(result, indent=1) + "\n")
    beside.replace(path)


def _line(found: dict[str, Any]) -> str:
    """A case in one line."""
    if "error" in found or "left_out" in found:
        return f"{found['case']:<42} {found.get('error') or found.get('left_out')}"
    parts = [f"{found['case']:<42}", f"{found.get('step_seconds', float('nan')):.3f} s"]
    if "ratio_median" in found:
        parts.append(f"ratio {found['ratio_median']:.3f}")
    for name in ("peak_reserved_gib", "peak_allocated_gib", "context_gib"):
        if name in found.get("card", {}):
            parts.append(f"{name.removesuffix('_gib')} {found['card'][name]:.2f} GiB")
    if idle := found.get("profile", {}).get("idle_share"):
        parts.append(f"idle {idle:.1%}")
    return "  ".join([*parts, {True: "met", False: "NOT MET"}.get(found.get("met"), "")])


def _child(options: argparse.Namespace) -> int:
    """Measures one case and writes what it found, an error too."""
    case, found = case_of(options.one), {}
    try:
        from trainers import environment

        environment.go_offline()
        environment.use_memory_without_gaps()
        if case.job.get("deterministic"):
            environment.allow_determinism()
        import torch
        from gauges import hardware, versions
        from measure import measure

        from trainers.device import find_device

        torch.manual_seed(0)
        device = find_device(options.device)
        found = {"hardware": hardware(device), "versions": versions()}
        found |= measure(case, device, Path(options.folder), options)
        code = 0
    except Exception as error:
        traceback.print_exc()
        found["error"] = f"{type(error).__name__}: {error}"[:1500].replace(str(options.folder), "FOLDER")
        found["trace"] = traceback.format_exc()[-2500:].replace(str(options.folder), "FOLDER").replace(str(ROOT), "ROOT")
        code = 1
    _write(options.out, found)
    return code


if __name__ == "__main__":
    sys.exit(main())
