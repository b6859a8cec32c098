"""What the loader before an input would give, told from the prompt alone, so that a warm run need not load it.

A loader is known by its class, its widget values, and the size and time of change of its files. When its object was last
seen, its identity was noted in a journal: the same loader gives the same object again. Any other node is unknown.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..trainers import journal
from ..trainers.content_hash import content_hash
from ..trainers.transformers_folder import TransformersFolder
from . import host
from .models import chosen_path
from .prompt import Prompt, class_of, inputs_of, is_link
from .schema import PREFIX

_LOAD_ENCODERS, _BASE_MODEL = f"{PREFIX}LoadEncoders", f"{PREFIX}BaseModel"

Widgets = Mapping[str, Any]


def fingerprint(prompt: Prompt | None, node_id: str, input_id: str) -> str | None:
    """A hash of what an input of a node is wired to; None when that is no known loader."""
    link = inputs_of(prompt, node_id).get(input_id)
    source = _source(prompt, link[0]) if prompt and is_link(link) else None
    if source is None:
        return None
    class_type, widgets = source
    paths = list(_FILES[class_type](widgets))
    if not paths or any(path is None for path in paths):
        return None
    files = [_state(file) for path in paths if path for file in _all_files(path)]
    return content_hash([class_type, link[1], dict(widgets), files, host.loading()])


def known_identity(loader: str | None) -> str | None:
    """The identity of what a loader gave when it was last used; None when that is not known."""
    records, _ = journal.read(_journal()) if loader else ([], 0)
    found = [record["identity"] for record in records if record.get("loader") == loader]
    return str(found[-1]) if found else None


def note_identity(loader: str | None, identity: str) -> None:
    """Keeps what a loader gave."""
    if loader and known_identity(loader) != identity:
        _journal().parent.mkdir(parents=True, exist_ok=True)
        journal.append(_journal(), {"loader": loader, "identity": identity})


def _journal() -> Path:
    return host.state_folder() / "loaders.jsonl"


def _source(prompt: Prompt, node_id: str) -> tuple[str, Widgets] | None:
    """The node whose widgets name the files of a loader: the loader itself, or the Base Model before Load Encoders."""
    class_type, widgets = class_of(prompt, node_id), inputs_of(prompt, node_id)
    if class_type == _LOAD_ENCODERS:
        link = widgets.get("base")
        return _source(prompt, link[0]) if is_link(link) else None
    known = class_type == _BASE_MODEL or (class_type in _FILES and host.is_core_node(class_type))
    return (class_type, widgets) if known and not any(is_link(value) for value in widgets.values()) else None


def _base_files(widgets: Widgets) -> Iterator[Path | None]:
    for name in ("vae", "text_encoder", "text_encoder_2", "clip_vision"):
        try:
            path = chosen_path(name, str(widgets.get(name, host.NONE)))
        except ValueError:
            yield None
        else:
            yield from (path,) if path else ()


def _files(kind: str, *names: str) -> Callable[[Widgets], Iterator[Path | None]]:
    def files(widgets: Widgets) -> Iterator[Path | None]:
        return (host.file_path(kind, str(widgets.get(name))) for name in names)

    return files


_FILES: Mapping[str, Callable[[Widgets], Iterator[Path | None]]] = {
    "VAELoader": _files("vae", "vae_name"),
    "CLIPLoader": _files("text_encoders", "clip_name"),
    "DualCLIPLoader": _files("text_encoders", "clip_name1", "clip_name2"),
    "CLIPVisionLoader": _files("clip_vision", "clip_name"),
    _BASE_MODEL: _base_files,
}
"""The files of each known loader by its widgets; None for one that is not there."""


def _all_files(path: Path) -> Iterator[Path]:
    """All that is read with a file or folder: what a folder holds, and a tokenizer beside it."""
    layout = TransformersFolder.find(path)
    folders = (layout.folder, layout.tokenizer) if layout else (path,) if path.is_dir() else ()
    yield from sorted(file for folder in folders for file in folder.rglob("*") if file.is_file()) or (path,)


def _state(path: Path) -> tuple[str, int, int]:
    status = path.stat()
    return str(path), status.st_size, status.st_mtime_ns
