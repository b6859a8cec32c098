"""Every call into ComfyUI's internals: its folders, memory, queue and server."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils
import comfyui_version
import folder_paths
import torch
from aiohttp.web import RouteTableDef
from comfy_api.latest import InputImpl
from comfy_execution.graph_utils import ExecutionBlocker
from server import PromptServer

import nodes as core_nodes

from ..trainers.data.scan import Progress
from ..trainers.errors import LoraError, Problem

NONE = "none"
"""The choice of no file."""

_MISSING = "missing.txt"
_SHARD = re.compile(r"-\d{5}-of-\d{5}$")


# Folders. Nothing is ever written into the pack's own.


def state_folder() -> Path:
    """Where runs and encoded data live; not served over HTTP."""
    return Path(folder_paths.get_system_user_directory("video_trainer"))


def runs_folder() -> Path:
    return state_folder() / "runs"


def encoded_folder() -> Path:
    """One folder for every data set: each version of each has its own identity, and they share what is encoded."""
    return state_folder() / "encoded"


def note_missing() -> None:
    """Some of what was encoded is no longer there: nodes that encode look at every clip and prompt again."""
    with suppress(OSError):
        (encoded_folder() / _MISSING).parent.mkdir(parents=True, exist_ok=True)
        (encoded_folder() / _MISSING).write_text("Some encoded files were missing.\n")


def missing_since() -> int:
    """When `note_missing` was last called, in nanoseconds since 1970; 0 when never."""
    try:
        return (encoded_folder() / _MISSING).stat().st_mtime_ns
    except OSError:
        return 0


def loras_folder() -> Path:
    """Below the output folder: ComfyUI lists LoRAs there without a restart."""
    return Path(folder_paths.get_output_directory()) / "loras"


def input_folder() -> Path:
    return Path(folder_paths.get_input_directory())


def clip_folders() -> dict[str, Path]:
    """Folders that may hold clips, by the names that a user chooses from.

    They lie below the input folder, two levels deep, and below the `datasets` folders of newer ComfyUIs.
    """
    found = {folder.relative_to(input_folder()).as_posix(): folder for folder in _folders_below(input_folder(), 2)}
    for root in folder_paths.folder_names_and_paths.get("datasets", ([], None))[0]:
        for folder in _folders_below(Path(root), 2):
            found.setdefault(f"{folder.relative_to(root).as_posix()} (datasets)", folder)
    return found


def _folders_below(root: Path, levels: int) -> Iterator[Path]:
    """In the order of the names; hidden ones and those that cannot be read are passed over."""
    with suppress(OSError):
        for entry in sorted(os.scandir(root), key=lambda entry: entry.name):
            if entry.is_dir() and not entry.name.startswith("."):
                yield Path(entry.path)
                if levels > 1:
                    yield from _folders_below(Path(entry.path), levels - 1)


# Model files


def model_choices(kind: str) -> list[str]:
    """Names that a user can choose from: files of ComfyUI's list `kind`, the shards of one model as their folder.

    For transformers ("diffusion_models") and VAEs also the checkpoints, which hold both; for these and text encoders the whole
    models below `models/diffusers`.
    """
    names = dict.fromkeys(_without_shards(name) for of in _lists(kind) for name in folder_paths.get_filename_list(of))
    return [*names, *(name for name, _ in _diffusers_models() if name not in names)]


def model_path(kind: str, name: str) -> Path:
    """Where a choice of `model_choices` is. Raises ValueError when it is there no longer."""
    full = (folder_paths.get_full_path(of, name) for of in _lists(kind))
    found = next(filter(None, full), None) or dict(_diffusers_models()).get(name)
    for folder in (folder for of in _lists(kind) for folder in folder_paths.get_folder_paths(of)):
        if found is None and (Path(folder) / name).is_dir():
            found = Path(folder) / name
    if found is None:
        raise ValueError(f"{name} is no longer among ComfyUI's {kind}. Press R to refresh the lists and choose again.")
    return Path(found).absolute()


def _lists(kind: str) -> tuple[str, ...]:
    """ComfyUI's lists in which a file of the kind may be: a checkpoint holds a transformer and its VAE (LTX-Video)."""
    return (kind, "checkpoints") if kind in ("diffusion_models", "vae") else (kind,)


def file_path(kind: str, name: str) -> Path | None:
    """Where a file of ComfyUI's list `kind` is, as the core loaders find it; None when there is none."""
    found = folder_paths.get_full_path(kind, name)
    return None if found is None else Path(found).absolute()


def lora_names() -> list[str]:
    """Every LoRA file, as the LoRA loaders list them."""
    return list(folder_paths.get_filename_list("loras"))


def lora_path(name: str) -> Path:
    """Where a LoRA is: a full path, or a name as the LoRA loaders list it. Raises ValueError when there is none."""
    found = name if Path(name).is_file() else folder_paths.get_full_path("loras", name)
    if found is None:
        raise ValueError(f"There is no LoRA {name!r}; it must be a file that the LoRA loaders list, or a full path. Check its name.")
    return Path(found).absolute()


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a LoRA's file. Raises LoraError for one that is damaged."""
    try:
        return dict(comfy.utils.load_torch_file(str(path), safe_load=True))
    except Exception as error:  # each format fails in ways of its own
        problem = Problem(f"{path.name} cannot be read ({error})", "a LoRA's file must be whole", "Copy, download or train it again.")
        raise LoraError(str(problem)) from None


def _without_shards(name: str) -> str:
    """A file's name; for one shard of several, the name of their folder."""
    path = Path(name)
    return str(path.parent) if _SHARD.search(path.stem) and path.parent != Path() else name


def _diffusers_models() -> Iterator[tuple[str, Path]]:
    """(name, folder) of every model in diffusers' layout below `models/diffusers`."""
    for root in folder_paths.get_folder_paths("diffusers"):
        for index in sorted(Path(root).glob("*/model_index.json")):
            yield index.parent.name, index.parent


# Nodes


def is_core_node(class_type: str) -> bool:
    """Whether the node of this name is ComfyUI's own, not one of a pack that took its place."""
    return getattr(core_nodes.NODE_CLASS_MAPPINGS.get(class_type), "__module__", "") == core_nodes.__name__


def blocked(why: str) -> Any:
    """What an output gives that has nothing: a node that is wired to it does not run, and says why."""
    return ExecutionBlocker(why)


def loading() -> tuple[str, ...]:
    """What decides, besides the file, how ComfyUI's loaders make a VAE or CLIP of it."""
    manage = comfy.model_management
    text_device, vae_device = manage.text_encoder_device(), manage.vae_device()
    dtypes = (manage.text_encoder_dtype(text_device), manage.vae_dtype(vae_device, [torch.bfloat16, torch.float32]))
    return (comfyui_version.__version__, text_device.type, vae_device.type, *map(str, dtypes))


# Videos


def whole_file(video: Any) -> Path | None:
    """The file that a VIDEO is; None for a part of one (newer ComfyUIs trim and crop), one in memory and one made of frames."""
    stated = [value for value in vars(video).values() if value] if type(video) is InputImpl.VideoFromFile else []
    return Path(stated[0]).absolute() if len(stated) == 1 and isinstance(stated[0], str) else None


# Memory and progress


def free_memory(also_ram: bool) -> None:
    """Give the card to the training: models leave it now; with `also_ram`, ComfyUI forgets them once this prompt ends."""
    comfy.model_management.unload_all_models()
    comfy.model_management.soft_empty_cache()
    if also_ram:
        PromptServer.instance.prompt_queue.set_flag("free_memory", True)


def free_memory_when_idle() -> None:
    """Models leave the card as soon as no prompt runs; from any thread."""
    PromptServer.instance.prompt_queue.set_flag("unload_models", True)


def cancelled() -> bool:
    """Whether the user asked to cancel the prompt. The question alone changes nothing."""
    return bool(comfy.model_management.processing_interrupted())


Interrupted = comfy.model_management.InterruptProcessingException
"""What ends a node that the user has cancelled."""


def stop_if_cancelled() -> None:
    """Ends the node, as ComfyUI's own do, when the user has cancelled the prompt."""
    comfy.model_management.throw_exception_if_processing_interrupted()


def progress() -> Progress:
    """A progress bar on the node that runs now."""
    bar = comfy.utils.ProgressBar(1)

    def show(done: int, total: int, what: str) -> None:
        bar.update_absolute(done, total)

    return show


# Server


def routes() -> RouteTableDef | None:
    """Where routes are added while nodes are loaded; None where nodes are used without a server."""
    server = getattr(PromptServer, "instance", None)
    return None if server is None else server.routes


def send(event: str, data: dict[str, Any]) -> None:
    """Tell every open page; from any thread."""
    PromptServer.instance.send_sync(event, data)
