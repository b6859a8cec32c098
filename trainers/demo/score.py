"""Say what a clip of the small world shows, from its pixels alone, and compare it with what was asked.

The shape is the only thing with a colour, so saturation finds it. Its mean hue names the colour, the track of its
centroid the motion, and the overlap of its averaged outline with each drawn shape the shape.

    python -m trainers.demo.score FOLDER

reads FOLDER/asked.json, a list of {"file": "000.mp4", "caption": "a red circle moving left"}, and prints the scores.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

if not __package__:  # started by file path: make `trainers` importable, and nothing beside this file
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    __package__ = "trainers.demo"

from .world import COLOURS, CONCEPT, DIRECTIONS, MOTIONS, SHAPES, SIDE, Frames, draw_mask, read_clip

MIN_SATURATION = 40  # of 255; below this, nothing in the frame has a colour
MIN_AREA = 40  # pixels
MIN_TRAVEL = 7.0  # pixels between the first and the last frame
STILL = "still"
OTHER = "elsewhere"

_Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Score:
    """What a clip shows; None where it cannot be told."""

    colour: str | None
    shape: str | None
    motion: str | None  # a word of DIRECTIONS, `still`, or `elsewhere` for a slanted way that is not the concept
    travel: tuple[float, float]  # x, y in pixels from the first to the last frame; y grows downwards


def score_clip(clip: Frames | Path) -> Score:
    """Score decoded frames, uint8 RGB of shape (frames, height, width, 3), or a video file."""
    frames = read_clip(clip) if isinstance(clip, Path) else clip
    found = [(index, frame, mask) for index, frame in enumerate(frames) if (mask := _find(frame)).sum() >= MIN_AREA]
    if len(found) < max(2, len(frames) // 2):
        return Score(None, None, None, (0.0, 0.0))
    times = np.array([index for index, _, _ in found], np.float64)
    centroids = np.array([np.argwhere(mask).mean(axis=0)[::-1] for _, _, mask in found])
    slope = np.polyfit(times, centroids, 1)[0] * (len(frames) - 1)
    travel = (float(slope[0]), float(slope[1]))
    pixels = np.concatenate([frame[mask] for _, frame, mask in found])
    outline = _average_outline([mask for _, _, mask in found], centroids)
    return Score(_name_colour(pixels), _name_shape(outline), _name_motion(travel), travel)


def _find(frame: Frames) -> _Mask:
    """Mark the coloured pixels: those at least half as saturated as the frame's most saturated twentieth."""
    pixels = frame.astype(np.float32)
    saturation = pixels.max(axis=2) - pixels.min(axis=2)
    level = max(MIN_SATURATION, float(np.quantile(saturation, 0.95)))
    mask: _Mask = saturation >= 0.5 * level
    return mask


def _name_colour(pixels: NDArray[np.uint8]) -> str:
    """Name the colour whose chroma points the same way as the mean of `pixels` (count, 3)."""

    def direction(rgb: NDArray[np.float64]) -> NDArray[np.float64]:
        chroma = rgb - rgb.mean()
        unit: NDArray[np.float64] = chroma / max(float(np.linalg.norm(chroma)), 1e-6)
        return unit

    seen = direction(pixels.astype(np.float64).mean(axis=0))
    return max(COLOURS, key=lambda name: float(direction(np.array(COLOURS[name], np.float64)) @ seen))


def _name_motion(travel: tuple[float, float]) -> str:
    """Name the direction within 22.5 degrees of `travel`."""
    length = math.hypot(*travel)
    if length < MIN_TRAVEL:
        return STILL
    for name, (x, y) in DIRECTIONS.items():
        if (x * travel[0] + y * travel[1]) / (length * math.hypot(x, y)) > math.cos(math.pi / 8):
            return name
    return OTHER


def _average_outline(masks: Sequence[_Mask], centroids: NDArray[np.float64]) -> NDArray[np.float32]:
    """Average the masks, each shifted by whole pixels so that its centroid is in the middle: (64, 64) in 0..1."""
    total = np.zeros((SIDE, SIDE), np.float32)
    for mask, (x, y) in zip(masks, centroids, strict=True):
        total += np.roll(mask, (round(SIDE / 2 - y), round(SIDE / 2 - x)), axis=(0, 1))
    average: NDArray[np.float32] = total / np.float32(len(masks))
    return average


def _name_shape(outline: NDArray[np.float32]) -> str:
    """Name the drawn shape that overlaps the outline best, over several sizes."""
    overlaps = {name: max(_overlap(outline, mask) for mask in _templates(name)) for name in SHAPES}
    return max(overlaps, key=lambda name: overlaps[name])


def _overlap(left: NDArray[np.float32], right: NDArray[np.float32]) -> float:
    """Soft intersection over union of two masks."""
    return float(np.minimum(left, right).sum() / np.maximum(left, right).sum())


@cache
def _templates(shape: str) -> list[NDArray[np.float32]]:
    centre = (SIDE / 2, SIDE / 2)
    return [draw_mask(shape, centre, radius) for radius in np.arange(10.0, 18.0, 0.5)]


@dataclass(frozen=True)
class Asked:
    """What a caption asks for."""

    colour: str
    shape: str
    motion: str

    @classmethod
    def parse(cls, caption: str) -> "Asked":
        """Read "a red circle moving left"."""
        words = caption.split()
        if len(words) != 5 or words[0] != "a" or words[3] != "moving":
            raise ValueError(f'{caption!r} is no caption of the small world; write "a red circle moving left".')
        return cls(words[1], words[2], words[4])


@dataclass(frozen=True)
class Summary:
    """Shares of clips, 0..1, that show what was asked; None where nothing of the kind was asked."""

    clips: int
    colour: float | None
    shape: float | None
    motion: float | None  # over captions with a motion of the base
    concept: float | None  # over captions with the concept


def summarise(scored: Sequence[tuple[Asked, Score]]) -> Summary:
    """Compare each clip with what was asked for."""
    base = [pair for pair in scored if pair[0].motion in MOTIONS]
    concept = [pair for pair in scored if pair[0].motion == CONCEPT]
    return Summary(
        clips=len(scored),
        colour=_share([asked.colour == score.colour for asked, score in scored]),
        shape=_share([asked.shape == score.shape for asked, score in scored]),
        motion=_share([asked.motion == score.motion for asked, score in base]),
        concept=_share([asked.motion == score.motion for asked, score in concept]),
    )


def _share(hits: Sequence[bool]) -> float | None:
    return round(sum(hits) / len(hits), 4) if hits else None


def score_folder(folder: Path) -> list[tuple[Asked, Score]]:
    """Score every file that `folder`/asked.json lists."""
    rows = json.loads((folder / "asked.json").read_text(encoding="utf-8"))
    return [(Asked.parse(row["caption"]), score_clip(folder / row["file"])) for row in rows]


def main(arguments: Sequence[str] | None = None) -> None:
    """Print one JSON line a clip, then the summary."""
    parser = argparse.ArgumentParser(description="Score a folder of clips of the small world.")
    parser.add_argument("folder", type=Path, help="holds the videos and asked.json")
    scored = score_folder(parser.parse_args(arguments).folder)
    for asked, score in scored:
        print(json.dumps({"asked": asdict(asked), "found": asdict(score)}))
    print(json.dumps(asdict(summarise(scored))))


if __name__ == "__main__":
    main()
