"""What the trainer costs beside a bare loop: one optimizer step of each in turn, on the same model, shape and adapter.

    python tests/benchmarks/step_overhead.py [--rounds 5] [--steps 4] [--layers 4] [--width 512]

Prints the seconds of a step of both (medians of the rounds) and their ratio; the target is <= 1.03 for steps of at least
200 ms. The bare loop is what one would write by hand around diffusers' class: no draws from a seed, no files, no metrics.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "trainers")]

from tiny import TinyShape, random_transformer, tiny_job

from trainers.run import Run
from trainers.trainer import optimize, report
from trainers.training import open_training


def bare_loop(job, model, device, dtype):
    """A generator whose every `next` is one optimizer step."""
    from peft import LoraConfig, inject_adapter_in_model

    transformer = random_transformer(model).to(device, dtype)
    targets = r"blocks\.\d+\.(attn[12]\.(to_[qkv]|to_out\.0)|ffn\.net\.(0\.proj|2))"
    inject_adapter_in_model(LoraConfig(r=job.lora.rank, lora_alpha=job.lora.rank, target_modules=targets), transformer)
    parameters = [p for name, p in transformer.named_parameters() if "lora_" in name]
    for p in parameters:
        p.data = p.data.float()
    transformer.enable_gradient_checkpointing()
    transformer.train()
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    clean = torch.randn(job.batch_size, *model.latent, device=device)
    text = torch.randn(job.batch_size, 512, model.text_dim, device=device, dtype=dtype)
    while True:
        noise, sigma = torch.randn_like(clean), torch.rand(job.batch_size, device=device)
        noisy = (1 - sigma.view(-1, 1, 1, 1, 1)) * clean + sigma.view(-1, 1, 1, 1, 1) * noise
        out = transformer(hidden_states=noisy.to(dtype), timestep=1000 * sigma, encoder_hidden_states=text, return_dict=False)[0]
        (out.float() - (noise - clean)).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        yield


def seconds(step, count: int, device: torch.device) -> float:
    """Seconds of a step: by the clock on a card, of the processor on a CPU (what else runs there does not count)."""
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    started = clock()
    for _ in range(count):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (clock() - started) / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=512, help="a multiple of 128")
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    shape = TinyShape(layers=options.layers, width=options.width, ffn=4 * options.width, height=128, width_pixels=128, num_frames=17)
    with tempfile.TemporaryDirectory() as folder:
        job = tiny_job(
            Path(folder), shape, steps=10_000, batch_size=1, device=options.device, tensorboard=True, gradient_checkpointing=True
        )
        training = open_training(Run.create(job))

        def trained() -> None:
            training.step += 1
            report(training, optimize(training))

        bare = bare_loop(job, shape, training.device, training.dtype)
        rounds = []
        for i in range(options.rounds + 1):
            order = (trained, lambda: next(bare)) if i % 2 else (lambda: next(bare), trained)
            measured = {step: seconds(step, options.steps, training.device) for step in order}
            rounds.append((measured.pop(trained), next(iter(measured.values()))))
    rounds = rounds[1:]
    ratios = [trainer / bare for trainer, bare in rounds]
    result = {
        "trainer_step_seconds": statistics.median(r[0] for r in rounds),
        "bare_step_seconds": statistics.median(r[1] for r in rounds),
        "ratio_median": statistics.median(ratios),
        "ratio_each": ratios,
        "device": torch.cuda.get_device_name() if training.device.type == "cuda" else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    assert result["bare_step_seconds"] >= 0.2, "take a larger model: --layers, --width"
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
