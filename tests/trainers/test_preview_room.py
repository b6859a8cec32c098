"""Previews on a device that training fills: each gets room, and what is trained does not know of it."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import tiny_families
import torch
from tiny_families import tiny_job_of, write_native

from trainers import previews, shortage, trainer
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


@pytest.fixture(scope="module", autouse=True)
def deep_and_small_tiles() -> Iterator[None]:
    """Enough blocks for fewer to be kept; tiles that are smaller than a small video."""
    shallow = tiny_families.tiny_config
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny_families, "tiny_config", lambda family, variant: {**shallow(family, variant), "num_layers": 4})
        patch.setattr("trainers.tiles.SIDES", (32, 16))
        yield


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


@dataclass(frozen=True)
class Reference:
    """What a device with room for everything makes."""

    tried: list[tuple[str, int, int | None]]
    frames: list[torch.Tensor]
    loras: list[bytes]

    @classmethod
    def of(cls, folder: Path, variant: Variant) -> Reference:
        """Checked: the LoRA is that of a training without previews."""
        roomy, run = Device(), new_run(folder / "roomy", variant)
        assert roomy.train(run) == train(without_previews(run, folder / "without")) == "done"
        found = cls(roomy.tried, roomy.frames, loras(folder / "roomy"))
        assert len(found.frames) == 2
        assert found.loras == loras(folder / "without")
        return found

    def is_made_by(self, device: Device, folder: Path) -> bool:
        return loras(folder) == self.loras and all(torch.equal(a, b) for a, b in zip(device.frames, self.frames, strict=True))


@pytest.fixture(scope="module")
def reference(deep_and_small_tiles: None, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return Reference.of(tmp_path_factory.mktemp("one"), ONE)


@pytest.mark.parametrize("streams", [False, True])
def test_decoding_without_the_transformer_is_the_same_preview_and_the_same_training(
    tmp_path: Path, reference: Reference, streams: bool
) -> None:
    small, run = Device(lambda what, held, tile: what == "decode" and held > 0, streams), new_run(tmp_path)
    assert small.train(run) == "done"
    assert [(what, held > 0) for what, held, _ in reference.tried] == [("sample", True), ("decode", True)] * 2
    assert [(what, held > 0) for what, held, _ in small.tried] == [
        ("sample", True),
        ("decode", True),
        ("decode", False),
        ("sample", True),
        ("decode", False),
    ], "what was found for the first preview is known for the second"
    assert all(vae() is None for vae in small.vaes), "nothing of a VAE is left, whether it decoded or not"
    assert "tile_pixels" not in samples(run)[-1]
    assert reference.is_made_by(small, tmp_path)


def test_tiles_come_when_nothing_else_helps_and_are_told(tmp_path: Path, reference: Reference) -> None:
    small, run = Device(lambda what, held, tile: what == "decode" and (held > 0 or tile != 16 // 8)), new_run(tmp_path)
    assert small.train(run) == "done"
    assert [tile for what, _, tile in small.tried if what == "decode"] == [None, None, 4, 2, 2]
    told = [event for event in samples(run) if event["files"]]
    assert [event["tile_pixels"] for event in told] == [16, 16]
    assert "decoded in tiles of 16 pixels" in _news(told[0])
    assert (run.samples_folder / "step-000002-0.mp4").exists()
    for found, wanted in zip(small.frames, reference.frames, strict=True):
        assert found.shape == wanted.shape
        assert 0 < (found.float() - wanted.float()).abs().mean() < 0.35 * wanted.float().std(), "of noise, which latents here are"
    assert loras(tmp_path) == reference.loras


def test_sampling_takes_blocks_from_the_device_and_gives_them_back(tmp_path: Path, reference: Reference) -> None:
    """Inputs of blocks are left where they are: sampling keeps none."""
    small, run = Device(lambda what, held, tile: what == "sample" and held > small.blocks // 2), new_run(tmp_path)
    assert small.train(run) == "done"
    tried = [held for what, held, _ in small.tried if what == "sample"]
    assert tried[0] == small.blocks, "as in training"
    assert tried[:-1] == sorted(set(tried[:-1]), reverse=True)
    assert tried[-1] == tried[-2] <= small.blocks // 2, "the second preview begins where the first one ended"
    assert [held for what, held, _ in small.tried if what == "decode"] == [0, 0], "its blocks have left already"
    assert small.training.learners[0].residency.arrangement == small.arrangement
    (told,) = [event["message"] for event in samples(run) if "while previews are sampled" in event.get("message", "")]
    assert "of 4 blocks stay on the device; training keeps them as before" in told
    assert reference.is_made_by(small, tmp_path)


def test_nothing_is_tried_twice(tmp_path: Path) -> None:
    """What left the device for sampling need not leave it for decoding."""
    small, run = Device(lambda what, held, tile: held > small.blocks // 2 if what == "sample" else tile is None), new_run(tmp_path)
    assert small.train(run) == "done"
    assert [tile for what, _, tile in small.tried if what == "decode"] == [None, 4, 4], "in latents"


def test_as_much_is_used_again_once_the_gpu_is_free_again(tmp_path: Path, reference: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another program took the GPU for a second, and previews were decoded without the transformer, or in tiles, to the run's end."""
    monkeypatch.setattr(shortage, "GOOD_STEPS", 2)
    taken = iter([True])
    small, run = Device(lambda what, held, tile: what == "decode" and next(taken, False)), new_run(tmp_path)
    assert small.train(run) == "done"
    assert [held > 0 for what, held, _ in small.tried if what == "decode"] == [True, False, True]
    (event,) = [event for event in samples(run) if "as before it ran out" in event.get("message", "")]
    assert event["step"] == 2
    assert reference.is_made_by(small, tmp_path)


@pytest.mark.parametrize(
    ("where", "told"),
    [
        ("sample", "not even with as few blocks on the device as there can be"),
        ("decode", "not even without the transformer and in tiles of 16 pixels"),
    ],
)
def test_the_last_resort_is_to_tell_that_there_is_none(tmp_path: Path, reference: Reference, where: str, told: str) -> None:
    small, run = Device(lambda what, held, tile: what == where), new_run(tmp_path)
    assert small.train(run) == "done"
    messages = [event["message"] for event in samples(run)]
    assert [message.split()[0] for message in messages] == ["sampling", "no"] * 2
    assert f"no memory for a preview of 1 frames of 48x48, {told}; training goes on without it" in messages
    assert loras(tmp_path) == reference.loras


def test_two_experts(tmp_path: Path) -> None:
    """Whichever is there leaves; the turn after a preview brings its own back."""
    both = Reference.of(tmp_path / "reference", TWO)
    for streams in (False, True):
        folder = tmp_path / str(streams)
        small = Device(lambda what, held, tile: held > (0 if what == "decode" else small.blocks // 2), streams)  # noqa: B023
        assert small.train(new_run(folder, TWO)) == "done"
        assert len(small.training.learners) == len(both.loras) == 2
        assert [what for what, *_ in small.tried].count("decode") == (2 if not streams else 3)
        assert both.is_made_by(small, folder)


def test_weights_that_come_half_way_are_fetched_anew(tmp_path: Path, reference: Reference) -> None:
    """The device is full while they are copied to it: for a preview, and for the step after one."""
    entered, full, calls = Residency.enter, {0, 2}, itertools.count()

    def enter(self: Residency) -> None:
        entered(self)
        if next(calls) in full:
            raise torch.OutOfMemoryError(FULL)

    small, run = Device(lambda what, held, tile: what == "decode" and held > 0), new_run(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Residency, "enter", enter)
        assert small.train(run) == "done"
    assert next(calls) > max(full)
    assert ["Out of GPU memory at step 1" in event["message"] for event in run.read_events() if event["event"] == "memory"] == [True]
    assert reference.is_made_by(small, tmp_path)


def test_another_error_of_a_preview_is_not_taken_for_a_full_device(tmp_path: Path) -> None:
    def wrong(what: str, held: int, tile: int | None) -> bool:
        raise ValueError("something else")

    with pytest.raises(ValueError, match="something else"):
        Device(wrong).train(new_run(tmp_path))
