"""What quantising the frozen weights changes: their error, the model's velocity, and what loading takes of the host.

    python tests/benchmarks/quantised_weights.py [--width 1536] [--ffn 8960] [--layers 1] [--rss-layers 6]

Prints, for fp8 and nf4: the relative error of all block weights (Frobenius norm), the relative change of the velocity (2-norm,
sigma 0.5, float32) of the demo's trained tiny Wan and of a random Wan of this width, and the most private memory while a bf16
file of `--rss-layers` layers is loaded on the CPU, and what the loaded model keeps. Linux with glibc.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import platform
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "trainers")]

from tiny import TinyShape, write_transformer

from trainers.checkpoint import Checkpoint
from trainers.family import Conditions, TextBatch, detect
from trainers.load import load_transformer
from trainers.offload.linear import FrozenLinear

HOW = ("fp8", "nf4")


def load(path: Path, how: str, dtype: torch.dtype = torch.float32):
    checkpoint = Checkpoint.open(path)
    detection = detect(checkpoint)
    return detection, load_transformer(checkpoint, detection, "cpu", dtype, quantise=how)


@torch.no_grad()
def velocity(detection, transformer) -> torch.Tensor:
    chance = torch.Generator().manual_seed(0)
    family, variant = detection.family, detection.variant
    noisy_BCFHW = torch.randn(1, *family.latent(variant).shape(9, 128, 128), generator=chance)
    text = TextBatch(torch.randn(1, 32, family.text_width(detection.config), generator=chance))
    inputs = family.prepare(variant, noisy_BCFHW, torch.tensor([0.5]), Conditions({}, None))
    return family.predict(transformer, inputs, text)


@torch.no_grad()
def changes(path: Path) -> dict[str, dict[str, float]]:
    detection, dense = load(path, "none")
    wanted, found = velocity(detection, dense), {}
    for how in HOW:
        _, module = load(path, how)
        error = total = 0.0
        for name, linear in module.named_modules():
            if isinstance(linear, FrozenLinear):
                weight = dense.get_submodule(name).weight.float()
                error += float((linear.dense_weight(torch.float32) - weight).square().sum())
                total += float(weight.square().sum())
        change = (velocity(detection, module) - wanted).norm() / wanted.norm()
        found[how] = {"weights": round((error / total) ** 0.5, 4), "velocity": round(float(change), 4)}
    return found


def private_mib() -> float:
    """Anonymous memory of this process; mapped files do not count. Linux."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) / 1024


def loading(path: Path, how: str) -> dict[str, float]:
    before, peak, done = private_mib(), 0.0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, private_mib())
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.perf_counter()
    _, module = load(path, how, torch.bfloat16)
    seconds = time.perf_counter() - started
    done.set()
    watcher.join()
    linears = [linear for linear in module.modules() if isinstance(linear, FrozenLinear)]
    stored = sum(tensor.nbytes for linear in linears for tensor in linear.stored_tensors().values()) / 2**20
    dense = sum(linear.in_features * linear.out_features for linear in linears) * 2 / 2**20
    ctypes.CDLL(None).malloc_trim(0)  # what is free of the heap counts no longer
    return {
        "dense_bf16_mib": round(dense),
        "stored_mib": round(stored),
        "kept_mib": round(private_mib() - before),
        "peak_mib": round(peak - before),
        "seconds": round(seconds, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("width", 1536), ("ffn", 8960), ("layers", 1), ("rss-layers", 6)):
        parser.add_argument(f"--{name}", type=int, default=value)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, object] = {"torch": torch.__version__, "machine": platform.machine()}
    found["demo's tiny Wan"] = changes(ROOT / "trainers" / "demo" / "tiny_wan" / "tiny_wan2.1_t2v_fp16.safetensors")
    with tempfile.TemporaryDirectory() as folder:
        shape = TinyShape(layers=chosen.layers, width=chosen.width, ffn=chosen.ffn)
        found[f"random Wan, width {chosen.width}, {chosen.layers} layers"] = changes(
            write_transformer(Path(folder) / "wan.safetensors", shape, torch.bfloat16)
        )
        shape = TinyShape(layers=chosen.rss_layers, width=chosen.width, ffn=chosen.ffn)
        path = write_transformer(Path(folder) / "rss.safetensors", shape, torch.bfloat16)
        found["loading"] = {how: loading(path, how) for how in HOW}
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
