"""What the demo shows at its end: a contact sheet, a before-and-after video, and one HTML page with everything in it."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from ..data.video_file import write_video
from .score import Asked, Score, Summary
from .world import CONCEPT, Frames

TILE = 96  # pixels of a frame on the contact sheet
SHOWN_FRAMES = (0, 2, 4, 6, 8)
TEXT_WIDTH = 330
GAP = 18
GOOD, BAD, INK = (24, 128, 56), (190, 50, 40), (50, 50, 50)


@dataclass(frozen=True)
class Video:
    """One sampled video: what was asked, what the scorer saw."""

    asked: Asked
    score: Score
    frames_FHWC: Frames

    @property
    def moves_as_asked(self) -> bool:
        return self.asked.motion == self.score.motion


@dataclass(frozen=True)
class Result:
    """Everything the page tells. `timings` are seconds by step of the demo; `files` are by what they are."""

    before: Sequence[Video]
    after: Sequence[Video]
    summary_before: Summary
    summary_after: Summary
    timings_seconds: Mapping[str, float]
    training: str
    files: Mapping[str, Path]


def contact_sheet(before: Sequence[Video], after: Sequence[Video]) -> Frames:
    """A picture with a row for each prompt: the caption, frames before, frames after."""
    strip = len(SHOWN_FRAMES) * TILE
    width = TEXT_WIDTH + 2 * strip + 2 * GAP
    rows = [_heading(width, strip)]
    for old, new in zip(before, after, strict=True):
        row: Frames = np.full((TILE + 6, width, 3), 255, np.uint8)
        caption = f"{old.asked.colour} {old.asked.shape} {old.asked.motion}"
        _text(row, caption, (10, TILE // 2 - 6), INK)
        for x, video in ((10, old), (165, new)):
            _text(row, _told(video), (x, TILE // 2 + 18), GOOD if video.moves_as_asked else BAD, 0.42)
        row[3 : 3 + TILE, TEXT_WIDTH : TEXT_WIDTH + strip] = _strip(old.frames_FHWC)
        row[3 : 3 + TILE, TEXT_WIDTH + strip + GAP : TEXT_WIDTH + 2 * strip + GAP] = _strip(new.frames_FHWC)
        rows.append(row)
    return np.concatenate(rows)


def write_before_after(path: Path, before: Sequence[Video], after: Sequence[Video], side: int = 128, loops: int = 4) -> None:
    """Writes a video: the concept's clips before (left) and after (right), each loop at half speed."""
    old = _grid([video for video in before if video.asked.motion == CONCEPT][:16], side)
    new = _grid([video for video in after if video.asked.motion == CONCEPT][:16], side)
    gap = np.full((*old.shape[:2], 32, 3), 255, np.uint8)
    frames = np.concatenate([old, gap, new], axis=2)
    head: Frames = np.full((len(frames), 40, frames.shape[2], 3), 255, np.uint8)
    for frame in head:
        _text(frame, "before: the base", (10, 27), INK, 0.7)
        _text(frame, "after: with the LoRA", (old.shape[2] + 42, 27), INK, 0.7)
    write_video(path, np.tile(np.concatenate([head, frames], axis=1), (loops, 1, 1, 1)), fps=8)


ROWS = (
    (f"moves {CONCEPT}, as asked", "concept", "the new motion"),
    ("moves left, right, up or down, as asked", "motion", "what the base knew must stay"),
    ("colour as asked", "colour", ""),
    ("shape as asked", "shape", ""),
)


def verdict(result: Result) -> str:
    """One sentence by the scores: learnt is >= 80 % after and <= 20 % before, kept is a loss of at most 10 %."""
    before, after = result.summary_before, result.summary_after
    if (after.concept or 0) < 0.8 or (before.concept or 0) > 0.2:
        return "The LoRA did not learn the new motion"
    lost = max((getattr(before, key) or 0) - (getattr(after, key) or 0) for key in ("motion", "colour"))
    return (
        "The LoRA learnt a new motion, and kept colours and old motions"
        if lost <= 0.1
        else "The LoRA learnt a new motion, but forgot old ones"
    )


def told(result: Result) -> str:
    """The scores as lines of text."""
    lines = [verdict(result), "", f"{'':42}before  after"]
    for name, key, _ in ROWS:
        before, after = getattr(result.summary_before, key), getattr(result.summary_after, key)
        lines.append(f"{name:42}{before:6.0%} {after:6.0%}")
    return "\n".join(lines)


def write_page(path: Path, result: Result) -> None:
    """Writes the HTML page; pictures and videos are inside it, so it can be passed on as one file."""
    table = "".join(
        f"<tr><td>{name}<small>{note}</small></td>"
        f"{_cell(getattr(result.summary_before, key))}{_cell(getattr(result.summary_after, key))}</tr>"
        for name, key, note in ROWS
    )
    timings = "".join(f"<tr><td>{html.escape(name)}</td><td>{seconds:.0f} s</td></tr>" for name, seconds in result.timings_seconds.items())
    files = "".join(
        f"<li><b>{html.escape(name)}</b>: <code>{html.escape(_shown(file, path))}</code></li>" for name, file in result.files.items()
    )
    page = _PAGE.format(
        verdict=verdict(result),
        concept=CONCEPT,
        table=table,
        video=_inline(result.files["before and after"], "video/mp4"),
        loss=_inline(result.files["loss"], "image/png"),
        sheet=_inline(result.files["contact sheet"], "image/jpeg"),
        clips=len(result.after),
        training=html.escape(result.training),
        timings=timings,
        total=sum(result.timings_seconds.values()),
        files=files,
    )
    path.write_text(page, encoding="utf-8")


def _heading(width: int, strip: int) -> Frames:
    row: Frames = np.full((44, width, 3), 255, np.uint8)
    _text(row, "asked; seen before / after", (10, 30), INK)
    _text(row, "before: the base", (TEXT_WIDTH, 30), INK)
    _text(row, "after: with the LoRA", (TEXT_WIDTH + strip + GAP, 30), INK)
    return row


def _told(video: Video) -> str:
    return f"{video.score.motion or 'nothing seen'}"


def _strip(frames_FHWC: Frames) -> Frames:
    return np.concatenate([_scaled(frames_FHWC[i], TILE) for i in SHOWN_FRAMES], axis=1)


def _scaled(frame: Frames, side: int) -> Frames:
    scaled = cv2.resize(frame, (side, side), interpolation=cv2.INTER_CUBIC)
    scaled[:, -1] = 255
    return np.asarray(scaled, np.uint8)


def _grid(videos: Sequence[Video], side: int, columns: int = 4) -> Frames:
    """Videos side by side: (F, rows * side, columns * side, 3)."""
    frames = [[_scaled(video.frames_FHWC[i], side) for video in videos] for i in range(len(videos[0].frames_FHWC))]
    blank: Frames = np.full((side, side, 3), 255, np.uint8)
    grids = []
    for tiles in frames:
        tiles += [blank] * (-len(tiles) % columns)
        grids.append(np.concatenate([np.concatenate(tiles[i : i + columns], axis=1) for i in range(0, len(tiles), columns)]))
    return np.stack(grids)


def _text(picture: Frames, text: str, at: tuple[int, int], colour: tuple[int, int, int], size: float = 0.5) -> None:
    cv2.putText(picture, text, at, cv2.FONT_HERSHEY_SIMPLEX, size, colour, 1, cv2.LINE_AA)


def _cell(share: float | None) -> str:
    if share is None:
        return "<td>-</td>"
    return f'<td><div class="bar"><i style="width:{100 * share:.0f}%"></i></div>{100 * share:.0f} %</td>'


def _inline(path: Path, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def _shown(file: Path, page: Path) -> str:
    return str(file.relative_to(page.parent)) if file.is_relative_to(page.parent) else str(file)


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Video Trainer: the demo's result</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 1060px; margin: 2rem auto; padding: 0 1rem; }}
h1 {{ font-size: 1.6rem; margin-bottom: .2rem; }} h2 {{ font-size: 1.15rem; margin-top: 2rem; }}
p.lead {{ color: #555; margin-top: 0; }}
table {{ border-collapse: collapse; }} td, th {{ text-align: left; padding: .35rem 1.2rem .35rem 0; border-bottom: 1px solid #e4e4e4; }}
td small {{ display: block; color: #777; }}
.bar {{ display: inline-block; width: 160px; height: 10px; background: #eee; border-radius: 5px; margin-right: .6rem; }}
.bar i {{ display: block; height: 10px; background: #1f69be; border-radius: 5px; }}
img, video {{ max-width: 100%; border: 1px solid #e4e4e4; }} code {{ background: #f4f4f4; padding: .1rem .3rem; }}
.columns {{ display: flex; gap: 3rem; flex-wrap: wrap; }}
</style></head><body>
<h1>{verdict}</h1>
<p class="lead">The tiny base had never seen a shape move {concept}.
Here it is before and after training, each video from the same noise.</p>
<video src="{video}" autoplay loop muted controls></video>
<h2>Did it learn, and did it forget?</h2>
<table><tr><th>share of videos, by a measuring program</th><th>before</th><th>after</th></tr>{table}</table>
<h2>Loss</h2><img src="{loss}" alt="loss curve">
<p>{training}</p>
<h2>Every video</h2>
<p>{clips} videos, none chosen by hand. Under each caption: the motion that was seen before and after.</p>
<img src="{sheet}" alt="contact sheet">
<div class="columns"><div><h2>Time</h2><table>{timings}<tr><td><b>together</b></td><td><b>{total:.0f} s</b></td></tr></table></div>
<div><h2>Files</h2><ul>{files}</ul></div></div>
</body></html>
"""
