"""What the plan says of previews: sampling and decoding as they are traced, against what they take; and what fits on which card."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_memory_trace import grown, real_batch, shape_of, traced
from tiny import TinyShape, tiny_job
from tiny_families import filled, tiny_vae_of
from torch.profiler import ProfilerActivity, profile

from trainers.batches import Samples
from trainers.checkpoint import Checkpoint
from trainers.cli import main
from trainers.data.encoded import Encoded
from trainers.demo.demo import VAE
from trainers.family import TextRecord, detect, detect_vae, families
from trainers.job import Job, LoraSpec, parse_job
from trainers.job_memory import JobTrace
from trainers.live_bytes import LiveBytes
from trainers.load import load_vae
from trainers.lora import inject
from trainers.machine import GIB, MIB, Machine, card_of, size_text
from trainers.memory_plan import choose
from trainers.plan import make_plan
from trainers.preview_memory import PreviewPlan, _Decoding, _Planner, plan_previews
from trainers.sample import Solver, sample_latents


def measured_peak(work: Callable[[], Any]) -> int:
    """The most that is allocated meanwhile over what was there before."""
    work()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    changes = sorted((e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns())
    live = peak = 0
    for event in changes:
        live += event.nbytes()
        peak = max(peak, live)
    return peak


@pytest.mark.parametrize(("family_id", "cfg"), [("wan", 5.0), ("ltx", 1.0), ("hunyuan", 1.0), ("mochi", 4.5)])
def test_sampling_takes_what_the_trace_says(family_id: str, cfg: float) -> None:
    family = families()[family_id]
    variant, tracer = traced(family, torch.float32)
    shape = shape_of(family, variant)
    predicted = tracer.sampling_bytes(shape, cfg, 1)
    _, transformer = grown(family)
    transformer = filled(transformer).requires_grad_(False)
    inject(transformer, family, LoraSpec(rank=4), 0)
    transformer.eval()
    batch = real_batch(shape, family, torch.float32)
    pooled = None if batch.text.pooled_BD is None else batch.text.pooled_BD[0]
    record = TextRecord(torch.randn(shape.text_rows, shape.text_width), pooled)

    def sample() -> torch.Tensor:
        noise = torch.randn(1, *shape.latents_CFHW)
        return sample_latents(family, variant, lambda _: transformer, noise, [record], record, Solver((1.0, 0.0), cfg), torch.float32)

    measured = measured_peak(sample)
    assert measured > 2 * MIB
    assert predicted == pytest.approx(measured, rel=0.1)


def test_decoding_takes_what_the_trace_says() -> None:
    """Of tensors. What convolutions take for themselves is not traced: on this processor it is more than all else."""
    family, checkpoint = families()["wan"], Checkpoint.open(VAE, "vae")
    vae, size = load_vae(checkpoint, detect_vae(checkpoint, family), "cpu"), (25, 48, 64)
    spec = family.latent(family.variants[0])
    with torch.no_grad(), LiveBytes("cpu", (*vae.parameters(), *vae.buffers())) as counted:
        family.decode_video(vae, torch.randn(1, *spec.shape(*size)))
    assert _Decoding(family, vae.to("meta"), spec, None).peak(size, None) == pytest.approx(counted.peak, rel=0.05)


@pytest.mark.parametrize("family_id", ["ltx", "hunyuan", "mochi"])
def test_every_family_s_decoding_is_traced(family_id: str) -> None:
    family = families()[family_id]
    spec = family.latent(family.variants[0])
    module = tiny_vae_of(family, family.vaes[0]).to("meta")
    decoding = _Decoding(family, module, spec, family.vaes[0].tile_pixels)
    size = 2 * spec.temporal_stride + 1, 256, 384
    whole, tiled = decoding.peak(size, None), decoding.peak(size, 128)
    assert whole
    assert tiled
    assert whole > 1.8 * tiled


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """Previews of 17 frames of 640x480, much larger than the clips."""
    folder = tmp_path_factory.mktemp("planned")
    made = tiny_job(folder, TinyShape(layers=4, width=256, ffn=2048), precision="fp32", gradient_checkpointing=True)
    spec = {"every_steps": 2, "prompts": ["a preview"], "width": 640, "height": 480, "num_frames": 17, "cfg": 5.0}
    base = made.base.model_dump() | {"vae": str(VAE)}
    return parse_job(made.model_dump(mode="json") | {"base": base, "previews": spec})


@pytest.fixture(scope="module")
def planner(job: Job) -> _Planner:
    """For a card that has room for everything."""
    detection, device = detect(Checkpoint.open(job.base.transformer)), torch.device("cpu")
    samples = Samples.of(job, detection.family, detection.variant, Encoded.open(job.encoded), device, torch.float32)
    ample = Machine("a card", "cuda", 80 * GIB, 80 * GIB, 64 * GIB, flops_rate=1e13, memory_rate=1e11, copy_rate=1e10)
    trace = JobTrace.of(job, detection, samples, ample, torch.float32)
    plan = choose(job, trace, ample)
    return _Planner(job, detection, trace.tracer, trace.shape, plan, _Decoding.of(str(VAE), detection))


def test_on_smaller_and_smaller_cards_more_is_done(planner: _Planner) -> None:
    size = (17, 480, 640)
    found: list[PreviewPlan] = []
    while not found or (found[-1].fits and len(found) < 100):
        card = replace(planner.plan.machine, free_bytes=int(0.85 ** len(found) * GIB))
        found.append(replace(planner, plan=replace(planner.plan, machine=card)).planned(size))
        assert not found[-1].fits or max(found[-1].sampling_bytes, found[-1].decoding_bytes or 0) < card.free_bytes
    fitting = found[:-1]
    order = [(True, None), (False, None), (False, 512), (False, 256), (False, 128)]
    ways = [order.index((each.beside, each.tile_pixels)) for each in fitting]
    assert ways == sorted(ways)
    assert len(set(ways)) >= 3
    assert [each.fewer_blocks for each in fitting] == sorted(each.fewer_blocks for each in fitting)
    assert fitting[-1].fewer_blocks
    assert re.fullmatch(
        r"Previews of 17 frames of 640x480 fit \(\S+ GiB to sample; \S+ GiB to decode, buffers of convolutions not counted\)\.",
        str(found[0]),
    )
    assert "fewer blocks stay on the card while they are sampled" in str(fitting[-1])
    assert f"they are decoded in tiles of {fitting[-1].tile_pixels} pixels" in str(fitting[-1])
    last = plan_previews(planner.job, planner.detection, planner.tracer, planner.clips, replace(planner.plan, machine=card))
    assert last
    assert last.fitting
    assert last.fitting < last.size
    assert not last.sampled
    assert f"do not fit: it would take at the least {size_text(last.sampling_bytes)} to sample" in str(last)
    assert f"{last.fitting[0]} frames of {last.fitting[2]}x{last.fitting[1]} would fit. The run goes on" in str(last)


def test_trained_weights_never_leave(planner: _Planner) -> None:
    full = replace(planner, job=planner.job.model_copy(update={"method": "full"}))
    weights, fits = planner.plan.price.weights_bytes, []
    for free_bytes in (GIB, GIB // 2, GIB // 4, GIB // 8, GIB // 16):
        machine = replace(planner.plan.machine, free_bytes=free_bytes)
        found = replace(full, plan=replace(planner.plan, machine=machine)).planned((17, 480, 640))
        assert not found.fewer_blocks
        assert found.beside
        assert found.sampling_bytes > weights
        assert "leave the card" not in str(found)
        fits.append((found.sampled, found.decoded))
    assert fits[0] == (True, True)
    assert fits[-1] == (False, False)


def test_the_plan_says_it_and_refuses_nothing(job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "job.json").write_text(job.canonical_json())
    assert main(["plan", str(tmp_path / "job.json"), "--card", "RTX 4090", "--json"]) == 0
    memory = json.loads(capsys.readouterr().out)["memory"]
    assert memory["previews"]["fits"]
    assert memory["reasons"][-1].startswith("Previews of 17 frames of 640x480 fit")
    none = job.model_copy(update={"previews": job.previews.model_copy(update={"every_steps": 0})})
    assert make_plan(none, card_of("RTX 4090", None).machine(32)).memory.previews is None
    assert make_plan(none.model_copy(update={"previews": job.previews})).memory.previews is None, "there is no card"
