"""Text on pictures with OpenCV: measured, wrapped and cut to a width.

OpenCV 5 writes any script; older ones know ASCII only, so that accents are dropped there and other letters become "?".
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .pixels import opencv

Picture = npt.NDArray[np.uint8]
Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Lettering:
    """A colour (RGB), a scale of OpenCV's fonts (0.5 is about 11 pixels high) and a weight."""

    colour: Colour = (50, 50, 50)
    scale: float = 0.5
    bold: bool = False

    def width(self, text: str) -> int:
        """In pixels."""
        return int(opencv().getTextSize(drawable(text), self._font(), self.scale, 1)[0][0])

    def draw(self, picture: Picture, text: str, x: int, y: int) -> None:
        """One line from `x` on, its base line at `y`."""
        cv2 = opencv()
        cv2.putText(picture, drawable(text), (x, y), self._font(), self.scale, self.colour, 1, cv2.LINE_AA)

    def _font(self) -> int:
        cv2 = opencv()
        return int(cv2.FONT_HERSHEY_DUPLEX if self.bold else cv2.FONT_HERSHEY_SIMPLEX)

    def end(self, text: str, width: int) -> str:
        """The text, or as much of its end as fits (what tells files apart is at the end)."""
        kept = text
        while kept and self.width(f"...{kept}" if kept != text else kept) > width:
            kept = kept[1:]
        return kept if kept == text else f"...{kept}"

    def wrapped(self, text: str, width: int, most: int) -> list[str]:
        """The text in lines of at most `width` pixels; what is beyond `most` lines is cut and marked with three dots."""
        lines: list[str] = []
        for line in self._lines(" ".join(text.split()), width):
            if len(lines) == most:
                return [*lines[:-1], self._cut(lines[-1], width)]
            lines.append(line)
        return lines

    def _lines(self, text: str, width: int) -> Iterator[str]:
        """Broken between words; a word that is longer than a line, as in scripts without spaces, anywhere."""
        while text:
            fits = self._fitting(text, width)
            if fits < len(text) and (space := text.rfind(" ", 0, fits + 1)) > 0:
                fits = space
            yield text[:fits]
            text = text[fits:].lstrip()

    def _fitting(self, text: str, width: int) -> int:
        """How many of the first letters fit; at least one."""
        low, high = 1, min(len(text), width)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.width(text[:middle]) <= width else (low, middle - 1)
        return low

    def _cut(self, line: str, width: int) -> str:
        while line and self.width(f"{line}...") > width:
            line = line[:-1]
        return f"{line.rstrip()}..."


def drawable(text: str) -> str:
    """What this OpenCV can write of a text."""
    if text.isascii() or int(opencv().__version__.split(".")[0]) >= 5:
        return text
    letters = (char for char in unicodedata.normalize("NFKD", text) if not unicodedata.combining(char))
    return "".join(char if char.isascii() else "?" for char in letters)
