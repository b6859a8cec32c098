"""What a data set is, as text: the output of the `dataset` verb."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from .buckets import Plan, Window
from .captions import shown
from .scan import Clip, Dataset, Rejected

_SHOWN_FILES = 50


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
    videos = [clip for clip in dataset.clips if clip.kind == "video"]
    seconds = sum(clip.info.duration_seconds for clip in videos)
    return [
        f"{len(videos)} videos ({seconds:.1f} seconds), {len(dataset.clips) - len(videos)} images",
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
    return [f"{len(rejected)} files are not used:", *(f"  {item.name}: {item.reason}" for item in rejected)]


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    """Columns as wide as their widest cell: the first to the left, the others to the right."""
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    for row in (head, *rows):
        cells = [
            cell.ljust(width) if column == 0 else cell.rjust(width) for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  ".join(cells).rstrip()
