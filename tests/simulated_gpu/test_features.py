"""What a job may ask for, on the GPU as on the CPU: methods, optimizers, quantised bases, previews, and going on after an end."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import as_fp8_scaled

from simulated_gpu import gpu
from simulated_gpu.gpu_runs import (
    ARRANGEMENTS,
    forget_accelerate,
    in_use,
    losses,
    shared_job,
    tiny_files,
    trained,
    with_two_experts,
    with_videos,
)
from trainers import previews, session, trainer, training
from trainers.job import Job, parse_job
from trainers.plan import make_plan
from trainers.run import Run

pytestmark = pytest.mark.usefixtures("small_inputs_are_offloaded", "tables_of_bitsandbytes")

WAN, MAPPED = "wan2.1-t2v", {"memory": ARRANGEMENTS["mapped"]}
TRAINED: dict[str, dict[str, Any]] = {
    "dora": {"lora": {"rank": 2, "dora": True}},
    "dora, inputs on the host": {"lora": {"rank": 2, "dora": True}, "memory": {"activations": "host"}},
    "dropout": {"lora": {"rank": 2, "dropout": 0.2}} | MAPPED,
    "accumulation": {"accumulation": 2} | MAPPED,
    "without checkpointing": {"gradient_checkpointing": False},
    "adamw8bit": {"optimizer": {"kind": "adamw8bit", "learning_rate": 1e-2}} | MAPPED,
    "adamw_kahan": {"method": "full", "optimizer": {"kind": "adamw_kahan", "learning_rate": 1e-3}},
    "prodigy": {"optimizer": {"kind": "prodigy", "learning_rate": 1.0}} | MAPPED,
    "full": {"method": "full", "optimizer": {"learning_rate": 1e-3}},
    "fp8": {"memory": ARRANGEMENTS["mapped"] | {"quantise": "fp8"}},
    "deterministic": {"deterministic": True} | MAPPED,
}


@pytest.fixture(autouse=True)
def determinism_ends_with_the_test(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    before = in_use()
    yield
    assert in_use() == before


def changed(job: Job, **fields: Any) -> Job:
    return parse_job(job.model_dump(mode="json") | fields)


@pytest.mark.matrix
@pytest.mark.parametrize("how", TRAINED)
def test_what_is_trained(tmp_path: Path, how: str) -> None:
    found, expected = (losses(trained(shared_job(device, tmp_path / device[:3], WAN, **TRAINED[how]))) for device in ("cuda:0", "cpu"))
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.matrix
@pytest.mark.parametrize("way", ["resident", "mapped", "chunks"])
def test_a_scaled_fp8_file(tmp_path: Path, way: str) -> None:
    base = tmp_path / "scaled_t2v.safetensors"
    shutil.copy(tiny_files("wan", WAN).base.transformer, base)
    as_fp8_scaled(base)
    fields = {"base": {"transformer": str(base), "variant": WAN}}
    found = losses(trained(shared_job("cuda:0", tmp_path / "gpu", WAN, memory=ARRANGEMENTS[way], **fields)))
    assert found == pytest.approx(losses(trained(shared_job("cpu", tmp_path / "cpu", WAN, **fields))), rel=1e-5)


@pytest.fixture
def videos(monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """The frames of all previews, as they are written."""
    found: list[np.ndarray] = []
    monkeypatch.setattr(previews, "write_video", lambda path, frames, fps: (found.append(frames), path.write_bytes(b"video")))
    return found


@pytest.mark.parametrize(
    ("variant", "way"),
    [
        pytest.param("wan2.2-t2v", "pinned"),
        *(
            pytest.param(name, "mapped", marks=pytest.mark.matrix)
            for name in (WAN, "wan2.2-ti2v", "ltxv-2b-0.9", "hunyuan-t2v", "mochi-1-preview")
        ),
    ],
)
def test_previews_and_held_out_losses(tmp_path: Path, videos: list[np.ndarray], variant: str, way: str) -> None:
    """Of Wan 2.2 both experts are trained in turns, and both take part in each video."""
    two = with_two_experts if variant == "wan2.2-t2v" else (lambda job: job)
    runs = [
        trained(
            with_videos(
                two(shared_job(device, tmp_path / device[:3], variant, **({"memory": ARRANGEMENTS[way]} if "cuda" in device else {})))
            )
        )
        for device in ("cuda:0", "cpu")
    ]
    found, expected = ([line.get("held_out_loss", 0.0) + line["loss"] for line in run.read_metrics()] for run in runs)
    assert found == pytest.approx(expected, rel=1e-5)
    assert len(videos) == 4
    for on_gpu, on_cpu in zip(videos[:2], videos[2:], strict=True):
        assert np.abs(on_gpu.astype(int) - on_cpu.astype(int)).max() <= 1


@pytest.mark.matrix
def test_previews_in_tiles(tmp_path: Path, videos: list[np.ndarray], monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU is full while the first video is decoded, with the transformer beside it and without."""
    decode, tiles = previews.decode_frames, []

    def decode_frames(family: Any, vae: Any, latents: Any, tile: int | None = None) -> Any:
        tiles.append(tile)
        if tile is None:
            gpu.fail_allocations(3, 1)
        return decode(family, vae, latents, tile)

    monkeypatch.setattr(previews, "decode_frames", decode_frames)
    monkeypatch.setattr("trainers.tiles.SIDES", (32, 16))
    run = trained(with_videos(shared_job("cuda:0", tmp_path, WAN, **MAPPED), width=64, height=64))
    assert tiles[:2] == [None, None]
    assert tiles[2] is not None
    assert [video.shape for video in videos] == [(1, 64, 64, 3)] * 2
    assert any("tile_pixels" in event for event in run.read_events())


def lora_bytes(run: Run) -> bytes:
    return max((Path(run.job.loras_folder) / run.name).glob("*.safetensors")).read_bytes()


class Killed(BaseException):
    """Stands for the end of the process: no code of a training catches it."""


def kill_in_step(monkeypatch: pytest.MonkeyPatch, step: int) -> Callable[[], None]:
    update, there = trainer.update, [True]

    def dies(now: Any, *given: Any) -> Any:
        if there and now.step == step:
            there.clear()
            raise Killed
        return update(now, *given)

    monkeypatch.setattr(trainer, "update", dies)
    return lambda: None


@pytest.mark.parametrize(
    "way", [pytest.param("mapped"), *(pytest.param(way, marks=pytest.mark.matrix) for way in ("resident", "pinned", "chunks"))]
)
def test_a_killed_run_is_resumed_byte_for_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    fields = {"memory": ARRANGEMENTS[way], "deterministic": True, "checkpoints": {"every_steps": 2}, "lora": {"rank": 2, "dropout": 0.2}}
    straight = trained(shared_job("cuda:0", tmp_path / "straight", WAN, **fields))
    run = Run.create(shared_job("cuda:0", tmp_path / "killed", WAN, **fields))
    kill_in_step(monkeypatch, 3)
    forget_accelerate()
    with pytest.raises(Killed):
        trainer.train(run)
    assert run.checkpoints() == [2]
    forget_accelerate()
    assert trainer.train(Run.open(run.folder)) == "done"
    assert losses(run) == losses(straight)
    strip = [content[8 + int.from_bytes(content[:8], "little") :] for content in (lora_bytes(run), lora_bytes(straight))]
    assert strip[0] == strip[1], "tensors; the header names the job"


def test_a_pause_that_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker trains twice in one process. Its second plan saw a GPU full of the first model, so that a large one "did not fit"."""
    free: list[tuple[int, int]] = []
    asked, plan_memory = iter([None, None, "pause"]), training.plan_memory

    def planned(*given: Any) -> Any:
        plan = plan_memory(*given)
        free.append((plan.machine.free_bytes, gpu.registered_bytes()))
        return plan

    fields = {"memory": ARRANGEMENTS["pinned"], "deterministic": True}
    straight = trained(shared_job("cuda:0", tmp_path / "straight", WAN, **fields))
    run = Run.create(shared_job("cuda:0", tmp_path / "paused", WAN, **fields))
    monkeypatch.setattr(training, "plan_memory", planned)
    monkeypatch.setattr(Run, "requested", lambda run: next(asked, None))
    forget_accelerate()
    in_use()  # collects what the straight run left in reference cycles
    assert session.main([str(run.folder)]) == 0
    assert len(free) == 2
    assert free[0] == free[1], "the GPU is as empty as at first, and nothing is registered"
    assert [event["event"] for event in run.read_events()][-1] == "done"
    assert losses(run) == losses(straight)


@pytest.mark.matrix
def test_starts_from_a_lora_and_from_another_run(tmp_path: Path) -> None:
    found = []
    for device in ("cuda:0", "cpu"):
        folder = tmp_path / device[:3]
        memory = {"memory": ARRANGEMENTS["mapped"]} if device != "cpu" else {}
        first = trained(shared_job(device, folder / "first", WAN, **memory))
        lora = max((Path(first.job.loras_folder) / first.name).glob("*.safetensors"))
        from_lora = trained(shared_job(device, folder / "second", WAN, start={"initial_lora": str(lora)}, **memory))
        longer = trained(shared_job(device, folder / "third", WAN, steps=5, start={"extends": f"{first.folder}@3"}, **memory))
        found.append(losses(from_lora) + losses(longer))
    assert len(found[0]) == 5
    assert found[0] == pytest.approx(found[1], rel=1e-5)


@pytest.mark.matrix
@pytest.mark.parametrize("variant", [WAN, "wan2.2-t2v", "hunyuan-t2v"])
def test_the_plan_is_made_and_leaves_nothing(tmp_path: Path, variant: str) -> None:
    plan = make_plan(shared_job("cuda:0", tmp_path, variant))
    assert plan.memory.fits
    assert plan.memory.machine.device == "cuda"
    assert "cuda" in str(plan.memory.machine.device)
