"""Other trainers on the same shapes under the same cap: run as they are, from a checkout, with files in their formats.

musubi-tuner (kohya-ss): `wan_train_network.py` with its own best means for little memory: fp8 with scales made on load, blocks that are
only copied to the card, pinned memory, inputs of blocks on the host. It quantises itself and so gets the bf16 file. Seconds of a
step are the times at which its progress bar moves.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from cases import Case

FEWEST_STEPS = 3

CAPPED = """
import atexit, os, runpy, sys
import torch
cap, script, *rest = sys.argv[1:]
if torch.cuda.is_available() and float(cap):
    torch.cuda.set_per_process_memory_fraction(min(1.0, float(cap) * 2**30 / torch.cuda.get_device_properties(0).total_memory), 0)
def peak():
    if torch.cuda.is_available():
        reserved, allocated = torch.cuda.max_memory_reserved() / 2**30, torch.cuda.max_memory_allocated() / 2**30
        print(f"PEAK reserved {reserved:.3f} allocated {allocated:.3f}", flush=True)
atexit.register(peak)
sys.argv = [script, *rest]
sys.path.insert(0, os.path.dirname(script))
runpy.run_path(script, run_name="__main__")
"""
"""Runs a script that knows nothing of it under a cap (GiB; 0: none), and says at its end what it took of the card."""


def run_peer(case: Case, model: Path, size: tuple[int, int, int], folder: Path, checkouts: Mapping[str, str]) -> dict[str, Any]:
    """The first of the case's settings with which the peer trains; why those before it did not."""
    checkout = Path(checkouts["musubi"]).absolute()
    dataset = write_musubi_clips(folder / "clips", size)
    failed: list[dict[str, Any]] = []
    for settings in case.settings:
        command = musubi_command(checkout, model, dataset, folder / "runs", settings, case.warm_up + case.steps)
        found = _followed([sys.executable, "-c", CAPPED, str(case.cap_gib or 0), *command], musubi_environment(checkout, folder))
        if len(found["moments"]) >= FEWEST_STEPS:
            each = [later - earlier for earlier, later in zip(found["moments"], found["moments"][1:], strict=False)]
            peak = {f"peak_{name}_gib": float(value) for name, value in re.findall(r"(reserved|allocated) ([\d.]+)", found["peak"])}
            median = sorted(each[1:])[len(each[1:]) // 2]
            return {"step_seconds": median, "step_seconds_each": each, "card": peak, "settings": dict(settings), "failed": failed}
        failed.append({"settings": dict(settings), "end": found["end"]})
    raise RuntimeError(f"no settings trained: {failed}")


def musubi_environment(checkout: Path, folder: Path) -> dict[str, str]:
    """Its own modules can be imported; PyAV, imported and not used with cached clips, is empty where it is missing."""
    paths = [str(checkout / "src"), str(checkout / "src" / "musubi_tuner"), os.environ.get("PYTHONPATH", "")]
    if find_spec("av") is None:
        (folder / "stand_ins").mkdir(parents=True, exist_ok=True)
        (folder / "stand_ins" / "av.py").write_text("")
        paths.append(str(folder / "stand_ins"))
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}


def musubi_command(checkout: Path, model: Path, dataset: Path, out: Path, settings: Mapping[str, Any], steps: int) -> list[str]:
    """Its script and arguments. `blocks_to_swap` 0: everything stays on the card."""
    command = [str(checkout / "src" / "musubi_tuner" / "wan_train_network.py"), "--task", settings.get("task", "t2v-14B")]
    command += ["--dit", str(model), "--dataset_config", str(dataset), "--sdpa", "--mixed_precision", "bf16"]
    command += ["--network_module", "networks.lora_wan", "--network_dim", "32", "--network_alpha", "32", "--learning_rate", "1e-4"]
    command += ["--optimizer_type", "AdamW", "--gradient_checkpointing", "--timestep_sampling", "shift", "--discrete_flow_shift", "3.0"]
    command += ["--max_train_steps", str(steps), "--max_data_loader_n_workers", "1", "--persistent_data_loader_workers", "--seed", "0"]
    command += ["--output_dir", str(out), "--output_name", "peer"]
    if settings.get("fp8"):
        command += ["--fp8_base", "--fp8_scaled"]
    if settings.get("offload_inputs"):
        command += ["--gradient_checkpointing_cpu_offload"]
    if settings["blocks_to_swap"]:
        command += ["--blocks_to_swap", str(settings["blocks_to_swap"]), "--use_pinned_memory_for_block_swap"]
        command += ["--block_swap_h2d_only"] * bool(settings.get("h2d_only"))
    return command


def write_musubi_clips(folder: Path, size: tuple[int, int, int], clips: int = 8) -> Path:
    """Random latents and captions as its caching scripts write them (Wan), and the data set's TOML; the TOML."""
    from safetensors.torch import save_file

    frames, height, width = size
    latent = (16, (frames - 1) // 4 + 1, height // 8, width // 8)
    cache, videos = folder / "musubi_cache", folder / "musubi_videos"
    for made in (cache, videos):
        made.mkdir(parents=True, exist_ok=True)
    shape = f"{latent[1]}x{latent[2]}x{latent[3]}"
    about = {"architecture": "wan", "width": str(width), "height": str(height), "format_version": "1.0.1", "frame_count": str(frames)}
    for index in range(clips):
        latents = {f"latents_{shape}_float32": torch.randn(latent)}
        save_file(latents, cache / f"clip{index}_00000-{frames:03d}_{width:04d}x{height:04d}_wan.safetensors", metadata=about)
        text = {"varlen_t5_bfloat16": torch.randn(120, 4096).bfloat16()}
        save_file(text, cache / f"clip{index}_wan_te.safetensors", metadata={"architecture": "wan", "format_version": "1.0.1"})
    config = folder / "musubi.toml"
    lines = ["[general]", f"resolution = [{width}, {height}]", "batch_size = 1", "enable_bucket = false", "[[datasets]]"]
    lines += [f'video_directory = "{videos}"', f'cache_directory = "{cache}"', f"target_frames = [{frames}]", 'frame_extraction = "head"']
    config.write_text("\n".join(lines) + "\n")
    return config


def _followed(command: list[str], environment: Mapping[str, str]) -> dict[str, Any]:
    """Runs a command and watches its progress bar; the moment of each step's end, the last line about memory, the end of its output."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=dict(environment))
    assert process.stdout is not None
    reached, moments, output = 0, [], ""
    while part := os.read(process.stdout.fileno(), 1 << 16):
        output += part.decode(errors="replace")
        print(part.decode(errors="replace"), end="", flush=True)
        steps = re.findall(r"steps:[^\r\n]*?\s(\d+)/\d+ \[", output[-2000:])
        if steps and int(steps[-1]) != reached:
            reached = int(steps[-1])
            moments.append(time.perf_counter())
    process.wait()
    peak = next((line for line in reversed(output.splitlines()) if line.startswith("PEAK")), "")
    return {"moments": moments, "peak": peak, "end": output[-800:]}
