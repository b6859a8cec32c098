"""The files that the registry's own program packs, as a user gets them."""

from __future__ import annotations

import os
import warnings
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def pack(folder: Path) -> Path:
    """The published archive of the files that git knows, unpacked in `folder`; its size is that of `folder.zip`."""
    from comfy_cli import file_utils

    archive, here = folder.with_suffix(".zip"), Path.cwd()
    os.chdir(ROOT)  # it packs the working folder
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of a name in pathspec that it uses
            file_utils.zip_files(str(archive))
    finally:
        os.chdir(here)
    with zipfile.ZipFile(archive) as packed:
        packed.extractall(folder)
    return folder
