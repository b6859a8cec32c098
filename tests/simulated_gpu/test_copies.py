"""What is copied between the host and the GPU, and how: counted, since a simulated GPU takes no time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_families
import torch
from tiny_families import write_native

from simulated_gpu import gpu
from simulated_gpu.gpu_runs import VARIANTS as TINY_VARIANTS
from simulated_gpu.gpu_runs import forget_accelerate, job_on, trained
from simulated_gpu.whole_jobs import job_with_everything
from trainers import trainer
from trainers.batches import Samples
from trainers.data.encoded import Encoded
from trainers.family import Family, Variant, families
from trainers.offload import blocks
from trainers.offload.copies import CudaCopies
from trainers.offload.pinned import PinnedMemory
from trainers.run import Run
from trainers.training import Training, open_training

WAN = families()["wan"]
ONE, TWO = (next(variant for variant in WAN.variants if variant.id == name) for name in ("wan2.1-t2v", "wan2.2-t2v"))
VARIANTS = [(family, variant) for family in families().values() for variant in family.variants]
BLOCKS = 4
HOST_ARENA = {"stream": "always", "host": "pinned", "activations": "host"}


@pytest.fixture(autouse=True)
def four_blocks_with_small_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    shallow = tiny_families.tiny_config
    monkeypatch.setattr(tiny_families, "tiny_config", lambda family, variant: shallow(family, variant) | {"num_layers": BLOCKS})
    monkeypatch.setattr(blocks, "_WORTH_COPYING_BYTES", 0)


def two_experts(folder: Path, **fields: Any) -> Any:
    """A job that trains both experts of a model by turns of one step."""
    job = job_on("cuda:0", folder, WAN, TWO, **fields)
    low = str(write_native(folder / "low.safetensors", WAN, TWO))
    base = job.base.model_copy(update={"transformer_low_noise": low, "variant": TWO.id})
    return job.model_copy(update={"base": base, "experts": job.experts.model_copy(update={"train": "both", "turn_steps": 1})})


def opened(job: Any) -> Training:
    forget_accelerate()
    return open_training(Run.create(job))


def copies_up() -> int:
    return sum(count for line, count in gpu.report().copies.items() if line.startswith("copy to GPU"))


def test_resident_weights_go_up_in_one_copy_for_each_block(tmp_path: Path) -> None:
    """They went tensor by tensor out of the mapped file: 400 allocations and copies that Python waits for, at a third of the speed."""
    training = opened(two_experts(tmp_path, memory={"stream": "never"}))
    try:
        for step in (1, 2, 3):
            gpu.reset()
            training.take_turn(step)
            assert BLOCKS < copies_up() <= BLOCKS + 4, "and few, as large as a block, of the 100 other tensors"
            assert gpu.report().pageable == {}
            assert not [line for line in gpu.report().host_waits if "copy" in line]
    finally:
        training.close()


def test_what_is_resident_is_what_the_file_holds(tmp_path: Path) -> None:
    training = opened(job_on("cuda:0", tmp_path, WAN, ONE, memory={"stream": "never"}))
    transformer = training.learners[0].transformer
    try:
        wanted = {name: tensor.cpu() for name, tensor in transformer.state_dict().items()}
        training.take_turn(1)
        found = transformer.state_dict()
        assert {tensor.device for tensor in found.values()} == {torch.device("cuda:0")}
        assert all(torch.equal(found[name].cpu(), wanted[name]) for name in wanted)
    finally:
        training.close()


@pytest.mark.parametrize("memory", [{"stream": "never"}, HOST_ARENA, HOST_ARENA | {"host": "mapped"}])
def test_a_training_makes_two_streams(tmp_path: Path, memory: dict[str, Any]) -> None:
    """Each turn of an expert took one more of torch's 32; from the 31st on, weights and inputs shared one and queued behind each other."""
    trained(two_experts(tmp_path, memory=memory))
    assert gpu.report().streams_made == 2, "one for weights, one for inputs of blocks"


def test_the_last_blocks_input_stays_on_the_gpu(tmp_path: Path) -> None:
    """It went to the host and straight back: two copies in each pass that nothing hid."""
    training = opened(job_on("cuda:0", tmp_path, WAN, ONE, memory=HOST_ARENA, batch_size=1))
    try:
        item, arena = training.samples.items[0], training.host.arena
        one = training.family.latent(training.variant).tokens(item.num_frames, item.height, item.width) * 128 * 4
        for step in (1, 2):
            training.step = step
            before = arena.bytes_to_host, arena.bytes_to_device
            trainer.optimize(training)
            assert arena.bytes_to_host - before[0] == arena.bytes_to_device - before[1] == (BLOCKS - 2) * one
    finally:
        training.close()


@pytest.mark.parametrize(("family", "variant"), VARIANTS, ids=[variant.id for _, variant in VARIANTS])
def test_everything_of_a_batch_is_pinned_in_one_piece(tmp_path: Path, family: Family, variant: Variant) -> None:
    """The first frame was a view of every clip's latents: pinned, but strided, so each copy of it stopped the queue (LTX, Wan 2.2)."""
    job, device = job_on("cuda:0", tmp_path, family, variant), torch.device("cuda:0")
    samples = Samples.of(job, family, variant, Encoded.open(Path(job.encoded)), device, torch.float32)
    samples = replace(samples, memory=PinnedMemory(device))
    batch = samples.batch(1, samples.order.step(1)[0])
    gpu.reset()
    batch.to(device)
    assert copies_up() >= 3
    assert gpu.report().pageable == {}


@pytest.mark.parametrize(
    ("family", "variant"),
    [pytest.param(*both, id=name, marks=() if name == "wan2.1-t2v" else pytest.mark.matrix) for name, both in TINY_VARIANTS.items()],
)
def test_no_pinned_copy_is_strided_or_cast(tmp_path: Path, family: Family, variant: Variant) -> None:
    """In training, held-out loss and previews: the driver cannot make such a copy by itself, and the host waits for it."""
    trained(job_with_everything("cuda:0", tmp_path, family, variant, memory=HOST_ARENA))
    assert gpu.report().copies
    assert [line for line in gpu.report().pageable if line.startswith("pinned")] == []


def test_windows_is_asked_after_each_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its driver collects launches: a copy beside the computing may not start before something asks for it."""
    asked = list[bool]()
    monkeypatch.setattr(torch.cuda.Event, "query", lambda event: asked.append(True) or True)
    source, target = torch.zeros(8), torch.zeros(8, device="cuda:0")
    for flush, times in ((False, 0), (True, 2)):
        copies = CudaCopies(torch.device("cuda:0"), flush=flush)
        copies.wait(copies.copy(target, source, copies.mark()))
        assert len(asked) == times
