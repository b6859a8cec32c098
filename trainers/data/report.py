"""What a data set is, as text: the output of the `dataset` verb and of the nodes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from .buckets import Plan, Window
from .captions import shown
from .scan import Clip, Dataset, Rejected

_SHOWN_FILES = 50
_SHOWN_KINDS = 6


def summary(dataset: Dataset) -> str:
    """What a data set holds, in a few lines, and every file that is not used with its reason. Needs no geometry."""
    clips = dataset.clips
    trained = [clip for clip in clips if not clip.held_out]
    lines = [
        _counts(clips),
        f"{sum(clip.repeats for clip in trained)} clips per epoch, {len(clips) - len(trained)} held out",
        "sizes: " + _most_common(f"{clip.info.width}x{clip.info.height}" for clip in clips),
        *_rates(clips),
        *_captions(clips),
    ]
    if dataset.rejected:
        lines += ["", *_rejected(dataset.rejected)]
    return "\n".join(lines)


def _counts(clips: Sequence[Clip]) -> str:
    videos = [clip for clip in clips if clip.kind == "video"]
    seconds = sum(clip.info.duration_seconds for clip in videos)
    return f"{len(videos)} videos ({seconds:.1f} seconds), {len(clips) - len(videos)} images"


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
    return [f"captions: {different} different, {words[0]} to {words[-1]} words, half of them at least {words[len(words) // 2]}"]


def _rejected(rejected: Sequence[Rejected]) -> list[str]:
    head = "1 file is not used:" if len(rejected) == 1 else f"{len(rejected)} files are not used:"
    return [head, *(f"  {item.name}: {item.reason}" for item in rejected)]


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    """Columns as wide as their widest cell: the first to the left, the others to the right."""
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    for row in (head, *rows):
        cells = [
            cell.ljust(width) if column == 0 else cell.rjust(width) for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  ".join(cells).rstrip()
