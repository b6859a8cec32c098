"""Whether memory grows over many steps: the real trainer, with its reports and trackers, on a tiny model.

    python tests/benchmarks/memory_growth.py [--steps 4000] [--every 100] [--warm-up 2000] [--bound-mib 4]

Prints the resident memory of the process, and what of it is its own (not mapped from files; Linux only), at every `--every` steps.
Both come and go by some MiB, but what leaks is never given back: exits with 1 when the trend of either after the warm-up, the median
slope between two readings (Theil and Sen's) times the steps after it, is above `--bound-mib`. Near step 1,500 the process takes
4 MiB once.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
from itertools import combinations
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


def readings(steps: int, every: int) -> list[tuple[int, float, float]]:
    """(step, resident MiB, own MiB) at every `every` steps."""
    found, process = [], psutil.Process()
    with tempfile.TemporaryDirectory() as folder:
        job = tiny_job(Path(folder), SHAPE, steps=steps, accumulation=2, lora={"rank": 2}, tensorboard=True)
        training = open_training(Run.create(job))
        while training.step < steps:
            training.step += 1
            report(training, optimize(training))
            if training.step % every == 0:
                gc.collect()
                memory = process.memory_info()
                found.append((training.step, memory.rss / 2**20, (memory.rss - memory.shared) / 2**20))
                print("step {:6d}  resident {:8.2f} MiB  own {:8.2f} MiB".format(*found[-1]), flush=True)
        training.batches.close()
        training.accelerator.end_training()
    return found


def trend(readings: list[tuple[int, float]]) -> float:
    """The median of the slopes between two readings (Sen 1968, https://doi.org/10.1080/01621459.1968.10480934)."""
    return statistics.median((there - here) / (later - step) for (step, here), (later, there) in combinations(readings, 2))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--every", type=int, default=100)
    parser.add_argument("--warm-up", type=int, default=2000)
    parser.add_argument("--bound-mib", type=float, default=4.0)
    options = parser.parse_args()
    if (options.steps - options.warm_up) // options.every < 10:
        parser.error("a trend needs ten readings after the warm-up: take more --steps, or a smaller --every")
    started = time.perf_counter()
    after = [reading for reading in readings(options.steps, options.every) if reading[0] > options.warm_up]
    growth = [trend([(reading[0], reading[of]) for reading in after]) * (options.steps - options.warm_up) for of in (1, 2)]
    found = {"growth_resident_mib": growth[0], "growth_own_mib": growth[1], "bound_mib": options.bound_mib}
    print(json.dumps(found | {"seconds": time.perf_counter() - started, "torch": torch.__version__}))
    return int(max(growth) > options.bound_mib)


if __name__ == "__main__":
    sys.exit(main())
