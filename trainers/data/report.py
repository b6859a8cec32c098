"""What a data set is, as text: the output of the `dataset` verb and of the nodes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

from ..family import LatentSpec
from .buckets import Plan, Window
from .captions import shown
from .scan import Clip, Dataset, Rejected

_SHOWN_FILES = 50
_SHOWN_KINDS = 6
_NAMES = ("clip", "bucket")
_GAP = "  "
_NARROW = 56  # letters of one width that fit into a node of 400 pixels
_SHORTEST_NAME = 12


def summary(dataset: Dataset) -> str:
    """What a data set holds, in a few lines, and every file that is not used with its reason. Needs no geometry."""
    return "\n".join([*_overview(dataset.clips), *_not_used(dataset)])


def listing(dataset: Dataset, first: int, most: int, spec: LatentSpec | None = None) -> str:
    """As the summary, with a row and the caption of up to `most` clips from number `first` (1 is the first); there must be one.

    With the rules of a model also what it makes of them: the frames at its rate, the longest window, the largest size
    without enlarging.
    """
    clips = dataset.clips[first - 1 : first - 1 + most]
    parts = [*_overview(dataset.clips), "", *_rules(dataset.clips, spec), *_page(_cells(clips, first, spec), clips, first)]
    return "\n".join([*parts, *_not_used(dataset)])


def narrow_listing(dataset: Dataset, first: int, most: int, spec: LatentSpec | None = None) -> str:
    """The listing without the summary, its table narrow enough for a node: names shortened, what is the same for all left out."""
    clips = dataset.clips[first - 1 : first - 1 + most]
    left_out = {"size", "frames", "fps"} if spec else set()
    if all(clip.repeats == 1 and not clip.held_out for clip in clips):
        left_out.add("repeats")
    rows = [{title: cell for title, cell in row.items() if title not in left_out} for row in _cells(clips, first, spec)]
    others = sum(max(len(title), *(len(row[title]) for row in rows)) + len(_GAP) for title in rows[0] if title != "clip")
    for row in rows:
        row["clip"] = _shortened(row["clip"], max(_NARROW - others, _SHORTEST_NAME))
    return "\n".join([*_rules(dataset.clips, spec), *_page(rows, clips, first)])


def _page(rows: Sequence[Mapping[str, str]], clips: Sequence[Clip], first: int) -> list[str]:
    """A table, and under it the captions."""
    captions = [f"{number}. {' '.join(clip.caption.split())}" for number, clip in enumerate(clips, first)]
    return [*_table(tuple(rows[0]), [tuple(row.values()) for row in rows]), "", "captions", *captions]


def _cells(clips: Sequence[Clip], first: int, spec: LatentSpec | None) -> list[dict[str, str]]:
    """For each clip: title of the column -> what stands in it."""
    return [{"": str(number), **_row(clip), **(_fitted(clip, spec) if spec else {})} for number, clip in enumerate(clips, first)]


def _shortened(name: str, most: int) -> str:
    """A file's name without its folders in at most `most` letters, its middle left out: names of clips differ at their ends."""
    name = name.rpartition("/")[2]
    end = (most - 3) // 2
    return name if len(name) <= most else f"{name[: most - 3 - end]}...{name[-end:]}"


def _row(clip: Clip) -> dict[str, str]:
    info, is_image = clip.info, clip.kind == "image"
    return {
        "clip": shown(clip.name),
        "size": f"{info.width}x{info.height}",
        "seconds": "" if is_image else f"{info.duration_seconds:.2f}",
        "frames": "image" if is_image else str(info.num_frames),
        "fps": "" if is_image else f"{info.fps:.4g}",
        "repeats": "held out" if clip.held_out else str(clip.repeats),
    }


def _fitted(clip: Clip, spec: LatentSpec) -> dict[str, str]:
    there = clip.info.num_frames_at(spec.fps)
    window = spec.floor_num_frames(there)
    sides = [side // spec.spatial_step * spec.spatial_step for side in (clip.info.width, clip.info.height)]
    return {
        f"at {spec.fps:g} fps": str(there),
        "longest": "too short" if window == 1 and clip.kind == "video" else str(window),
        "largest": f"{sides[0]}x{sides[1]}" if all(sides) else "too small",
    }


def _rules(clips: Sequence[Clip], spec: LatentSpec | None) -> list[str]:
    """What the model asks of clips, how long the windows are that these can fill, and an empty line. Nothing without a model."""
    if spec is None:
        return []
    rule = (
        f"The model sees {spec.fps:g} frames a second, {spec.temporal_stride}n+1 frames at once, sides in multiples of {spec.spatial_step}."
    )
    videos = (clip.info.num_frames_at(spec.fps) for clip in clips if clip.kind == "video")
    windows = sorted(spec.floor_num_frames(there) for there in videos if there > spec.temporal_stride)
    if not windows:
        return [rule, ""]
    middle = windows[(len(windows) - 1) // 2]
    fill = f"Videos that are long enough fill {windows[0]} frames or more, half of them {middle} or more, the longest {windows[-1]}."
    return [rule, fill, ""]


def _overview(clips: Sequence[Clip]) -> list[str]:
    trained = [clip for clip in clips if not clip.held_out]
    return [
        _counts(clips),
        f"{_counted(sum(clip.repeats for clip in trained), 'clip')} per epoch, {len(clips) - len(trained)} held out",
        "sizes: " + _most_common(f"{clip.info.width}x{clip.info.height}" for clip in clips),
        *_rates(clips),
        *_captions(clips),
    ]


def _not_used(dataset: Dataset) -> list[str]:
    return ["", *_rejected(dataset.rejected)] if dataset.rejected else []


def _counted(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _counts(clips: Sequence[Clip]) -> str:
    videos = [clip for clip in clips if clip.kind == "video"]
    seconds = sum(clip.info.duration_seconds for clip in videos)
    return f"{_counted(len(videos), 'video')} ({seconds:.1f} seconds), {_counted(len(clips) - len(videos), 'image')}"


def _rates(clips: Sequence[Clip]) -> list[str]:
    rates = [f"{clip.info.fps:.3g}" for clip in clips if clip.kind == "video"]
    return [f"frames a second: {_most_common(rates)}"] if rates else []


def _most_common(values: Iterable[str]) -> str:
    """`1280x720 (12), 640x480 (4)`, the most frequent first."""
    counts = Counter(values)
    listed = [f"{value} ({count})" for value, count in counts.most_common(_SHOWN_KINDS)]
    return ", ".join(listed) + (f" and {len(counts) - _SHOWN_KINDS} more" if len(counts) > _SHOWN_KINDS else "")


def report(dataset: Dataset, plan: Plan) -> str:
    """Clips, buckets, captions and every file that is not used with its reason, as lines of text."""
    rejected = (*dataset.rejected, *plan.rejected)
    sections = [_summary(dataset, plan), _clips(dataset.clips), _buckets(plan.windows), _captions(dataset.clips)]
    if rejected:
        sections.append(_rejected(rejected))
    return "\n\n".join("\n".join(lines) for lines in sections) + "\n"


def _summary(dataset: Dataset, plan: Plan) -> list[str]:
    windows = plan.windows
    held_out = sum(window.clip.held_out for window in windows)
    per_epoch = sum(window.clip.repeats for window in windows if not window.clip.held_out)
    return [
        _counts(dataset.clips),
        f"{len(windows)} windows, {held_out} of them held out; {per_epoch} samples per epoch",
    ]


def _clips(clips: Sequence[Clip]) -> list[str]:
    rows = [
        (
            shown(clip.name),
            f"{clip.info.width}x{clip.info.height}",
            f"{clip.info.fps:.2f}" if clip.kind == "video" else "image",
            f"{clip.info.duration_seconds:.2f}" if clip.kind == "video" else "",
            f"{clip.repeats}" + (" held out" if clip.held_out else ""),
        )
        for clip in clips[:_SHOWN_FILES]
    ]
    lines = list(_table(("clip", "size", "fps", "seconds", "repeats"), rows))
    return lines + ([f"... and {len(clips) - _SHOWN_FILES} more"] if len(clips) > _SHOWN_FILES else [])


def _buckets(windows: Sequence[Window]) -> list[str]:
    counts = Counter((window.num_frames, window.width, window.height, window.fps) for window in windows)
    enlarged = Counter((window.num_frames, window.width, window.height, window.fps) for window in windows if _is_enlarged(window))
    rows = [
        (f"{key[1]}x{key[2]}", str(key[0]), f"{key[3]:g}", str(count), str(enlarged[key] or ""))
        for key, count in sorted(counts.items(), reverse=True)
    ]
    return list(_table(("bucket", "frames", "fps", "windows", "enlarged"), rows))


def _is_enlarged(window: Window) -> bool:
    """Whether the file has fewer pixels than the window is given."""
    return max(window.height / window.clip.info.height, window.width / window.clip.info.width) > 1


def _captions(clips: Sequence[Clip]) -> list[str]:
    words = sorted(len(clip.caption.split()) for clip in clips)
    different = len({clip.caption for clip in clips})
    if words[0] == words[-1]:
        return [f"captions: {different} different, {_counted(words[0], 'word')}" + (" each" if len(words) > 1 else "")]
    return [f"captions: {different} different, {words[0]} to {words[-1]} words, half of them at least {words[len(words) // 2]}"]


def _rejected(rejected: Sequence[Rejected]) -> list[str]:
    head = "1 file is not used:" if len(rejected) == 1 else f"{len(rejected)} files are not used:"
    return [head, *(f"  {item.name}: {item.reason}" for item in rejected)]


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    """Columns as wide as their widest cell: the one of names to the left, the others to the right."""
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    for row in (head, *rows):
        cells = [cell.ljust(width) if title in _NAMES else cell.rjust(width) for cell, title, width in zip(row, head, widths, strict=True)]
        yield _GAP.join(cells).rstrip()
