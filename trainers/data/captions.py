"""Captions: one text file beside each clip, of the same stem."""

from __future__ import annotations

from pathlib import Path

from ..errors import DatasetError, Problem

MAX_CAPTION_BYTES = 64 * 1024
"""More than any text encoder reads by far; a larger file is not a caption."""


def caption_path(clip: Path) -> Path:
    """Where the caption of a clip is: `walk.mp4` -> `walk.txt`."""
    return clip.with_suffix(".txt")


def read_caption(path: Path) -> str:
    """The whole text of a caption file as one caption, without the white space around it and with Unix line ends.

    UTF-8, with or without a byte order mark. Raises DatasetError when there is none, it is empty or not UTF-8.
    """
    name = shown(path.name)
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_CAPTION_BYTES + 1)
    except FileNotFoundError:
        raise _unusable("no caption", "every clip needs a text file of its name", f"Write one in {name}.") from None
    except OSError as error:
        raise _unusable(f"{name} cannot be read ({error.strerror})", "a caption is a text file", "Check its permissions.") from None
    if len(content) > MAX_CAPTION_BYTES:
        raise _unusable(f"{name} is larger than {MAX_CAPTION_BYTES // 1024} KiB", "a caption is a short text", "Check what the file is.")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _unusable(f"{name} is not UTF-8 (byte {error.start})", "captions are UTF-8", "Save it as UTF-8.") from None
    caption = tidy_caption(text)
    if not caption or "\0" in caption:
        value = f"{name} holds zero bytes" if caption else f"{name} is empty"
        raise _unusable(value, "a caption says what is to be seen", "Write what the clip shows.")
    return caption


def tidy_caption(text: str) -> str:
    """A caption without the white space around it and with Unix line ends."""
    return "\n".join(text.strip().splitlines())


def shown(name: str) -> str:
    """A file name fit for one line of a message: control characters and undecodable bytes as escapes."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape", "backslashreplace").decode() for char in name)


def _unusable(value: str, rule: str, remedy: str) -> DatasetError:
    return DatasetError(Problem(value, rule, remedy))
