"""Previews on a device that training fills: each gets room, and what is trained does not know of it."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_families
import torch
from tiny_families import tiny_job_of, write_native

from trainers import previews, trainer
from trainers.cli.follow import _news
from trainers.demo.demo import VAE
from trainers.family import Variant, families
from trainers.job import parse_job
from trainers.residency import Residency
from trainers.run import Run
from trainers.trainer import train
from trainers.training import Training, open_training

WAN = families()["wan"]
ONE, TWO = (next(variant for variant in WAN.variants if variant.id == name) for name in ("wan2.1-t2v", "wan2.2-t2v"))
FULL = "CUDA out of memory. Tried to allocate 2.00 GiB."
STREAMS = {"memory": {"stream": "always"}, "gradient_checkpointing": True}


@pytest.fixture(autouse=True)
def deep_and_small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Six blocks, so that there are fewer to keep; tiles that are smaller than a small video."""
    shallow = tiny_families.tiny_config
    monkeypatch.setattr(tiny_families, "tiny_config", lambda family, variant: {**shallow(family, variant), "num_layers": 6})
    monkeypatch.setattr("trainers.tiles.SIDES", (32, 16))


def new_run(folder: Path, variant: Variant = ONE, *, size: int = 48) -> Run:
    """Two steps; a preview before the first and one after the second."""
    job = tiny_job_of(folder, WAN, variant, steps=2, batch_size=1, **STREAMS)
    base = job.base.model_dump() | {"vae": str(VAE), "variant": variant.id}
    values: dict[str, Any] = job.model_dump(mode="json")
    if variant.boundary is not None:
        base["transformer_low_noise"] = str(write_native(folder / "low_noise.safetensors", WAN, variant))
        values["experts"] |= {"train": "both", "turn_steps": 1}
    spec = {
        "every_steps": 2,
        "prompts": [""],
        "negative": "",
        "width": size,
        "height": size,
        "num_frames": 1,
        "sampling_steps": 2,
        "shift": 1.0,
    }
    return Run.create(parse_job(values | {"base": base, "previews": spec}))


def without_previews(run: Run, folder: Path) -> Run:
    values = run.job.model_dump(mode="json")
    paths = {"runs_folder": str(folder / "runs"), "loras_folder": str(folder / "loras")}
    return Run.create(parse_job(values | paths | {"previews": {}}))


def loras(folder: Path) -> list[bytes]:
    """The tensors of each file; its header names the job."""
    found = [path.read_bytes() for path in sorted((folder / "loras").rglob("*.safetensors"))]
    assert found
    return [content[8 + int.from_bytes(content[:8], "little") :] for content in found]


def samples(run: Run) -> list[dict[str, Any]]:
    return [event for event in run.read_events() if event["event"] == "sample"]


class Device:
    """A device that is full where `full` says so. `tried`: what was done on it, with so many bytes of blocks there, in which tiles."""

    def __init__(self, full: Callable[[str, int, int | None], bool] = lambda what, held, tile: False, streams: bool = False) -> None:
        """`streams`: all blocks through a ring; else all of them stay."""
        self.full, self.streams = full, streams
        self.tried: list[tuple[str, int, int | None]] = []
        self.frames: list[torch.Tensor] = []
        self.vaes: list[weakref.ref[torch.Tensor]] = []

    @property
    def blocks(self) -> int:
        """Bytes of all blocks."""
        return sum(self.training.learners[0].residency.block_bytes)

    def train(self, run: Run) -> str:
        sample, decode = previews.sample_latents, previews.decode_frames

        def opened(run: Run) -> Training:
            self.training = open_training(run)
            self.arrangement = self.training.learners[0].residency.arrangement
            if not self.streams:
                self.arrangement = replace(self.arrangement, weights_bytes=None)
                self.training.rearrange(self.arrangement)
            return self.training

        def sample_latents(*args: Any, **kwargs: Any) -> torch.Tensor:
            found = sample(*args, **kwargs)
            self._look("sample")
            return found

        def decode_frames(family: Any, vae: Any, latents: torch.Tensor, tile: int | None = None) -> list[torch.Tensor]:
            self.vaes.append(weakref.ref(next(vae.parameters())))
            self._look("decode", tile)
            self.frames += decode(family, vae, latents, tile)
            return self.frames[-1:]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trainer, "open_training", opened)
            patch.setattr(previews, "sample_latents", sample_latents)
            patch.setattr(previews, "decode_frames", decode_frames)
            return train(run)

    def _look(self, what: str, tile: int | None = None) -> None:
        resident = self.training.resident
        held = resident.residency.placement.device_bytes if resident else 0
        self.tried.append((what, held, tile))
        if self.full(what, held, tile):
            raise torch.OutOfMemoryError(FULL)


@pytest.mark.parametrize("streams", [False, True])
def test_decoding_without_the_transformer_is_the_same_preview_and_the_same_training(tmp_path: Path, streams: bool) -> None:
    beside, left, plain = (new_run(tmp_path / name) for name in ("beside", "left", "plain"))
    roomy, small = Device(streams=streams), Device(lambda what, held, tile: what == "decode" and held > 0, streams)
    assert roomy.train(beside) == small.train(left) == train(without_previews(plain, tmp_path / "without")) == "done"
    assert [(what, held > 0) for what, held, _ in roomy.tried] == [("sample", True), ("decode", True)] * 2
    assert [(what, held > 0) for what, held, _ in small.tried] == [
        ("sample", True),
        ("decode", True),
        ("decode", False),
        ("sample", True),
        ("decode", False),
    ], "what was found for the first preview is known for the second"
    assert all(torch.equal(a, b) for a, b in zip(small.frames, roomy.frames, strict=True))
    assert all(vae() is None for vae in small.vaes), "nothing of a VAE is left, whether it decoded or not"
    assert "tile_pixels" not in samples(left)[-1]
    assert loras(tmp_path / "left") == loras(tmp_path / "beside") == loras(tmp_path / "without")


def test_tiles_come_when_nothing_else_helps_and_are_told(tmp_path: Path) -> None:
    whole, tiled = new_run(tmp_path / "whole"), new_run(tmp_path / "tiled")
    roomy, small = Device(), Device(lambda what, held, tile: what == "decode" and (held > 0 or tile != 16 // 8))
    assert roomy.train(whole) == small.train(tiled) == "done"
    assert [tile for what, _, tile in small.tried if what == "decode"] == [None, None, 4, 2, 2]
    told = [event for event in samples(tiled) if event["files"]]
    assert [event["tile_pixels"] for event in told] == [16, 16]
    assert "decoded in tiles of 16 pixels" in _news(told[0])
    assert (tiled.samples_folder / "step-000002-0.mp4").exists()
    for found, wanted in zip(small.frames, roomy.frames, strict=True):
        assert found.shape == wanted.shape
        assert 0 < (found.float() - wanted.float()).abs().mean() < 0.35 * wanted.float().std(), "of noise, which latents here are"
    assert loras(tmp_path / "tiled") == loras(tmp_path / "whole")


def test_sampling_takes_blocks_from_the_device_and_gives_them_back(tmp_path: Path) -> None:
    """Inputs of blocks are left where they are: sampling keeps none."""
    roomy, small = Device(), Device(lambda what, held, tile: what == "sample" and held > small.blocks // 2)
    assert roomy.train(new_run(tmp_path / "roomy")) == "done"
    run = new_run(tmp_path / "small")
    assert small.train(run) == "done"
    tried = [held for what, held, _ in small.tried if what == "sample"]
    assert tried[0] == small.blocks, "as in training"
    assert tried[:-1] == sorted(set(tried[:-1]), reverse=True)
    assert tried[-1] == tried[-2] <= small.blocks // 2, "the second preview begins where the first one ended"
    assert [held for what, held, _ in small.tried if what == "decode"] == [0, 0], "its blocks have left already"
    assert small.training.learners[0].residency.arrangement == small.arrangement
    (told,) = [event["message"] for event in samples(run) if "while previews are sampled" in event.get("message", "")]
    assert "of 6 blocks stay on the device; training keeps them as before" in told
    assert all(torch.equal(a, b) for a, b in zip(small.frames, roomy.frames, strict=True))
    assert loras(tmp_path / "small") == loras(tmp_path / "roomy")


@pytest.mark.parametrize(
    ("where", "told"),
    [
        ("sample", "not even with as few blocks on the device as there can be"),
        ("decode", "not even without the transformer and in tiles of 16 pixels"),
    ],
)
def test_the_last_resort_is_to_tell_that_there_is_none(tmp_path: Path, where: str, told: str) -> None:
    small = Device(lambda what, held, tile: what == where)
    run = new_run(tmp_path / "small")
    assert small.train(run) == train(without_previews(run, tmp_path / "without")) == "done"
    messages = [event["message"] for event in samples(run)]
    assert [message.split()[0] for message in messages] == ["sampling", "no"] * 2
    assert f"no memory for a preview of 1 frames of 48x48, {told}; training goes on without it" in messages
    assert loras(tmp_path / "small") == loras(tmp_path / "without")


@pytest.mark.parametrize("streams", [False, True])
def test_two_experts(tmp_path: Path, streams: bool) -> None:
    """Whichever is there leaves; the turn after a preview brings its own back."""
    roomy, small = Device(streams=streams), Device(lambda what, held, tile: held > (0 if what == "decode" else small.blocks // 2), streams)
    plain = new_run(tmp_path / "plain", TWO)
    assert roomy.train(new_run(tmp_path / "roomy", TWO)) == small.train(new_run(tmp_path / "small", TWO)) == "done"
    assert train(without_previews(plain, tmp_path / "without")) == "done"
    assert len(roomy.training.learners) == 2
    assert all(torch.equal(a, b) for a, b in zip(small.frames, roomy.frames, strict=True))
    assert len(small.frames) == 2
    assert loras(tmp_path / "small") == loras(tmp_path / "roomy") == loras(tmp_path / "without")


def test_an_expert_that_comes_half_way_is_fetched_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The device is full while weights are copied to it, for a preview and for the step after one."""
    entered = Residency.enter
    full = iter([True, False, False, True])

    def enter(self: Residency) -> None:
        entered(self)
        if next(full, False):
            raise torch.OutOfMemoryError(FULL)

    small = Device(lambda what, held, tile: what == "decode" and held > 0)
    run = new_run(tmp_path / "small")
    with monkeypatch.context() as patch:
        patch.setattr(Residency, "enter", enter)
        assert small.train(run) == "done"
    assert train(without_previews(run, tmp_path / "without")) == "done"
    assert next(full, None) is None
    assert loras(tmp_path / "small") == loras(tmp_path / "without")


def test_another_error_of_a_preview_is_not_taken_for_a_full_device(tmp_path: Path) -> None:
    def wrong(what: str, held: int, tile: int | None) -> bool:
        raise ValueError("something else")

    with pytest.raises(ValueError, match="something else"):
        Device(wrong).train(new_run(tmp_path))
