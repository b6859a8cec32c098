"""From clips and captions to the encoded data set that a job trains on.

Only what the cache lacks is encoded, and a model that has nothing to encode is never loaded. Text comes first, then video,
so that one model is in memory at a time; frames are decoded in a thread while the model works on the window before.

Shape suffixes: B batch, C channels, F frames, H and W pixels (or latent height and width), L text tokens, D text width.
"""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch

from .data.buckets import Geometry, Plan, Window, plan_windows
from .data.cache import Cache
from .data.captions import shown
from .data.encoded import Encoded, EncodedItem
from .data.scan import NOT_ABOUT_THE_FILE, Dataset, Progress, Rejected, unexpected
from .data.video import read_window
from .errors import DatasetError, MissingPackage, Problem
from .family import LatentSpec, TextRecord

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class Cancelled(Exception):
    """The user asked to stop. An encoder may raise it too, in the middle of a window."""


_NOT_ABOUT_THE_FILE: tuple[type[Exception], ...] = (*NOT_ABOUT_THE_FILE, Cancelled, getattr(torch, "AcceleratorError", MissingPackage))
"""The last (torch >= 2.8): a device that has failed fails for every file after."""

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)

_AHEAD = 2
"""Windows decoded while the model works; each is held as bytes at its final size."""


class Encoder(Protocol):
    """What turns pixels and prompts into what the transformer sees: a diffusers folder here, ComfyUI's objects there.

    The identities change when, and only when, the same input would give another output. Asking for them loads nothing.
    """

    family_id: str
    variant_id: str
    latent: LatentSpec
    negative: str
    """The negative prompt that sampling uses by default."""

    @property
    def identity_vae(self) -> str: ...

    @property
    def identity_text(self) -> str: ...

    def encode_video(self, pixels_BCFHW: torch.Tensor) -> torch.Tensor:
        """Normalised float32 latents_BCFHW on the CPU, of pixels in [-1, 1]."""

    def encode_text(self, prompts: Sequence[str]) -> list[TextRecord]:
        """One unpadded record for each prompt, on the CPU."""


@dataclass(frozen=True)
class EncodeReport:
    """What an `encode` did. `encoded` is None when it was cancelled: the cache keeps what was done, nothing else changed."""

    encoded: Encoded | None
    latents_new: int
    latents_cached: int
    texts_new: int
    texts_cached: int
    rejected: tuple[Rejected, ...]

    def __str__(self) -> str:
        done = f"clips: {self.latents_new} encoded, {self.latents_cached} already there; "
        done += f"texts: {self.texts_new} encoded, {self.texts_cached} already there"
        return done if self.encoded else f"cancelled; {done}"


def encode_dataset(
    dataset: Dataset,
    geometry: Geometry,
    encoder: Encoder,
    folder: Path | str,
    *,
    prompts: Sequence[str] = (),
    cache: Cache | None = None,
    progress: Progress | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> EncodeReport:
    """Encode what the cache lacks and write `<folder>/encoded.json`.

    `prompts` are texts that no clip has, such as those of previews; "" and the encoder's negative prompt are always among
    them. `cache`: `<folder>/cache` by default. A clip that cannot be decoded is rejected with its reason and the rest goes on.
    `cancelled` is asked before each window and text.

    Raises DatasetError when the geometry breaks the model's rules or no clip can be used.
    """
    plan = plan_windows(dataset, geometry, encoder.latent)
    folder = Path(folder).expanduser().absolute()
    work = _Work(encoder, cache or Cache(folder / "cache"), progress, cancelled)
    asked = needed_texts(encoder.negative, prompts)
    try:
        texts = work.encode_texts(needed_texts(encoder.negative, prompts, plan))
        items = tuple(work.encode_windows(plan.windows, texts))
    except Cancelled:
        return work.report(None, plan.rejected)
    if not items:
        raise DatasetError([item.problem for item in work.rejected[:20]], subject="No clip could be encoded")
    keys = {prompt: texts[prompt] for prompt in asked}
    encoded = Encoded(folder, encoder.family_id, encoder.variant_id, items, keys, work.cache)
    encoded.save()
    return work.report(encoded, plan.rejected)


def encode_prompts(
    prompts: Sequence[str],
    encoder: Encoder,
    cache: Cache,
    progress: Progress | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> dict[str, str] | None:
    """{prompt: its key}, all of them cached, with "" and the encoder's negative prompt; None when it was cancelled."""
    try:
        return _Work(encoder, cache, progress, cancelled).encode_texts(needed_texts(encoder.negative, prompts))
    except Cancelled:
        return None


def needed_texts(negative: str, prompts: Sequence[str], plan: Plan | None = None) -> tuple[str, ...]:
    """What is encoded as text, each once: "", the negative prompt, `prompts`, and the captions of the planned windows."""
    captions = [window.clip.caption for window in plan.windows] if plan else []
    return tuple(dict.fromkeys(("", negative, *prompts, *captions)))


def all_texts_cached(prompts: Sequence[str], identity_text: str, cache: Cache) -> bool:
    """Whether no text encoder is needed for these texts."""
    return all(cache.has_text(Cache.text_key(prompt, identity_text)) for prompt in prompts)


def all_latents_cached(plan: Plan, identity_vae: str, cache: Cache) -> bool:
    """Whether no VAE is needed for these windows. Reads clips that were never read, to know their content."""

    def is_cached(window: Window) -> bool:
        try:
            return cache.has_latents(_latents_key(window, identity_vae, cache))
        except OSError:
            return True  # a clip that cannot be read will be rejected: nothing of it is encoded

    return all(is_cached(window) for window in plan.windows)


@dataclass(frozen=True)
class _Decoded:
    """A window with its key, and its frames if the cache lacks its latents."""

    key: str
    frames_FHWC: NDArray[np.uint8] | None


class _Work:
    """One run of `encode_dataset`, with its counts."""

    def __init__(self, encoder: Encoder, cache: Cache, progress: Progress | None, cancelled: Callable[[], bool] | None) -> None:
        self.encoder = encoder
        self.cache = cache
        self.rejected: list[Rejected] = []
        self._progress = progress or (lambda *_: None)
        self._cancelled = cancelled or (lambda: False)
        self._new = {"latents": 0, "texts": 0}
        self._there = {"latents": 0, "texts": 0}

    def encode_texts(self, prompts: Sequence[str]) -> dict[str, str]:
        """{prompt: its key}, all of them cached."""
        keys = {prompt: Cache.text_key(prompt, self.encoder.identity_text) for prompt in prompts}
        missing = [prompt for prompt, key in keys.items() if not self.cache.has_text(key)]
        self._there["texts"] = len(keys) - len(missing)
        for done, prompt in enumerate(missing):
            self._stop_if_asked()
            self.cache.write_text(keys[prompt], _checked_text(self.encoder.encode_text([prompt])[0], prompt))
            self._new["texts"] += 1
            self._progress(done + 1, len(missing), "encoding captions")
        return keys

    def encode_windows(self, windows: Sequence[Window], texts: dict[str, str]) -> Iterator[EncodedItem]:
        """An item for every window that can be decoded, its latents cached."""
        identity = self.encoder.identity_vae
        with closing(_ahead(lambda window: self._decode(window, identity), windows)) as ahead:
            for done, (window, decoded) in enumerate(ahead):
                self._stop_if_asked()
                if key := self._latents(window, decoded):
                    yield _item(window, key, texts[window.clip.caption])
                self._progress(done + 1, len(windows), "encoding clips")

    def report(self, encoded: Encoded | None, rejected: tuple[Rejected, ...]) -> EncodeReport:
        there, new = self._there, self._new
        return EncodeReport(encoded, new["latents"], there["latents"], new["texts"], there["texts"], (*rejected, *self.rejected))

    def _stop_if_asked(self) -> None:
        if self._cancelled():
            raise Cancelled

    def _decode(self, window: Window, identity: str) -> _Decoded:
        """Runs in the thread."""
        key = _latents_key(window, identity, self.cache)
        if self.cache.has_latents(key):
            return _Decoded(key, None)
        size = window.height, window.width
        return _Decoded(key, read_window(Path(window.clip.path), window.start_seconds, window.num_frames, window.fps, size))

    def _latents(self, window: Window, future: Future[_Decoded]) -> str | None:
        """The key of the window's latents, which are cached; None when the window was rejected."""
        try:
            decoded = future.result()
            latents_CFHW = self._encode(window, decoded)
        except _NOT_ABOUT_THE_FILE:
            raise
        except Exception as error:  # decoders and models fail in many ways, and one bad file never stops the rest
            if isinstance(error, OSError) and error.errno in _NO_ROOM:
                raise
            self.rejected.append(Rejected(shown(window.clip.name), _problem(error, window)))
            return None
        if latents_CFHW is None:
            self._there["latents"] += 1
        else:
            self.cache.write_latents(decoded.key, latents_CFHW)
            self._new["latents"] += 1
        return decoded.key

    def _encode(self, window: Window, decoded: _Decoded) -> torch.Tensor | None:
        """The window's latents_CFHW; None when they are cached."""
        if decoded.frames_FHWC is None or self.cache.has_latents(decoded.key):
            return None
        latents_BCFHW = self.encoder.encode_video(pixels_from_frames(decoded.frames_FHWC))
        return _checked_latents(latents_BCFHW[0], window, self.encoder.latent)


def _latents_key(window: Window, identity_vae: str, cache: Cache) -> str:
    """The key of a window's latents. Raises OSError when its file cannot be read."""
    fps = 0.0 if window.clip.kind == "image" else window.fps  # a still is the same at every rate
    file_hash = cache.file_hash(Path(window.clip.path))
    return Cache.latents_key(file_hash, window.start_seconds, window.num_frames, fps, window.height, window.width, identity_vae)


def pixels_from_frames(frames_FHWC: NDArray[np.uint8]) -> torch.Tensor:
    """float32 pixels_BCFHW in [-1, 1] (B = 1) of uint8 frames."""
    pixels_CFHW = torch.from_numpy(frames_FHWC).permute(3, 0, 1, 2)
    return (pixels_CFHW.float() / 127.5 - 1.0).unsqueeze(0)


def _ahead(decode: Callable[[Window], _Decoded], windows: Sequence[Window]) -> Generator[tuple[Window, Future[_Decoded]], None, None]:
    """Each window with its decoding, which a thread has begun while the ones before are used."""
    pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="decode")
    started: deque[tuple[Window, Future[_Decoded]]] = deque()
    try:
        for window in windows:
            started.append((window, pool.submit(decode, window)))
            if len(started) > _AHEAD:
                yield started.popleft()
        while started:
            yield started.popleft()
    finally:
        pool.shutdown(cancel_futures=True)


def _item(window: Window, latents_key: str, text_key: str) -> EncodedItem:
    clip = window.clip
    return EncodedItem(
        latents=latents_key,
        text=text_key,
        caption=clip.caption,
        source=clip.name,
        start_seconds=window.start_seconds,
        num_frames=window.num_frames,
        height=window.height,
        width=window.width,
        fps=window.fps,
        repeats=clip.repeats,
        held_out=clip.held_out,
    )


def _problem(error: Exception, window: Window) -> Problem:
    """Why a window could not be encoded."""
    if isinstance(error, DatasetError):
        return error.problems[0]
    if isinstance(error, OSError):
        return Problem(f"it cannot be read ({error.strerror})", "files must stay while they are encoded", "Check the file.")
    if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "memory" not in str(error).lower():  # the CPU's is a RuntimeError
        return unexpected(error)
    value = f"no memory for {window.num_frames} frames of {window.width} x {window.height}"
    return Problem(value, "the VAE encodes a window at once", "Ask for fewer frames or a smaller size, or use --device cpu.")


def _checked_latents(latents_CFHW: torch.Tensor, window: Window, spec: LatentSpec) -> torch.Tensor:
    expected = spec.shape(window.num_frames, window.height, window.width)
    assert tuple(latents_CFHW.shape) == expected, f"the VAE gave {tuple(latents_CFHW.shape)}, not {expected}"
    if not latents_CFHW.isfinite().all():
        raise DatasetError(Problem("its latents are not finite", "training needs numbers", "Check the VAE: another file, or in float32."))
    return latents_CFHW


def _checked_text(record: TextRecord, prompt: str) -> TextRecord:
    if not record.embeds_LD.isfinite().all():
        value = f"the encoding of {shown(prompt)[:60]!r} is not finite"
        raise DatasetError(Problem(value, "training needs numbers", "Check the text encoder: another file, or in bfloat16."))
    return record
