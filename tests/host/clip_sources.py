"""Under ComfyUI's Python: the folders that can be chosen, and which VIDEO objects are used where their file lies."""

from __future__ import annotations

import sys
from fractions import Fraction
from io import BytesIO
from pathlib import Path
from typing import Any

from inside import load_pack


def main(pack: str, input_folder: str, datasets: str, clip: str) -> dict[str, Any]:
    """`folders`: their names; `files`: for each kind of VIDEO its path, or None when its frames are written into another file."""
    host = sys.modules[load_pack(pack).__name__ + ".nodes.host"]
    found = {kind: host.whole_file(video) for kind, video in _videos(clip).items()}
    files = {kind: None if path is None else str(path) for kind, path in found.items()}
    return {"folders": _folders(host, input_folder, datasets), "files": files}


def _folders(host: Any, input_folder: str, datasets: str) -> list[str]:
    """In a ComfyUI that registers `datasets` folders. In older ones they are those of the input folder only."""
    import folder_paths

    folder_paths.set_input_directory(input_folder)
    folder_paths.folder_names_and_paths.pop("datasets", None)
    alone = host.clip_folders()
    folder_paths.folder_names_and_paths["datasets"] = ([datasets, str(Path(datasets) / "gone")], set())
    folders = host.clip_folders()
    assert alone.items() <= folders.items()
    assert all(folder.is_dir() for folder in folders.values())
    return list(folders)


def _videos(clip: str) -> dict[str, Any]:
    import torch
    from comfy_api.latest import InputImpl, Types

    def with_fields(**fields: Any) -> Any:
        """As newer ComfyUIs make them: what is trimmed or cropped stands in private fields beside the file."""
        video = InputImpl.VideoFromFile(clip)
        vars(video).update({f"_VideoFromFile__{name}": value for name, value in fields.items()})
        return video

    class Muted(InputImpl.VideoFromFile):
        pass

    return {
        "file": InputImpl.VideoFromFile(clip),
        "not trimmed": with_fields(start_time=0, duration=0.0, crop=None),
        "trimmed at the start": with_fields(start_time=0.5, duration=0),
        "trimmed at the end": with_fields(start_time=0, duration=0.5),
        "cropped": with_fields(crop=(0, 0, 8, 8)),
        "in memory": InputImpl.VideoFromFile(BytesIO(Path(clip).read_bytes())),
        "frames": InputImpl.VideoFromComponents(Types.VideoComponents(images=torch.zeros(2, 8, 8, 3), frame_rate=Fraction(16))),
        "of another kind": Muted(clip),
    }
