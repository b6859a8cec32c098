"""What offloading and starting cost, as far as no card is needed for it: processor time, bytes, order, memory of the host.

    OMP_NUM_THREADS=1 python tests/benchmarks/offload_cpu.py [--out RESULT.json] [--only overhead,order,memory,growth,start,inspect]

Without a card the same code runs with copies within the machine's memory. Each part runs in a process of its own.

    overhead   a step that streams at least 80 % of the blocks' bytes beside one that streams nothing and beside diffusers + peft;
               what copying took is measured and given apart: on a card it runs beside the computing
    order      a step with copies that come as late as they may (`adversary.py`) has the gradients of a step without streaming
    memory     the process's own memory for the streamed weights of a file of more than 1 GB
    growth     1,000 streamed steps: memory of the process before and after
    start      the training of 10,000 encoded clips beside that of 4, from the job to the first batch
    inspect    a 28 GB file with nothing but a header
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "trainers"), str(ROOT / "tests" / "trainers" / "offload"), str(Path(__file__).parent)]

import torch
from adversary import Adversary
from full_size_files import write_random
from gauges import MIB, hardware, host_memory, versions
from model_files import T2V_14B, entries, shapes_of, write_header_only
from tiny import WAN, TinyShape, tiny_job

from trainers.data.cache import Cache
from trainers.data.encoded import Encoded
from trainers.inspection import inspect_file
from trainers.job import Job, parse_job
from trainers.load import native_state
from trainers.offload import host, layout
from trainers.offload.arrangement import Arrangement
from trainers.offload.copies import HostCopies
from trainers.offload.stream import Stream
from trainers.run import Run
from trainers.trainer import held_out_clips, optimize, report
from trainers.training import Training, open_training

RESIDENT = Arrangement()


def streamed(training: Training, share: float, kind: str) -> Arrangement:
    """At most `share` of the blocks' bytes on the device."""
    blocks = training.learners[0].residency.block_bytes
    return Arrangement(weights_bytes=int(share * sum(blocks)), host=kind)


def step(training: Training) -> None:
    training.step += 1
    report(training, optimize(training))


def opened(folder: Path, shape: TinyShape, **fields: Any) -> Training:
    folder.mkdir(parents=True, exist_ok=True)
    fields = {"steps": 1_000_000, "batch_size": 1, "gradient_checkpointing": True, "memory": {"stream": "always"}, **fields}
    return open_training(Run.create(tiny_job(folder, shape, **fields)))


def overhead(folder: Path, rounds: int = 5) -> dict[str, Any]:
    """Processor seconds of a step: streamed from both kinds of host memory, resident, and unmodified diffusers + peft."""
    from step_overhead import bare_loop

    shape = TinyShape(layers=12, width=384, ffn=1536, height=96, width_pixels=96, num_frames=17)
    training = opened(folder, shape)
    residency = training.learners[0].residency
    bare = bare_loop(training.job, shape, training.device, training.dtype)
    kinds = {"resident": RESIDENT, **{kind: streamed(training, 0.2, kind) for kind in ("mapped", "pinned")}}
    seconds: dict[str, list[float]] = {name: [] for name in (*kinds, "bare")}
    copying: dict[str, list[float]] = {name: [] for name in kinds}
    found: dict[str, Any] = {}
    with copy_seconds() as copied:
        for index in range(rounds + 1):
            for name in sorted(seconds, reverse=bool(index % 2)):
                if name == "bare":
                    seconds[name].append(processor_seconds(lambda: next(bare)))
                    continue
                residency.rearrange(kinds[name])
                step(training)
                before = residency.stream.bytes_to_device if residency.stream else 0
                copied.clear()
                seconds[name].append(processor_seconds(lambda: step(training)))
                copying[name].append(sum(copied))
                if residency.stream:
                    found[name] = bytes_of_a_step(residency, before)
    bare.close()
    for name, values in seconds.items():
        found.setdefault(name, {})["step_seconds"] = statistics.median(values[1:])
    for name in ("mapped", "pinned"):
        found[name] |= ratios(seconds, copying, name)
    found["resident"]["beside_bare"] = statistics.median(
        mine / other for mine, other in zip(seconds["resident"][1:], seconds["bare"][1:], strict=True)
    )
    return found


def ratios(seconds: dict[str, list[float]], copying: dict[str, list[float]], name: str) -> dict[str, float]:
    rounds = range(1, len(seconds[name]))
    without = [(seconds[name][i] - copying[name][i]) / seconds["resident"][i] for i in rounds]
    return {
        "copy_seconds": statistics.median(copying[name][1:]),
        "beside_resident": statistics.median(seconds[name][i] / seconds["resident"][i] for i in rounds),
        "beside_resident_without_copying": statistics.median(without),
        "beside_bare_without_copying": statistics.median((seconds[name][i] - copying[name][i]) / seconds["bare"][i] for i in rounds),
    }


def bytes_of_a_step(residency: Any, before: int) -> dict[str, Any]:
    """What one step copied, beside 2 (n - slots) blocks of the n that are streamed."""
    placement, blocks = residency.placement, residency.block_bytes
    ways = placement.streamed[placement.slots :], placement.streamed[: len(placement.streamed) - placement.slots]
    return {
        "streamed_share": sum(blocks[index] for index in placement.streamed) / sum(blocks),
        "bytes_to_device": residency.stream.bytes_to_device - before,
        "expected_bytes": sum(blocks[index] for way in ways for index in way),
        "blocks": len(blocks),
        "streamed": len(placement.streamed),
        "slots": placement.slots,
        "weights_to_host": 0,
    }


def processor_seconds(run: Callable[[], object]) -> float:
    started = time.process_time()
    run()
    return time.process_time() - started


@contextmanager
def copy_seconds() -> Iterator[list[float]]:
    """Seconds of the processor that copies of weights take, one number for each, while this is open."""
    copied: list[float] = []
    write, copy = layout.BlockLayout.write, HostCopies.copy

    def timed(inner: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            started = time.thread_time()
            try:
                return inner(*arguments)
            finally:
                copied.append(time.thread_time() - started)

        return run

    layout.BlockLayout.write, HostCopies.copy = timed(write), timed(copy)  # type: ignore[method-assign]
    try:
        yield copied
    finally:
        layout.BlockLayout.write, HostCopies.copy = write, copy  # type: ignore[method-assign]


def order(folder: Path) -> dict[str, Any]:
    """Whether trained weights are the same, bit for bit, when copies come as late as they may, after three steps."""
    import trainers.residency

    shape = TinyShape(layers=8, width=128, ffn=256)
    outcomes = {}
    for name in ("resident", "mapped", "pinned"):
        adversary = Adversary()
        trainers.residency.copies_of = (lambda copies: lambda device: copies)(adversary)  # type: ignore[assignment]
        training = opened(folder / name, shape)
        arrangement = RESIDENT if name == "resident" else replace(streamed(training, 0.4, name), activations="host")
        training.learners[0].residency.rearrange(arrangement)
        with every_use_told(adversary):
            for _ in range(3):
                step(training)
        outcomes[name] = [parameter.detach().clone() for parameter in training.learners[0].parameters], len(adversary.copied)
    wanted = outcomes["resident"][0]
    same = {
        name: all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
        for name, (found, _) in outcomes.items()
        if name != "resident"
    }
    return {"same_bit_for_bit": same, "copies": {name: count for name, (_, count) in outcomes.items()}}


@contextmanager
def every_use_told(adversary: Adversary) -> Iterator[None]:
    """The adversary is told of every slot that a block computes with, and refuses a copy over it that comes too early."""
    fetch = Stream.fetch

    def told(stream: Stream, block: int, way: Any) -> None:
        fetch(stream, block, way)
        if stream._in_use is not None:
            adversary.uses(stream._slots[stream._in_use])

    Stream.fetch = told  # type: ignore[method-assign]
    try:
        yield
    finally:
        Stream.fetch = fetch  # type: ignore[method-assign]


def memory(folder: Path) -> dict[str, Any]:
    """The process's own memory with 80 % of the blocks streamed, beside that without streaming; slots stand for the device's."""
    shape = TinyShape(layers=10, width=1536, ffn=8960)
    training = big_training(folder, shape)
    residency, found = training.learners[0].residency, {}
    found["file_bytes"] = Path(training.job.base.transformer).stat().st_size
    own = {}
    for name, arrangement in (("resident", RESIDENT), *((kind, streamed(training, 0.3, kind)) for kind in ("mapped", "pinned"))):
        residency.rearrange(arrangement)
        for _ in range(2):
            step(training)
        gc.collect()
        own[name] = host_memory()["anonymous"]
        if residency.stream:
            placement, blocks = residency.placement, residency.block_bytes
            slots = placement.slots * placement.slot_bytes
            found[name] = {
                "private_bytes": own[name] - own["resident"] - slots,
                "counted_bytes": residency.stream.private_bytes,
                "streamed_bytes": sum(blocks[index] for index in placement.streamed),
                "staging_bytes": host.STAGING_BUFFERS * max(blocks),
                "streamed_share": sum(blocks[index] for index in placement.streamed) / sum(blocks),
            }
    found["resident_anonymous_bytes"] = own["resident"]
    return found


def big_training(folder: Path, shape: TinyShape) -> Training:
    """A training of few tokens over a file of more than 1 GB."""
    small = tiny_job(folder, TinyShape(text_dim=shape.text_dim), steps=1_000_000, memory={"stream": "always"}, gradient_checkpointing=True)
    module = WAN.build(shape.config)
    state = native_state({name: torch.empty_like(tensor, device="meta") for name, tensor in module.state_dict().items()}, WAN.keys)
    path = folder / "wan2.1_t2v_large.safetensors"
    write_random(path, {name: (torch.float32, tuple(tensor.shape)) for name, tensor in state.items()})
    return open_training(Run.create(small.model_copy(update={"base": small.base.model_copy(update={"transformer": str(path)})})))


def growth(folder: Path, steps: int = 1000) -> dict[str, Any]:
    training = opened(folder, TinyShape(layers=8))
    training.learners[0].residency.rearrange(replace(streamed(training, 0.4, "mapped"), activations="host"))
    own = []
    for index in range(steps):
        step(training)
        if index in (steps // 4, steps // 2, 3 * steps // 4, steps - 1):
            gc.collect()
            own.append(host_memory()["anonymous"])
    return {"steps": steps, "anonymous_mib": [round(value / MIB, 2) for value in own], "grown_mib": round((own[-1] - own[0]) / MIB, 2)}


def start(folder: Path) -> dict[str, Any]:
    """Seconds and memory from the job to the first batch, with 10,000 clips and with 4; what the machine must read is in its cache."""
    found = {}
    for clips in (4, 10_000):
        job = job_of_many(folder / str(clips), clips)
        (folder / str(clips) / "job.json").write_text(job.canonical_json())
        command = [sys.executable, __file__, "--started", str(folder / str(clips) / "job.json")]
        runs = [json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]) for _ in range(2)]
        found[str(clips)] = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    many, few = found["10000"], found["4"]
    more = {f"more_{name}": many[name] - few[name] for name in many}
    return found | more


def job_of_many(folder: Path, clips: int) -> Job:
    """A tiny job whose data set has so many clips, each with files of its own (links to one)."""
    folder.mkdir()
    job = tiny_job(folder, held_out={"every_steps": 100})
    encoded = Encoded.open(job.encoded)
    cache, first = encoded.cache, encoded.items[0]
    items = []
    for index in range(clips):
        latents = Cache.latents_key(f"clip {index}", 0.0, first.num_frames, first.fps, first.height, first.width, "many")
        text = Cache.text_key(f"what is seen in clip {index}", "many")
        for kind, key, like in (("latents", latents, first.latents), ("text", text, first.text)):
            path = cache._path(kind, key)
            path.parent.mkdir(parents=True, exist_ok=True)
            os.link(cache._path(kind, like), path)
        items.append(
            replace(
                first,
                latents=latents,
                text=text,
                caption=f"what is seen in clip {index}",
                source=f"clip {index}.mp4",
                held_out=index % 10 == 9,
            )
        )
    replace(encoded, items=tuple(items)).save()
    return job.model_copy(update={"name": f"many-{clips}"})


def started(path: Path) -> dict[str, float]:
    """Opens the training of a job and takes its first batch; libraries are loaded before the clock starts."""
    import accelerate  # noqa: F401
    import diffusers  # noqa: F401
    import peft  # noqa: F401

    values = json.loads(path.read_text())
    run = Run.create(parse_job(values | {"name": f"{values['name']}-{os.getpid()}"}))
    gc.collect()
    before, wall, processor = host_memory()["anonymous"], time.perf_counter(), time.process_time()
    training = open_training(run)
    held_out_clips(training)
    training.samples.batch(1, training.samples.order.step(1)[0])
    seconds, used = time.perf_counter() - wall, time.process_time() - processor
    return {"seconds": seconds, "processor_seconds": used, "mib": (host_memory()["anonymous"] - before) / MIB}


def inspect(folder: Path) -> dict[str, Any]:
    path = write_header_only(folder / "wan2.1_t2v_14B_bf16.safetensors", entries(shapes_of(T2V_14B), torch.bfloat16))
    before, seconds = host_memory()["anonymous"], []
    for _ in range(3):
        begun = time.perf_counter()
        inspect_file(path)
        seconds.append(time.perf_counter() - begun)
    return {"file_bytes": path.stat().st_size, "seconds": seconds, "mib": (host_memory()["anonymous"] - before) / MIB}


PARTS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "overhead": overhead,
    "order": order,
    "memory": memory,
    "growth": growth,
    "start": start,
    "inspect": inspect,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", default=",".join(PARTS))
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--started", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.started:
        print(json.dumps(started(options.started)))
        return
    if options.part:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(PARTS[options.part](Path(folder))))
        return
    result: dict[str, Any] = {
        "command": "OMP_NUM_THREADS=1 python tests/benchmarks/offload_cpu.py",
        "hardware": hardware(torch.device("cpu")),
        "load": os.getloadavg(),
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }
    for part in options.only.split(","):
        done = subprocess.run([sys.executable, __file__, "--part", part], capture_output=True, text=True)
        result[part] = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {"error": done.stderr[-800:]}
        print(part, json.dumps(result[part], indent=1), flush=True)
        if options.out:
            options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
