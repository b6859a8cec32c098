"""What is made of the windows of clips: only what the cache lacks, with one kind of model after the other.

Captions with first frames come first, then first frames alone, then clips, so that one kind of model is in memory at a
time; frames are decoded in a thread while the model works on the window before.

Shape suffixes: B batch, C channels, F frames, H and W pixels (or latent height and width), L text tokens, D text width.
"""

from __future__ import annotations

import errno
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .data.buckets import Window
from .data.cache import Cache
from .data.captions import shown
from .data.scan import NOT_ABOUT_THE_FILE, Progress, Rejected, unexpected
from .data.video import read_window
from .errors import CheckpointError, DatasetError, MissingPackage, Problem
from .family import FIRST_FRAME, FIRST_FRAME_CLIP, IMAGE_EMBEDS, IMAGE_TEXT, LATENTS, LatentSpec, TextRecord

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from .encoders import Encoder

    Frames = NDArray[np.uint8]


class Cancelled(Exception):
    """The user asked to stop. An encoder may raise it too, in the middle of a window."""


_DEVICE_FAILED: type[Exception] = getattr(torch, "AcceleratorError", MissingPackage)
"""From torch 2.8 on; a device that has failed fails for every file after."""

_NOT_ABOUT_THE_FILE: tuple[type[Exception], ...] = (*NOT_ABOUT_THE_FILE, Cancelled, CheckpointError, _DEVICE_FAILED)

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)

_AHEAD = 2
"""Windows decoded while the model works; each is held as bytes at its final size."""

TEXT_KINDS, IMAGE_KINDS, VAE_KINDS = (
    frozenset({IMAGE_TEXT}),
    frozenset({IMAGE_EMBEDS}),
    frozenset({LATENTS, FIRST_FRAME, FIRST_FRAME_CLIP}),
)
"""What text encoders make (with a first frame), what an image encoder makes, what a VAE makes."""

_ORDER = (LATENTS, FIRST_FRAME, FIRST_FRAME_CLIP, IMAGE_EMBEDS, IMAGE_TEXT)
_PASSES = ((TEXT_KINDS, "encoding captions with first frames"), (IMAGE_KINDS, "encoding first frames"), (VAE_KINDS, "encoding clips"))


@dataclass(frozen=True)
class Shot:
    """A window and what is encoded of it: `kinds` as in `Family.required`; for IMAGE_TEXT these `texts`."""

    window: Window
    kinds: frozenset[str]
    texts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Entry:
    """A file of the cache: its kind, its key, and the text of one for IMAGE_TEXT."""

    kind: str
    key: str
    text: str = ""


def entries(shot: Shot, kinds: frozenset[str], encoder: Encoder, cache: Cache) -> list[Entry]:
    """What there is to be in the cache of a shot's `kinds`. Raises OSError when its file cannot be read.

    Only the identities that matter to these kinds are asked for.
    """
    window, file_hash = shot.window, cache.file_hash(Path(shot.window.clip.path))
    place = (file_hash, window.start_seconds, window.height, window.width)
    found = []
    for kind in (kind for kind in _ORDER if kind in shot.kinds & kinds):
        if kind == LATENTS:
            fps = 0.0 if window.clip.kind == "image" else window.fps  # a still is the same at every rate
            found.append(Entry(kind, _latents_key(window, file_hash, window.num_frames, fps, encoder)))
        elif kind == FIRST_FRAME:
            found.append(Entry(kind, _latents_key(window, file_hash, 1, 0.0, encoder)))
        elif kind == FIRST_FRAME_CLIP:
            found.append(Entry(kind, cache.first_frame_key(kind, *place, encoder.identity_vae, num_frames=window.num_frames)))
        elif kind == IMAGE_EMBEDS:
            found.append(Entry(kind, cache.first_frame_key(kind, *place, encoder.identity_image)))
        else:
            identity = f"{encoder.identity_text} {encoder.identity_image}"
            found += [Entry(kind, cache.first_frame_key(kind, *place, identity, prompt=text), text) for text in dict.fromkeys(shot.texts)]
    return found


def _latents_key(window: Window, file_hash: str, num_frames: int, fps: float, encoder: Encoder) -> str:
    return Cache.latents_key(file_hash, window.start_seconds, num_frames, fps, window.height, window.width, encoder.identity_vae)


@dataclass(frozen=True)
class _Decoded:
    """What there is to be of a shot, and its frames if the cache lacks any of it (the first alone when that is enough)."""

    entries: list[Entry]
    frames_FHWC: Frames | None


Keys = Mapping[tuple[str, str], str]
"""{(kind, text): key} of one shot."""


class Work:
    """One run of encoding, with its counts by kind: `new` was encoded now, `there` was in the cache."""

    def __init__(self, encoder: Encoder, cache: Cache, progress: Progress | None, cancelled: Callable[[], bool] | None) -> None:
        self.encoder = encoder
        self.cache = cache
        self.rejected: list[Rejected] = []
        self.new: Counter[str] = Counter()
        self.there: Counter[str] = Counter()
        self._progress = progress or (lambda *_: None)
        self._cancelled = cancelled or (lambda: False)

    def texts(self, prompts: Sequence[str]) -> dict[str, str]:
        """{prompt: its key}, all of them cached."""
        keys = {prompt: Cache.text_key(prompt, self.encoder.identity_text) for prompt in prompts}
        missing = [prompt for prompt, key in keys.items() if not self.cache.has_text(key)]
        self.there[IMAGE_TEXT] += len(keys) - len(missing)
        for done, prompt in enumerate(missing):
            self._stop_if_asked()
            self.cache.write_text(keys[prompt], _checked_text(self.encoder.encode_text([prompt])[0], prompt))
            self.new[IMAGE_TEXT] += 1
            self._progress(done + 1, len(missing), "encoding captions")
        return keys

    def shots(self, shots: Sequence[Shot]) -> list[Keys | None]:
        """The keys of each shot, all of them cached; None for one that was rejected."""
        found: list[Keys | None] = [{} for _ in shots]
        for kinds, told in _PASSES:
            wanted = [number for number, keys in enumerate(found) if keys is not None and shots[number].kinds & kinds]
            for number, keys in zip(wanted, self._pass([shots[number] for number in wanted], kinds, told), strict=True):
                found[number] = None if keys is None else {**(found[number] or {}), **keys}
        return found

    def _pass(self, shots: Sequence[Shot], kinds: frozenset[str], told: str) -> Iterator[Keys | None]:
        with closing(_ahead(lambda shot: self._decode(shot, kinds), shots)) as ahead:
            for done, (shot, decoded) in enumerate(ahead):
                self._stop_if_asked()
                yield self._keys(shot, decoded)
                self._progress(done + 1, len(shots), told)

    def _stop_if_asked(self) -> None:
        if self._cancelled():
            raise Cancelled

    def _decode(self, shot: Shot, kinds: frozenset[str]) -> _Decoded:
        """Runs in the thread."""
        window, wanted = shot.window, entries(shot, kinds, self.encoder, self.cache)
        missing = {entry.kind for entry in self._missing(wanted)}
        if not missing:
            return _Decoded(wanted, None)
        num_frames = window.num_frames if LATENTS in missing else 1
        size = window.height, window.width
        return _Decoded(wanted, read_window(Path(window.clip.path), window.start_seconds, num_frames, window.fps, size))

    def _missing(self, wanted: Sequence[Entry]) -> list[Entry]:
        """What the cache lacks, each file once."""
        return list({entry.key: entry for entry in reversed(wanted) if not self.cache.has(entry.kind, entry.key)}.values())

    def _keys(self, shot: Shot, future: Future[_Decoded]) -> Keys | None:
        """The keys of what a shot has in this pass, all of it cached; None when the shot was rejected."""
        try:
            decoded = future.result()
            missing = [] if decoded.frames_FHWC is None else self._missing(decoded.entries)
            made = self._made(shot.window, missing, decoded.frames_FHWC) if decoded.frames_FHWC is not None and missing else []
        except _NOT_ABOUT_THE_FILE:
            raise
        except Exception as error:  # decoders and models fail in many ways, and one bad file never stops the rest
            if isinstance(error, OSError) and error.errno in _NO_ROOM:
                raise
            self.rejected.append(Rejected(shown(shot.window.clip.name), _problem(error, shot.window)))
            return None
        for entry, value in made:
            self.cache.write(entry.kind, entry.key, value)
        self.new.update(entry.kind for entry in missing)
        self.there.update(entry.kind for entry in decoded.entries if entry not in missing)
        return {(entry.kind, entry.text): entry.key for entry in decoded.entries}

    def _made(self, window: Window, missing: Sequence[Entry], frames_FHWC: Frames) -> list[tuple[Entry, torch.Tensor | TextRecord]]:
        """What is missing, encoded."""
        made: list[tuple[Entry, torch.Tensor | TextRecord]] = []
        image_HWC = torch.from_numpy(frames_FHWC[0]).float() / 255
        for entry in missing:
            if entry.kind == IMAGE_EMBEDS:
                made.append((entry, _finite(self.encoder.encode_image(image_HWC), "its image embeds", "image encoder")))
            elif entry.kind in VAE_KINDS:
                latents_BCFHW = self.encoder.encode_video(_pixels(entry.kind, frames_FHWC, window.num_frames))
                made.append((entry, _checked_latents(latents_BCFHW[0], entry.kind, window, self.encoder.latent)))
        texts = [entry for entry in missing if entry.kind == IMAGE_TEXT]
        records = self.encoder.encode_text([entry.text for entry in texts], image_HWC) if texts else []
        return made + [(entry, _checked_text(record, entry.text)) for entry, record in zip(texts, records, strict=True)]


def pixels_from_frames(frames_FHWC: Frames) -> torch.Tensor:
    """float32 pixels_BCFHW in [-1, 1] (B = 1) of uint8 frames."""
    pixels_CFHW = torch.from_numpy(frames_FHWC).permute(3, 0, 1, 2)
    return (pixels_CFHW.float() / 127.5 - 1.0).unsqueeze(0)


def _pixels(kind: str, frames_FHWC: Frames, num_frames: int) -> torch.Tensor:
    """What the VAE is given, pixels_BCFHW: the window, its first frame, or that and then grey (0, the middle of -1..1)."""
    if kind == LATENTS:
        return pixels_from_frames(frames_FHWC)
    first_BCFHW = pixels_from_frames(frames_FHWC[:1])
    grey = 0 if kind == FIRST_FRAME else num_frames - 1
    return torch.nn.functional.pad(first_BCFHW, (0, 0, 0, 0, 0, grey))


def _ahead(decode: Callable[[Shot], _Decoded], shots: Sequence[Shot]) -> Generator[tuple[Shot, Future[_Decoded]], None, None]:
    """Each shot with its decoding, which a thread has begun while the ones before are used."""
    pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="decode")
    started: deque[tuple[Shot, Future[_Decoded]]] = deque()
    try:
        for shot in shots:
            started.append((shot, pool.submit(decode, shot)))
            if len(started) > _AHEAD:
                yield started.popleft()
        while started:
            yield started.popleft()
    finally:
        pool.shutdown(cancel_futures=True)


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


def _checked_latents(latents_CFHW: torch.Tensor, kind: str, window: Window, spec: LatentSpec) -> torch.Tensor:
    expected = spec.shape(1 if kind == FIRST_FRAME else window.num_frames, window.height, window.width)
    assert tuple(latents_CFHW.shape) == expected, f"the VAE gave {tuple(latents_CFHW.shape)}, not {expected}"
    return _finite(latents_CFHW, "its latents", "VAE")


def _finite(tensor: torch.Tensor, what: str, model: str) -> torch.Tensor:
    if not tensor.isfinite().all():
        raise DatasetError(Problem(f"{what} are not finite", "training needs numbers", f"Check the {model}: another file, or in float32."))
    return tensor


def _checked_text(record: TextRecord, prompt: str) -> TextRecord:
    if not record.embeds_LD.isfinite().all():
        value = f"the encoding of {shown(prompt)[:60]!r} is not finite"
        raise DatasetError(Problem(value, "training needs numbers", "Check the text encoder: another file, or in bfloat16."))
    return record
