"""`encode_dataset` with an encoder that costs nothing: what is encoded, what is kept, what is rejected."""

from __future__ import annotations

import errno
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from clip_files import numbered, write_caption, write_image, write_video

from trainers import encoding
from trainers.data.buckets import Geometry, plan_windows
from trainers.data.cache import Cache
from trainers.data.encoded import Encoded
from trainers.data.scan import Dataset, scan_folder
from trainers.encoders import (
    Cancelled,
    EncodeReport,
    all_shots_cached,
    all_texts_cached,
    dataset_shots,
    encode_dataset,
    encode_prompts,
    needed_texts,
)
from trainers.encoding import VAE_KINDS
from trainers.errors import DatasetError, MissingPackage
from trainers.family import LatentSpec, TextRecord

SPEC = LatentSpec(16, 4, 8, 16, 16.0, (0.0,) * 16, (1.0,) * 16)
GEOMETRY = Geometry(64, 48, 9)


class AverageEncoder:
    """Latents are the mean colour of each frame's first pixels, text is the length of the prompt."""

    family_id, variant_id, latent, negative = "wan", "wan2.1-t2v", SPEC, "ugly"
    identity_vae, identity_text, identity_image = "vae 1", "text 1", "image 1"
    required = frozenset({"latents"})

    def __init__(self) -> None:
        self.videos: list[torch.Tensor] = []
        self.prompts: list[str] = []

    def encode_video(self, pixels_BCFHW: torch.Tensor) -> torch.Tensor:
        self.videos.append(pixels_BCFHW)
        channels, *sizes = SPEC.shape(*pixels_BCFHW.shape[2:])
        return torch.nn.functional.interpolate(pixels_BCFHW, sizes).mean(1, keepdim=True).expand(-1, channels, -1, -1, -1)

    def encode_text(self, prompts: Sequence[str], image_HWC: torch.Tensor | None = None) -> list[TextRecord]:
        self.prompts.extend(prompts)
        return [TextRecord(torch.full((len(prompt) + 1, 4), float(len(prompt)))) for prompt in prompts]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    for index in range(4):
        frames = [numbered(frame + 10 * index) for frame in range(24)]
        write_caption(write_video(folder / f"{index}.mp4", frames, 16), f"clip {index % 3}")
    write_caption(write_image(folder / "still.png", numbered(50)), "still")
    return folder


@pytest.fixture
def clips(source: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(source, tmp_path / "clips"))


def encode(clips: Path | Dataset, encoder: AverageEncoder, geometry: Geometry = GEOMETRY, **options: object) -> EncodeReport:
    dataset = clips if isinstance(clips, Dataset) else scan_folder(clips, held_out=0.3)
    root = Path(dataset.clips[0].path).parents[1]
    return encode_dataset(dataset, geometry, encoder, root / "out", **options)  # type: ignore[arg-type]


def counts(report: EncodeReport) -> tuple[int, int, int, int]:
    return report.latents_new, report.latents_cached, report.texts_new, report.texts_cached


def test_everything_is_encoded_once_and_can_be_read(clips: Path):
    encoder = AverageEncoder()
    report = encode(clips, encoder, prompts=["a preview", "clip 1", ""])
    assert counts(report) == (5, 0, 7, 0)
    assert report.rejected == ()
    assert sorted(encoder.prompts) == ["", "a preview", "clip 0", "clip 1", "clip 2", "still", "ugly"]
    assert report.encoded is not None
    encoded = Encoded.open(report.encoded.folder)
    assert encoded == report.encoded
    assert encoded.problems() == []
    assert (encoded.family, encoded.variant, set(encoded.prompts)) == ("wan", "wan2.1-t2v", {"", "ugly", "a preview", "clip 1"})
    assert [(item.source, item.caption, item.num_frames) for item in encoded.items] == [
        ("0.mp4", "clip 0", 9),
        ("1.mp4", "clip 1", 9),
        ("2.mp4", "clip 2", 9),
        ("3.mp4", "clip 0", 9),
        ("still.png", "still", 1),
    ]
    assert 1 <= sum(item.held_out for item in encoded.items) <= 4
    for item in encoded.items:
        assert encoded.latents_CFHW(item).shape == SPEC.shape(item.num_frames, item.height, item.width)
        assert encoded.text(item.text).embeds_LD.shape[0] == len(item.caption) + 1


def test_the_encoder_gets_the_right_pixels(clips: Path):
    encoder = AverageEncoder()
    encode(clips, encoder)
    for index, pixels in enumerate(encoder.videos[:4]):
        assert pixels.shape == (1, 3, 9, 48, 64)
        assert pixels.dtype is torch.float32
        greys = [(4 * (frame + 10 * index) + 8) / 127.5 - 1 for frame in range(9)]
        assert torch.allclose(pixels.mean((0, 1, 3, 4)), torch.tensor(greys), atol=0.01)


def test_a_second_run_encodes_nothing_and_writes_the_same(clips: Path):
    encode(clips, AverageEncoder())
    written = (clips.parent / "out/encoded.json").read_bytes()
    encoder = AverageEncoder()
    assert counts(encode(clips, encoder)) == (0, 5, 0, 6)
    assert (encoder.videos, encoder.prompts) == ([], [])
    assert (clips.parent / "out/encoded.json").read_bytes() == written


def test_a_changed_caption_costs_one_text(clips: Path):
    encode(clips, AverageEncoder())
    write_caption(clips / "1.mp4", "another")
    encoder = AverageEncoder()
    assert counts(encode(clips, encoder)) == (0, 5, 1, 5)
    assert encoder.prompts == ["another"]


def test_a_changed_clip_costs_one_latent_and_a_moved_or_touched_one_nothing(clips: Path):
    encode(clips, AverageEncoder())
    write_video(clips / "1.mp4", [numbered(60)] * 24, 16)
    (clips / "2.mp4").rename(clips / "renamed.mp4")
    (clips / "2.txt").rename(clips / "renamed.txt")
    os.utime(clips / "3.mp4", (1, 1))
    assert counts(encode(clips, AverageEncoder())) == (1, 4, 0, 6)


def test_a_changed_vae_costs_all_latents_and_a_changed_text_encoder_all_texts(clips: Path):
    encode(clips, AverageEncoder())
    encoder = AverageEncoder()
    encoder.identity_vae = "vae 2"
    assert counts(encode(clips, encoder)) == (5, 0, 0, 6)
    encoder.identity_text = "text 2"
    assert counts(encode(clips, encoder)) == (0, 5, 6, 0)


def test_another_window_is_another_latent(clips: Path):
    encode(clips, AverageEncoder())
    assert counts(encode(clips, AverageEncoder(), replace(GEOMETRY, num_frames=5)))[:2] == (4, 1)
    assert counts(encode(clips, AverageEncoder(), replace(GEOMETRY, fps=8.0)))[:2] == (4, 1)
    assert counts(encode(clips, AverageEncoder(), replace(GEOMETRY, width=96, height=64)))[:2] == (5, 0)


def test_equal_files_share_one_latent_and_a_shared_cache_serves_all(clips: Path, tmp_path: Path):
    shutil.copy(clips / "0.mp4", clips / "copy.mp4")
    write_caption(clips / "copy.mp4", "copied")
    cache = Cache(tmp_path / "shared")
    assert counts(encode(clips, AverageEncoder(), cache=cache)) == (5, 1, 7, 0)
    assert not (tmp_path / "out/cache").exists()
    shutil.rmtree(tmp_path / "out")
    assert counts(encode(clips, AverageEncoder(), cache=Cache(tmp_path / "shared"))) == (0, 6, 0, 7)


def test_cancelling_keeps_what_is_done_and_the_last_content(clips: Path):
    first = encode(scan_folder(clips), AverageEncoder(), replace(GEOMETRY, num_frames=5)).encoded
    encoder = AverageEncoder()
    report = encode(clips, encoder, cancelled=lambda: len(encoder.videos) == 2)
    assert (report.encoded, report.latents_new) == (None, 2)
    assert "cancelled" in str(report)
    assert Encoded.open(clips.parent / "out") == first
    assert threading.active_count() == 1 or not [thread for thread in threading.enumerate() if thread.name.startswith("decode")]
    assert counts(encode(clips, AverageEncoder())) == (2, 3, 0, 6)


def test_an_error_in_the_progress_callback_stops_the_decoding_too(clips: Path):
    def stop(done: int, total: int, what: str) -> None:
        if what == "encoding clips":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encode(clips, AverageEncoder(), progress=stop)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("decode")]
    assert counts(encode(clips, AverageEncoder()))[:2] == (4, 1)


def test_a_clip_that_cannot_be_read_any_more_is_rejected_and_the_rest_goes_on(clips: Path):
    dataset = scan_folder(clips)
    (clips / "1.mp4").unlink()
    (clips / "2.mp4").write_bytes((clips / "2.mp4").read_bytes()[:700])
    report = encode(dataset, AverageEncoder())
    assert report.encoded is not None
    assert [item.source for item in report.encoded.items] == ["0.mp4", "3.mp4", "still.png"]
    assert [(item.name, item.reason.split(" (")[0]) for item in report.rejected] == [
        ("1.mp4", "it cannot be read"),
        ("2.mp4", "it cannot be decoded"),
    ]


def test_when_no_clip_can_be_used_the_last_content_stays(clips: Path):
    first = encode(clips, AverageEncoder()).encoded
    dataset = scan_folder(clips)
    for path in clips.glob("*.[mp]*"):
        path.unlink()
    with pytest.raises(DatasetError, match="No clip could be encoded"):
        encode(dataset, AverageEncoder())
    assert Encoded.open(clips.parent / "out") == first


def test_an_encoder_that_fails_on_a_clip_is_told(clips: Path):
    class Broken(AverageEncoder):
        def encode_video(self, pixels_BCFHW: torch.Tensor) -> torch.Tensor:
            latents = super().encode_video(pixels_BCFHW)
            if len(self.videos) == 1:
                return latents * float("nan")
            if len(self.videos) == 2:
                raise torch.OutOfMemoryError("no memory")
            return latents

    reasons = [item.reason for item in encode(clips, Broken()).rejected]
    assert [reason.split(";")[0] for reason in reasons] == ["its latents are not finite", "no memory for 9 frames of 64 x 48"]


FAILURES = [ZeroDivisionError("division by zero"), cv2.error("bad"), RuntimeError("bad"), KeyError("side")]
NO_MEMORY = [MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")]


@pytest.mark.parametrize("where", ["decoding", "encoding"])
@pytest.mark.parametrize("error", [*FAILURES, *NO_MEMORY], ids=lambda error: type(error).__name__)
def test_one_bad_file_never_stops_the_rest(clips: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, where: str):
    with fails_once(monkeypatch, where, error) as encoder:
        report = encode(clips, encoder)
    assert report.encoded is not None
    assert [item.source for item in report.encoded.items] == ["1.mp4", "2.mp4", "3.mp4", "still.png"]
    expected = "no memory for 9 frames of 64 x 48" if error in NO_MEMORY else f"it cannot be read ({type(error).__name__}: "
    assert [item.name for item in report.rejected] == ["0.mp4"]
    assert report.rejected[0].reason.startswith(expected)


@pytest.mark.parametrize("error", [MissingPackage("pip install it"), OSError(errno.ENOSPC, "No space left on device")], ids=repr)
def test_what_every_file_would_meet_ends_the_work(clips: Path, monkeypatch: pytest.MonkeyPatch, error: Exception):
    with fails_once(monkeypatch, "decoding", error) as encoder, pytest.raises(type(error)):
        encode(clips, encoder)
    monkeypatch.setattr(Cache, "write_latents", raising(error))
    with pytest.raises(type(error)):
        encode(clips, AverageEncoder())


@contextmanager
def fails_once(monkeypatch: pytest.MonkeyPatch, where: str, error: Exception) -> Iterator[AverageEncoder]:
    """An encoder; it, or the decoding, raises `error` for the first clip."""
    encoder = AverageEncoder()
    errors = iter([error])

    def once(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            if error := next(errors, None):
                raise error
            return real(*arguments)

        return call

    with monkeypatch.context() as patch:
        if where == "decoding":
            patch.setattr(encoding, "read_window", once(encoding.read_window))
        else:
            patch.setattr(encoder, "encode_video", once(encoder.encode_video))
        yield encoder


def raising(error: Exception) -> Callable[..., None]:
    def call(*_: object) -> None:
        raise error

    return call


def test_latents_of_another_shape_never_reach_the_cache(clips: Path, tmp_path: Path):
    class Cut(AverageEncoder):
        def encode_video(self, pixels_BCFHW: torch.Tensor) -> torch.Tensor:
            return super().encode_video(pixels_BCFHW)[:, :, :2]

    with pytest.raises(AssertionError, match="not \\(16, 3, 6, 8\\)"):
        encode(clips, Cut())
    assert not list((tmp_path / "out").rglob("latents"))


def test_the_geometry_is_checked_before_anything_is_encoded(clips: Path):
    encoder = AverageEncoder()
    with pytest.raises(DatasetError, match="num_frames is 8"):
        encode(clips, encoder, Geometry(64, 48, 8))
    assert encoder.prompts == []


def test_frames_are_decoded_ahead_but_not_far(clips: Path, monkeypatch: pytest.MonkeyPatch):
    decoded: list[str] = []
    read = encoding.read_window

    def counted(path: Path, *arguments: object) -> np.ndarray:
        decoded.append(threading.current_thread().name)
        return read(path, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(encoding, "read_window", counted)
    ahead = []

    class Slow(AverageEncoder):
        def encode_video(self, pixels_BCFHW: torch.Tensor) -> torch.Tensor:
            time.sleep(0.1)
            latents = super().encode_video(pixels_BCFHW)
            ahead.append(len(decoded) - len(self.videos))
            return latents

    encode(clips, Slow(), Geometry(64, 48, 5, clip_mode="all"))
    assert len(ahead) > 9
    assert max(ahead) == 2
    assert not any(name.startswith("MainThread") for name in decoded)


def is_cached(dataset: Dataset, geometry: Geometry, folder: Path, vae: str = "vae 1", text: str = "text 1") -> tuple[bool, bool]:
    """Whether (latents, texts) need no model."""
    plan, cache = plan_windows(dataset, geometry, SPEC), Cache(folder / "out" / "cache")
    encoder = AverageEncoder()
    encoder.identity_vae = vae
    latents = all_shots_cached(dataset_shots(encoder, plan), VAE_KINDS, encoder, cache)
    return latents, all_texts_cached(needed_texts(encoder, (), plan), text, cache)


def test_what_is_cached_is_known_without_an_encoder(clips: Path):
    dataset, folder = scan_folder(clips), clips.parent
    assert is_cached(dataset, GEOMETRY, folder) == (False, False)
    encode(dataset, AverageEncoder())
    assert is_cached(dataset, GEOMETRY, folder) == (True, True)
    assert is_cached(dataset, replace(GEOMETRY, num_frames=5), folder) == (False, True)
    assert is_cached(dataset, GEOMETRY, folder, vae="another") == (False, True)
    assert is_cached(dataset, GEOMETRY, folder, text="another") == (True, False)


def test_a_changed_clip_or_caption_is_not_cached(clips: Path):
    encode(clips, AverageEncoder())
    (clips / "0.txt").write_text("another caption")
    assert is_cached(scan_folder(clips), GEOMETRY, clips.parent) == (True, False)
    write_video(clips / "1.mp4", [numbered(7)] * 24, 16)
    assert is_cached(scan_folder(clips), GEOMETRY, clips.parent) == (False, False)
    dataset = scan_folder(clips)
    (clips / "1.mp4").unlink()  # it will be rejected, so no model is needed for it
    assert is_cached(dataset, GEOMETRY, clips.parent)[0]


def test_prompts_alone(tmp_path: Path):
    encoder, cache = AverageEncoder(), Cache(tmp_path)
    encoded = encode_prompts(["one", "two", "one"], encoder, cache)
    assert encoded is not None
    keys, images = encoded
    assert images == ()
    assert keys == {prompt: Cache.text_key(prompt, "text 1") for prompt in ("", "ugly", "one", "two")}
    assert all(cache.has_text(key) for key in keys.values())
    assert encode_prompts(["two"], AverageEncoder(), cache, cancelled=lambda: True) is not None, "nothing is to be done"
    assert encode_prompts(["three"], AverageEncoder(), cache, cancelled=lambda: True) is None


def test_an_encoder_that_is_cancelled_in_the_middle_of_a_window_ends_the_run(clips: Path):
    class Interrupted(AverageEncoder):
        def encode_video(self, pixels_BCFHW: torch.Tensor) -> torch.Tensor:
            if self.videos:
                raise Cancelled
            return super().encode_video(pixels_BCFHW)

    report = encode(clips, Interrupted())
    assert report.encoded is None
    assert (report.latents_new, report.rejected) == (1, ())
    assert counts(encode(clips, AverageEncoder()))[:2] == (4, 1)
