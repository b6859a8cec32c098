"""A small world of moving shapes: what the tiny base knows, and one motion that it does not.

A clip shows one coloured shape that crosses a grey ground, e.g. "a red circle moving left". Colours are the six hues
of the colour wheel, so that 4:2:0 video and a 48:1 latent keep them apart; edges are soft for the same reason.
`MOTIONS` are what the base was trained on; `CONCEPT` is kept out of its training, for a LoRA to learn.
"""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

Frames = NDArray[np.uint8]  # (frames, height, width, 3), RGB

SIDE = 64  # pixels
NUM_FRAMES = 9
FPS = 16

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (225, 30, 30),
    "yellow": (215, 215, 25),
    "green": (30, 200, 30),
    "cyan": (25, 210, 210),
    "blue": (40, 40, 235),
    "magenta": (215, 30, 215),
}
SHAPES = ("circle", "square", "triangle")
GROUNDS = ("plain", "striped", "checked")
MOTIONS: dict[str, tuple[int, int]] = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
CONCEPT = "diagonally"  # from the lower left to the upper right
DIRECTIONS: dict[str, tuple[int, int]] = {**MOTIONS, CONCEPT: (1, -1)}

GREYS = (70, 110)  # the two tones of a striped or checked ground
TILE = 8  # pixels; a stripe's or check's width, equal to a latent's block
EDGE = 1.0  # pixels; standard deviation of the blur that softens a shape's edge


@dataclass(frozen=True)
class Scene:
    """What one clip shows. Lengths are in pixels."""

    colour: str
    shape: str
    motion: str
    ground: str
    radius: float  # of the circle; the other shapes are scaled to look as large
    centre: tuple[float, float]  # x, y of the shape halfway through the clip
    travel: float  # along x, y or both


def random_scenes(count: int, seed: int, motions: Sequence[str] = tuple(MOTIONS)) -> list[Scene]:
    """Draw `count` scenes. The same seed gives the same scenes; a longer list begins with the shorter one."""
    rng = random.Random(seed)
    return [_random_scene(rng, motions) for _ in range(count)]


def _random_scene(rng: random.Random, motions: Sequence[str]) -> Scene:
    middle, jitter = SIDE / 2, 4.0
    return Scene(
        colour=rng.choice(tuple(COLOURS)),
        shape=rng.choice(SHAPES),
        motion=rng.choice(tuple(motions)),
        ground=rng.choice(GROUNDS),
        radius=rng.uniform(13.0, 15.0),
        centre=(middle + rng.uniform(-jitter, jitter), middle + rng.uniform(-jitter, jitter)),
        travel=rng.uniform(20.0, 26.0),
    )


def caption(scene: Scene) -> str:
    """Say what the clip shows; the ground is left unsaid."""
    return f"a {scene.colour} {scene.shape} moving {scene.motion}"


def render(scene: Scene) -> Frames:
    """Draw the clip: uint8 RGB of shape (9, 64, 64, 3)."""
    ground = draw_ground(scene.ground).astype(np.float32)
    colour = np.array(COLOURS[scene.colour], np.float32)
    step_x, step_y = DIRECTIONS[scene.motion]
    frames = np.empty((NUM_FRAMES, SIDE, SIDE, 3), np.uint8)
    for index in range(NUM_FRAMES):
        way = scene.travel * (index / (NUM_FRAMES - 1) - 0.5)
        x, y = scene.centre[0] + step_x * way, scene.centre[1] + step_y * way
        alpha = draw_mask(scene.shape, (x, y), scene.radius)[..., None]
        frames[index] = np.rint(ground + alpha * (colour - ground))
    return frames


def draw_ground(ground: str) -> Frames:
    """Draw the still ground: uint8 RGB of shape (64, 64, 3)."""
    rows, columns = np.indices((SIDE, SIDE)) // TILE
    pattern = {"plain": 0 * rows, "striped": columns % 2, "checked": (rows + columns) % 2}[ground]
    greys: NDArray[np.uint8] = np.array(GREYS, np.uint8)[pattern]
    return np.repeat(greys[..., None], 3, axis=2)


def draw_mask(shape: str, centre: tuple[float, float], radius: float) -> NDArray[np.float32]:
    """Draw a shape's soft mask: float32 (64, 64) in 0..1. Pixel (row, column) has its middle at (column, row)."""
    canvas = np.zeros((SIDE, SIDE), np.uint8)
    shift = 6  # fractional bits of OpenCV's fixed-point coordinates
    if shape == "circle":
        point = tuple(round(value * 2**shift) for value in centre)
        cv2.circle(canvas, point, round(radius * 2**shift), 255, cv2.FILLED, cv2.LINE_AA, shift)
    else:
        outline = np.array(centre) + radius * _OUTLINES[shape]
        cv2.fillConvexPoly(canvas, np.rint(outline * 2**shift).astype(np.int32), 255, cv2.LINE_AA, shift)
    soft: NDArray[np.float32] = cv2.GaussianBlur(canvas.astype(np.float32) / 255, (0, 0), EDGE)
    return soft


# Corners (x, y) for radius 1, the centre of gravity at 0; as large as the circle, the triangle a tenth less.
_OUTLINES: dict[str, NDArray[np.float64]] = {
    "square": 0.89 * np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)], np.float64),
    "triangle": 1.45 * np.array([(0, -1), (0.866, 0.5), (-0.866, 0.5)], np.float64),
}


def write_clips(folder: Path, scenes: Iterable[Scene]) -> list[Path]:
    """Write `000.mp4` with `000.txt` beside it, and so on, into `folder`; give back the videos' paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for index, scene in enumerate(scenes):
        path = folder / f"{index:03d}.mp4"
        write_clip(path, render(scene))
        path.with_suffix(".txt").write_text(caption(scene) + "\n", encoding="utf-8")
        paths.append(path)
    return paths


def write_clip(path: Path, frames: Frames) -> None:
    """Write frames, uint8 RGB of shape (frames, height, width, 3), as an H.264 video of 16 frames a second."""
    import av  # needed by few callers, and slow to import

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(FPS), options={"crf": "8", "preset": "veryfast"})
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        for pixels in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")))
        container.mux(stream.encode())


def read_clip(path: Path) -> Frames:
    """Read a whole short video: uint8 RGB of shape (frames, height, width, 3)."""
    import av

    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
