"""What a folder holds: clips with captions, and every file that is not used, with the reason.

A clip is a video or an image with a text file of the same stem beside it. Folders are searched with their sub-folders, in
the order of the names; hidden files and folders are passed over. A sub-folder named `N_anything` (N from 1 to 999) repeats
what is in it N times per epoch.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from ..errors import DatasetError, MissingPackage, Problem
from .captions import caption_path, read_caption, shown
from .video import IMAGE_SUFFIXES, VIDEO_SUFFIXES, VideoInfo, probe

Progress = Callable[[int, int, str], None]
"""Called as progress(done, total, what is being done)."""

NOT_ABOUT_THE_FILE = (MissingPackage, ImportError, AssertionError)
"""Errors that every file would have."""

_REPEATS = re.compile(r"([1-9]\d{0,2})_")
_SHOWN_PROBLEMS = 20


@dataclass(frozen=True)
class Clip:
    """A file to train on. `name` is its path in the scanned folder, with "/"; `repeats` is how often an epoch shows it."""

    path: str
    name: str
    caption: str
    info: VideoInfo
    repeats: int = 1
    held_out: bool = False

    @property
    def kind(self) -> Literal["video", "image"]:
        return self.info.kind


@dataclass(frozen=True)
class Rejected:
    """A file, or a window of one, that is not used, and why."""

    name: str
    problem: Problem

    @property
    def reason(self) -> str:
        return str(self.problem)


@dataclass(frozen=True)
class Dataset:
    """Clips and rejected files, without any geometry: a record of plain values that JSON can hold."""

    clips: tuple[Clip, ...]
    rejected: tuple[Rejected, ...] = ()

    def to_json(self) -> str:
        """As JSON text (ASCII, so that any file name survives)."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Dataset:
        """The data set that `to_json` wrote."""
        values = json.loads(text)
        clips = tuple(Clip(**{**clip, "info": VideoInfo(**clip["info"])}) for clip in values["clips"])
        return cls(clips, tuple(Rejected(item["name"], Problem(**item["problem"])) for item in values["rejected"]))


def scan_folder(folder: Path | str, repeats: int = 1, held_out: float = 0.0, seed: int = 0, progress: Progress | None = None) -> Dataset:
    """The data set in a folder.

    `held_out` in [0, 1) is the share of clips that is measured and never trained on: a clip's place is a function of its
    name and `seed` alone, so more clips move none; at least one clip is on each side when there are two or more. `repeats`
    (>= 1) multiplies what the folders' names say.

    Raises DatasetError when an argument is out of range, or with every reason when no file can be used.
    """
    root = Path(folder).expanduser().absolute()
    _check_arguments(root, repeats, held_out)
    closed: list[OSError] = []
    found = list(_files(root, closed))
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        results = []
        for done, result in enumerate(pool.map(lambda path: _read(root, path, repeats), found)):
            results.append(result)
            if progress:
                progress(done + 1, len(found), "reading headers")
    clips = [result for result in results if isinstance(result, Clip)]
    rejected = [result for result in results if isinstance(result, Rejected)]
    rejected += [_unread(root, Path(error.filename), error) for error in closed]
    if not clips:
        raise _nothing_to_use(root, rejected)
    return Dataset(tuple(hold_out(clips, held_out, seed)), tuple([*rejected, *_captions_without_clip(root, found)]))


def fingerprint(folder: Path | str) -> str:
    """Changes whenever a file below the folder is added, removed, renamed or written, captions too. Reads no file."""
    root = Path(folder).expanduser().absolute()
    digest = hashlib.sha256()
    for path in _files(root, []):
        try:
            state = path.stat()
            entry = (path.relative_to(root).as_posix(), state.st_size, state.st_mtime_ns)
        except OSError:
            entry = (path.relative_to(root).as_posix(), -1, -1)
        digest.update(repr(entry).encode())
    return digest.hexdigest()


def _check_arguments(root: Path, repeats: int, held_out: float) -> None:
    problems = argument_problems(repeats, held_out)
    if not root.is_dir():
        problems.append(Problem(f"{root} is no folder", "a data set is a folder of clips", "Check the path."))
    if problems:
        raise DatasetError(problems)


def argument_problems(repeats: int, held_out: float) -> list[Problem]:
    """What is wrong with the numbers that every data set has; empty when nothing is."""
    problems = []
    if repeats < 1:
        problems.append(Problem(f"repeats is {repeats}", "a clip is shown at least once per epoch", "Use 1 or more."))
    if not 0 <= held_out < 1:
        problems.append(Problem(f"held_out is {held_out}", "it is a share from 0 to below 1", "Use 0.1 for a tenth."))
    return problems


def _files(root: Path, closed: list[OSError]) -> Iterator[Path]:
    """Every file below the folder but the hidden ones, in the order of the names; links are followed, loops are not.

    Folders that cannot be read end up in `closed`.
    """
    seen: set[str] = set()
    for place, folders, names in os.walk(root, onerror=closed.append, followlinks=True):
        if (real := os.path.realpath(place)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(place, name) for name in sorted(names) if not name.startswith("."))


def _read(root: Path, path: Path, repeats: int) -> Clip | Rejected | None:
    """The clip in a file, or why there is none; None for caption files, which are read with their clips."""
    name = path.relative_to(root).as_posix()
    if path.suffix.lower() == ".txt":
        return None
    try:
        _check_file(path, name)
        caption = read_caption(caption_path(path))
        return Clip(str(path), name, caption, probe(path), repeats * _repeats_of(name))
    except DatasetError as error:
        return Rejected(shown(name), error.problems[0])
    except OSError as error:
        return _unread(root, path, error)
    except NOT_ABOUT_THE_FILE:
        raise
    except Exception as error:  # decoders fail in many ways, and one bad file never stops the rest
        return Rejected(shown(name), unexpected(error))


def unexpected(error: Exception) -> Problem:
    """Why a file is not used when what reads it failed in a way of its own."""
    value = f"it cannot be read ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
    return Problem(value, "the file must be a whole video or image", "Export it again, or leave it out.")


def _unread(root: Path, path: Path, error: OSError) -> Rejected:
    problem = Problem(f"it cannot be read ({error.strerror})", "files and folders must be readable", "Check its permissions.")
    return Rejected(shown(path.relative_to(root).as_posix()), problem)


def _check_file(path: Path, name: str) -> None:
    """Raises DatasetError for a file that must not even be opened."""
    try:
        name.encode()
    except UnicodeEncodeError:
        raise DatasetError(Problem("the name is not Unicode", "names must be readable text", "Rename the file.")) from None
    if path.suffix.lower() not in VIDEO_SUFFIXES | IMAGE_SUFFIXES:
        known = " ".join(sorted(suffix[1:] for suffix in VIDEO_SUFFIXES | IMAGE_SUFFIXES))
        raise DatasetError(Problem("no video or image by its name", f"known are {known}", "Convert it or leave it out."))
    if not stat.S_ISREG(path.stat().st_mode):
        raise DatasetError(Problem("no plain file", "devices and pipes are not read", "Leave it out."))


def _repeats_of(name: str) -> int:
    """What the names of the folders on the way ask for, multiplied."""
    repeats = 1
    for folder in name.split("/")[:-1]:
        if match := _REPEATS.match(folder):
            repeats *= int(match.group(1))
    return repeats


def hold_out(clips: list[Clip], share: float, seed: int) -> list[Clip]:
    """The clips, those of the share marked: at least one on each side when there are two or more."""
    if share == 0 or len(clips) < 2:
        return clips
    places = {clip.name: _place(clip.name, seed) for clip in clips}
    low, *_, high = sorted(places.values())
    limit = min(max(share * 2**48, low + 1), high)  # at least the lowest, never the highest
    return [replace(clip, held_out=places[clip.name] < limit) for clip in clips]


def _place(name: str, seed: int) -> int:
    """Where in 0 .. 2**48 - 1 the clip falls."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:6], "big")


def _captions_without_clip(root: Path, found: list[Path]) -> list[Rejected]:
    clips = {caption_path(path) for path in found if path.suffix.lower() in VIDEO_SUFFIXES | IMAGE_SUFFIXES}
    orphans = [path for path in found if path.suffix.lower() == ".txt" and path not in clips]
    problem = Problem("a caption without a clip", "a caption has its clip's name", "Rename it, or leave it: it is not used.")
    return [Rejected(shown(path.relative_to(root).as_posix()), problem) for path in orphans]


def _nothing_to_use(root: Path, rejected: list[Rejected]) -> DatasetError:
    suffixes = " ".join(sorted(suffix[1:] for suffix in VIDEO_SUFFIXES | IMAGE_SUFFIXES))
    first = Problem(f"{root} holds no clip that can be used", f"it needs files ({suffixes}) with captions", "See each file's reason.")
    reasons = [replace(item.problem, value=f"{item.name}: {item.problem.value}") for item in rejected[:_SHOWN_PROBLEMS]]
    if len(rejected) > _SHOWN_PROBLEMS:
        reasons.append(Problem(f"and {len(rejected) - _SHOWN_PROBLEMS} more files", "as above", "Fix these first."))
    return DatasetError([first, *reasons])
