"""A data set of clips that are listed one by one with their captions, and data sets merged into one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import DatasetError, Problem
from .captions import shown, tidy_caption
from .scan import NOT_ABOUT_THE_FILE, Clip, Dataset, Progress, Rejected, argument_problems, hold_out, unexpected
from .video import probe


@dataclass(frozen=True)
class ListedClip:
    """A clip of a list. `label` is what messages call it; `file` gives its path, or raises DatasetError."""

    label: str
    file: Callable[[], Path]


def listed_dataset(
    listed: Sequence[ListedClip],
    captions: Sequence[str],
    repeats: int = 1,
    held_out: float = 0.0,
    seed: int = 0,
    progress: Progress | None = None,
) -> Dataset:
    """The data set of listed clips with as many captions, or one for all.

    A clip that is listed several times with the same caption is one clip that is repeated. Arguments are as in
    `scan_folder`. Raises DatasetError with all that is wrong with the lists before any file is asked for, or with every
    reason when no clip can be used.
    """
    _check(listed, captions, repeats, held_out)
    tidy = [tidy_caption(caption) for caption in captions] * (len(listed) if len(captions) == 1 else 1)
    clips: list[Clip] = []
    rejected: list[Rejected] = []
    for done, (item, caption) in enumerate(zip(listed, tidy, strict=True)):
        try:
            path = item.file()
            clips.append(Clip(str(path), path.name, caption, probe(path), repeats))
        except DatasetError as error:
            rejected.append(Rejected(shown(item.label), error.problems[0]))
        except NOT_ABOUT_THE_FILE:
            raise
        except Exception as error:  # decoders fail in many ways, and one bad clip never stops the rest
            rejected.append(Rejected(shown(item.label), unexpected(error)))
        if progress:
            progress(done + 1, len(listed), "reading clips")
    if not clips:
        reasons = [replace(item.problem, value=f"{item.name}: {item.problem.value}") for item in rejected[:20]]
        raise DatasetError(reasons, subject="No clip can be used")
    clips = _distinct(clips)
    files = {clip.path: clip for clip in reversed(clips)}
    kept_back = {clip.path for clip in hold_out(list(files.values()), held_out, seed) if clip.held_out}
    return Dataset(tuple(replace(clip, held_out=clip.path in kept_back) for clip in clips), tuple(rejected))


def merge(parts: Sequence[tuple[Dataset, int]]) -> Dataset:
    """The clips of several data sets, each with its repeats multiplied (by 1 or more).

    The same file with the same caption is one clip, repeated as often as all of them together; a file that one data set
    holds out is held out. Raises DatasetError when nothing is left to train on.
    """
    if low := [times for _, times in parts if times < 1]:
        raise DatasetError(Problem(f"repeats is {low[0]}", "a clip is shown at least once per epoch", "Use 1 or more."))
    clips = [replace(clip, repeats=clip.repeats * times) for dataset, times in parts for clip in dataset.clips]
    held_out = {clip.path for clip in clips if clip.held_out}
    if all(clip.path in held_out for clip in clips):
        value = "every clip is held out by one of the data sets"
        raise DatasetError(Problem(value, "something must be left to train on", "Lower held_out, or merge other folders."))
    merged = [replace(clip, held_out=clip.path in held_out) for clip in _distinct(clips)]
    rejected = dict.fromkeys(item for dataset, _ in parts for item in dataset.rejected)
    return Dataset(tuple(merged), tuple(rejected))


def _check(listed: Sequence[ListedClip], captions: Sequence[str], repeats: int, held_out: float) -> None:
    problems = argument_problems(repeats, held_out)
    if not listed:
        problems.append(Problem("no clip is given", "a data set needs clips", "Connect videos or images."))
    if listed and len(captions) not in (1, len(listed)):
        remedy = f"Give {len(listed)} captions in the order of the clips, or a single one."
        problems.append(Problem(f"{len(captions)} captions for {len(listed)} clips", "every clip has one, or one is for all", remedy))
    if empty := [str(index + 1) for index, caption in enumerate(captions) if not tidy_caption(caption)]:
        value = f"caption {', '.join(empty[:20])} of {len(captions)} is empty" if len(captions) > 1 else "the caption is empty"
        problems.append(Problem(value, "a caption says what is to be seen", "Write what the clip shows."))
    if problems:
        raise DatasetError(problems)


def _distinct(clips: Sequence[Clip]) -> list[Clip]:
    """Each file and caption once, with all its repeats, and no two clips of the same name."""
    once: dict[tuple[str, str], Clip] = {}
    for clip in clips:
        same = once.get((clip.path, clip.caption))
        once[clip.path, clip.caption] = replace(same, repeats=same.repeats + clip.repeats) if same else clip
    taken: set[str] = {clip.name for clip in once.values()}
    named: dict[str, Clip] = {}
    for clip in once.values():
        name, number = clip.name, 2
        while name in named or (name != clip.name and name in taken):
            name, number = f"{clip.name} ({number})", number + 1
        named[name] = replace(clip, name=name)
    return list(named.values())
