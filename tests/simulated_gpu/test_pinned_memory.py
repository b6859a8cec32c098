"""Pinned host memory on the simulated GPU: refused in part or altogether, pinned once for a whole run, given back whatever fails."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_families
import torch

from simulated_gpu import gpu
from simulated_gpu.gpu_runs import in_use, job_on, losses, trained
from trainers import memory_limits, trainer
from trainers.family import families
from trainers.job import Job
from trainers.offload import blocks
from trainers.offload.pinned import Buffer, pinnable_bytes
from trainers.rates import copy_rate
from trainers.run import Run
from trainers.training import Training, open_training

WAN = families()["wan"]
ONE, TWO = (next(variant for variant in WAN.variants if variant.id == name) for name in ("wan2.1-t2v", "wan2.2-t2v"))
GPU = torch.device("cuda", 0)
ALL_IN_PINNED_MEMORY = {"stream": "always", "host": "pinned", "activations": "host"}
BLOCKS = 4


@pytest.fixture(autouse=True)
def four_blocks_and_small_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    shallow = tiny_families.tiny_config
    monkeypatch.setattr(blocks, "_WORTH_COPYING_BYTES", 0)
    monkeypatch.setattr(tiny_families, "tiny_config", lambda family, variant: shallow(family, variant) | {"num_layers": BLOCKS})


@pytest.fixture(autouse=True)
def nothing_stays_pinned() -> Iterator[None]:
    before = in_use()
    yield
    assert in_use() == before
    assert gpu.pinned_by_torch_bytes() == 0, "torch keeps nothing pinned after a run either"


def job_of_two_experts(folder: Path, **memory: Any) -> Job:
    job = job_on("cuda:0", folder, WAN, TWO, memory=memory)
    low_noise = str(tiny_families.write_native(folder / "low.safetensors", WAN, TWO))
    base = job.base.model_copy(update={"transformer_low_noise": low_noise, "variant": TWO.id})
    return job.model_copy(update={"base": base, "experts": job.experts.model_copy(update={"train": "both", "turn_steps": 1})})


def messages(run: Run) -> list[str]:
    return [event["message"] for event in run.read_events() if event["event"] == "memory"]


@pytest.fixture(scope="module")
def wanted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the CPU loses in each step, and what is pinned where nothing is refused."""
    with pytest.MonkeyPatch.context() as patch:
        shallow = tiny_families.tiny_config
        patch.setattr(tiny_families, "tiny_config", lambda family, variant: shallow(family, variant) | {"num_layers": BLOCKS})
        patch.setattr(blocks, "_WORTH_COPYING_BYTES", 0)
        folder = tmp_path_factory.mktemp("wanted")
        on_cpu = losses(trained(job_on("cpu", folder / "cpu", WAN, ONE)))
        gpu.reset()
        free = trained(job_on("cuda:0", folder / "gpu", WAN, ONE, memory=ALL_IN_PINNED_MEMORY))
        return {"losses": on_cpu, "messages": messages(free), "pinned": gpu.most_registered_bytes(), "made": gpu.registrations()}


@pytest.mark.parametrize("share", [0.0, 0.75, 1.0])
def test_a_refusal_changes_no_loss_and_is_reported(tmp_path: Path, wanted: dict[str, Any], share: float) -> None:
    """Weights, inputs of blocks and batches all ask for pinned memory. A refusal threw all pinned blocks away, said nothing in the
    run's events, came back as an error of a later step, and then shrank the model as if the GPU were full.
    """
    gpu.limit_pinned(int(share * wanted["pinned"]) + (share == 1.0) * 2**20)
    run = trained(job_on("cuda:0", tmp_path, WAN, ONE, memory=ALL_IN_PINNED_MEMORY), pinned=share == 1.0)
    assert losses(run) == pytest.approx(wanted["losses"], rel=1e-5)
    found = messages(run)
    assert not [message for message in found if "full" in message], "the GPU was not full"
    if share == 1.0:
        assert found[1:] == wanted["messages"][1:], "after the plan with its rates"
        return
    assert any("of 4 streamed blocks are pinned. The system does not pin" in message for message in found)
    assert any("Batches go to the GPU" in message for message in found) or share > 0
    said = [message for message in found if "the largest sample takes" in message][-1]
    kept = next(line for line in range(BLOCKS) if f"{line} of 4 streamed blocks are pinned" in said)
    assert kept == 0 if share == 0 else 0 < kept < BLOCKS


def test_refused_batches_do_not_shrink_the_model(tmp_path: Path, wanted: dict[str, Any]) -> None:
    """Torch says "CUDA error: out of memory" of a batch that cannot be pinned; the run took the GPU for full, until it ended."""
    gpu.limit_pinned(0)
    run = trained(job_on("cuda:0", tmp_path, WAN, ONE, memory={"stream": "never"}), pinned=False)
    assert losses(run) == pytest.approx(wanted["losses"], rel=1e-5)
    found = messages(run)
    assert [message for message in found if "Batches go to the GPU through memory that is not pinned" in message]
    assert "all blocks stay on the GPU" in found[-1]


@pytest.mark.parametrize("host", ["mapped", "pinned"])
def test_two_experts_pin_their_buffers_once(tmp_path: Path, host: str) -> None:
    """Every turn unregistered and registered up to 28 GB."""
    trained(job_of_two_experts(tmp_path, stream="always", host=host, activations="device"))
    assert gpu.registrations() == (BLOCKS if host == "pinned" else 2)


def opened(job: Job) -> Training:
    training = open_training(Run.create(job))
    training.take_turn(1)
    return training


def test_another_arrangement_pins_only_what_is_new(tmp_path: Path) -> None:
    """After an out of memory the whole model was unpinned, pinned and read again."""
    training = opened(job_on("cuda:0", tmp_path, WAN, ONE, memory={"stream": "always", "host": "pinned"}))
    residency = training.learners[0].residency
    block = max(residency.block_bytes)
    for weights_bytes, registered in ((2 * block, BLOCKS), (block, BLOCKS), (None, BLOCKS), (2 * block, BLOCKS)):
        training.rearrange(dataclasses.replace(residency.arrangement, weights_bytes=weights_bytes))
        assert gpu.registrations() == registered
    training.close()


def test_slots_that_do_not_fit_pin_no_block(tmp_path: Path) -> None:
    """Gigabytes were copied and pinned before the GPU was asked for the slots; they stayed pinned when it had no memory for them."""
    training = open_training(Run.create(job_on("cuda:0", tmp_path, WAN, ONE, memory={"stream": "always", "host": "pinned"})))
    failed_in = set[str]()
    for after in range(30):  # what stays on the GPU is allocated before
        pinned = gpu.registrations()
        gpu.fail_allocations(after)
        with pytest.raises(torch.OutOfMemoryError) as full:
            training.take_turn(1)
        failed_in = {entry.path.name for entry in full.traceback}
        del full
        if "stream.py" in failed_in:
            break
        training.make_way()
    assert "stream.py" in failed_in, "it was a slot that had no memory"
    assert gpu.registrations() - pinned <= 2, "the staging buffers at most: each block would be one more"
    training.close()


def test_memory_is_pinned_for_every_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As ComfyUI pins its own (cudaHostRegisterPortable): else copies to a second GPU are not asynchronous."""
    cudart, flags = torch.cuda.cudart(), list[int]()
    usual = cudart.cudaHostRegister
    monkeypatch.setattr(cudart, "cudaHostRegister", lambda pointer, size, flag: flags.append(flag) or usual(pointer, size, flag))
    Buffer(4096, GPU).close()
    assert flags == [1]


def test_measuring_copies_leaves_nothing_pinned() -> None:
    """128 MiB stayed in torch's cache for good; and a rate of memory that is not pinned would be no rate of streamed weights."""
    assert copy_rate(GPU) > 0
    assert gpu.report().copies
    assert gpu.report().pageable == {}
    assert gpu.pinned_by_torch_bytes() == 0


@pytest.mark.parametrize("memory", [ALL_IN_PINNED_MEMORY, {"stream": "always", "host": "mapped", "activations": "host"}])
def test_a_run_that_fails_leaves_nothing_pinned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory: dict[str, Any]) -> None:
    def fails(*_: Any) -> None:
        raise ValueError("in the middle of a run")

    monkeypatch.setattr(trainer, "update", fails)
    with pytest.raises(ValueError, match="middle"):
        trained(job_on("cuda:0", tmp_path, WAN, ONE, memory=memory))


@pytest.mark.parametrize(("limit_mib", "most_mib", "found_mib"), [(600, 2048, 512), (4096, 600, 512), (0, 512, 0)])
def test_how_much_can_be_pinned_is_found_by_trying(limit_mib: int, most_mib: int, found_mib: int) -> None:
    gpu.limit_pinned(limit_mib << 20)
    assert pinnable_bytes(GPU, most_mib << 20) == found_mib << 20
    torch.ones(1, device=GPU).sum().item()  # no error of the refusal is left for it


@pytest.mark.parametrize("limit_mib", [1024, 1 << 20])
def test_wsl_is_asked_what_it_pins(monkeypatch: pytest.MonkeyPatch, limit_mib: int) -> None:
    """It was reported to refuse at 1 GiB, whatever its RAM: where more than 4 GiB can be pinned, Linux's share counts."""
    monkeypatch.setattr(memory_limits, "this_system", lambda: "wsl")
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(total=64 * memory_limits.GIB))
    gpu.limit_pinned(limit_mib << 20)
    found = memory_limits.pinnable_here(GPU, 40 * memory_limits.GIB)
    assert found == (memory_limits.GIB if limit_mib == 1024 else 36 * memory_limits.GIB)
