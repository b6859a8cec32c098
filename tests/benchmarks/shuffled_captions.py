"""The demo with its captions shuffled among the clips: what a LoRA learns then is not what the captions say.

    python tests/benchmarks/shuffled_captions.py build/shuffled

Prints the scores after training. The demo's own score means something only if this one is low (<= 0.4).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from trainers.demo import demo
from trainers.demo.score import score_folder, summarise


def shuffle_captions(folder: Path, seed: int = 0) -> None:
    """Gives every clip below `folder` the caption of another one."""
    files = sorted(folder.rglob("*.txt"))
    captions = [file.read_text("utf-8") for file in files]
    random.Random(seed).shuffle(captions)
    for file, caption in zip(files, captions, strict=True):
        file.write_text(caption, "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="DIR", help="where clips, run and videos go")
    out = parser.parse_args().out.resolve()
    if not (out / "clips").exists():
        demo.write_clips(out / "clips")
        shuffle_captions(out / "clips")
    demo.encode(out)
    run = demo.train(demo.demo_job(out))
    demo.sample(out, "after", demo.newest_lora(run))
    print(json.dumps(dataclasses.asdict(summarise(score_folder(out / "after")))))


if __name__ == "__main__":
    main()
