"""Whether memory grows over many steps: the real trainer, with its reports and trackers, on a tiny model.

    python tests/benchmarks/memory_growth.py [--steps 2000] [--every 100] [--warm-up 300] [--bound-mib 4]

Prints the resident memory of the process at every `--every` steps. Exits with 1 when it has grown by more than `--bound-mib`
between the end of the warm-up and the end: the middle of the last three readings beside that of the first three after it.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "trainers")]

import psutil
import torch
from tiny import TinyShape, tiny_job

from trainers.run import Run
from trainers.trainer import optimize, report
from trainers.training import open_training

SHAPE = TinyShape(layers=1, ffn=64, height=16, width_pixels=16)


def readings(steps: int, every: int) -> list[tuple[int, float]]:
    """(step, resident MiB) at every `every` steps."""
    found, process = [], psutil.Process()
    with tempfile.TemporaryDirectory() as folder:
        job = tiny_job(Path(folder), SHAPE, steps=steps, accumulation=2, lora={"rank": 2}, tensorboard=True)
        training = open_training(Run.create(job))
        while training.step < steps:
            training.step += 1
            report(training, optimize(training))
            if training.step % every == 0:
                gc.collect()
                found.append((training.step, process.memory_info().rss / 2**20))
                print(f"step {found[-1][0]:6d}  {found[-1][1]:8.2f} MiB", flush=True)
        training.batches.close()
        training.accelerator.end_training()
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--every", type=int, default=100)
    parser.add_argument("--warm-up", type=int, default=300)
    parser.add_argument("--bound-mib", type=float, default=4.0)
    options = parser.parse_args()
    started = time.perf_counter()
    after = [mib for step, mib in readings(options.steps, options.every) if step > options.warm_up]
    assert len(after) >= 6, "take more steps: three readings at each end are compared"
    growth = statistics.median(after[-3:]) - statistics.median(after[:3])
    seconds, grown = time.perf_counter() - started, growth > options.bound_mib
    print(json.dumps({"growth_mib": growth, "bound_mib": options.bound_mib, "seconds": seconds, "torch": torch.__version__}))
    return int(grown)


if __name__ == "__main__":
    sys.exit(main())
