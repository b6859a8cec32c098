"""Prints what plans say beside what training took, as a table of Markdown; see `plans.py`. Arguments: words that a row's name must have."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from simulated_gpu.plans import cells, compared
from simulated_gpu.wide_models import job_of
from trainers import rates
from trainers.offload import blocks


def main(words: list[str]) -> None:
    blocks._WORTH_COPYING_BYTES = 0
    for name in ("flops_rate", "memory_rate", "copy_rate"):
        setattr(rates, name, lambda *_: 1e11)
    print("| model | stored | what | arrangement | planned MiB | peak MiB | planned / peak |\n|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for number, cell in enumerate(cells()):
            if all(word in str(cell) for word in words):
                for one in compared(job_of(cell, Path(folder), Path(folder) / str(number)), cell.arrangements):
                    print(f"| {cell.variant} | {cell.stored} | {cell.what} | {one} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
