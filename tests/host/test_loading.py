"""ComfyUI loads the pack from a folder of any name, fast, and says what is wrong when it cannot."""

from __future__ import annotations

import compileall
import re
import shutil
from pathlib import Path

import pytest
from comfy_server import PACK_FOLDER, link_folder
from installation import PACK

PROMISED = {
    *("BaseModel", "LoadTransformer", "LoadEncoders"),
    *("DatasetFromFolder", "DatasetFromClips", "MergeDatasets", "InspectDataset", "EncodeDataset", "Previews"),
    *("TrainLoRA", "WaitForRun", "ApplyLoRA", "ApplyControlLoRA"),
}
"""Ids, without their prefix, that saved workflows hold."""

HEAVY = {"diffusers", "transformers", "peft", "accelerate", "cv2"}
LONGEST_IMPORT_SECONDS = 0.3

_FAILING_IMPORT = "raise RuntimeError('on purpose')"
_FAILING_SCHEMA = """

def _fails(cls):
    raise RuntimeError('on purpose')

BaseModel.define_schema = classmethod(_fails)
"""


@pytest.fixture(scope="module")
def nodes_of_the_pack(server):
    return {name: info for name, info in server.object_info().items() if info["python_module"] == f"custom_nodes.{PACK_FOLDER}"}


def _inputs(info):
    return {name: spec for kind in ("required", "optional") for name, spec in info["input"].get(kind, {}).items()}


def test_every_node_is_there(nodes_of_the_pack):
    written = {
        name for file in (PACK / "nodes").glob("*.py") for name in re.findall(r"class (\w+)\(io\.ComfyNode\)", file.read_text("utf-8"))
    }
    assert set(nodes_of_the_pack) == {f"VideoTrainer_{name}" for name in written}
    assert written == PROMISED


def test_every_input_and_output_says_what_it_is_for(nodes_of_the_pack):
    silent = [
        f"{name}.{label}"
        for name, info in nodes_of_the_pack.items()
        for label, tooltip in [
            *((label, (spec[1] if len(spec) > 1 else {}).get("tooltip")) for label, spec in _inputs(info).items()),
            *zip(info["output_name"], info.get("output_tooltips") or [None] * len(info["output_name"]), strict=True),
        ]
        if not tooltip
    ]
    assert silent == []
    assert [name for name, info in nodes_of_the_pack.items() if not info["description"]] == []


def test_all_are_found_in_one_place(nodes_of_the_pack):
    assert {info["category"].split("/")[0] for info in nodes_of_the_pack.values()} == {"Video Trainer"}


def test_the_log_of_the_start_has_no_complaint(server):
    start = server.log.split("To see the GUI go to")[0]
    lines = [line for line in start.splitlines() if re.search(r"error|traceback|failed|warning|video.trainer", line, re.IGNORECASE)]
    ours = [line for line in lines if PACK_FOLDER in line or "Video Trainer" in line or "Traceback" in line]
    assert len(ours) == 1, ours
    assert re.fullmatch(rf" +[0-9.]+ seconds: \S*{PACK_FOLDER}", ours[0])


@pytest.fixture(scope="module")
def custom_nodes(tmp_path_factory):
    return tmp_path_factory.mktemp("custom_nodes")


@pytest.fixture(scope="module")
def loaded_packs(comfyui, custom_nodes):
    """What ComfyUI says of this pack ("whole"), and of copies in which something fails. One process loads all: its start takes seconds."""
    folder = custom_nodes
    for part in ("nodes", "trainers"):
        compileall.compile_dir(PACK / part, quiet=1)
    link_folder(folder / PACK_FOLDER, PACK)
    _break(folder / "broken-frame", "nodes/__init__.py", _FAILING_IMPORT)
    _break(folder / "broken-module", "nodes/models.py", _FAILING_IMPORT)
    _break(folder / "broken-schema", "nodes/models.py", (PACK / "nodes/models.py").read_text("utf-8") + _FAILING_SCHEMA)
    names = [PACK_FOLDER, "broken-frame", "broken-module", "broken-schema"]
    return dict(zip(names, comfyui.call("load_packs.py", folders=[str(folder / name) for name in names]), strict=True))


def _break(folder: Path, file: str, content: str) -> None:
    shutil.copytree(PACK / "nodes", folder / "nodes", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(PACK / "__init__.py", folder)
    link_folder(folder / "trainers", PACK / "trainers")
    (folder / file).write_text(content, "utf-8")


def test_the_import_is_fast_and_loads_nothing_heavy(loaded_packs, comfyui, custom_nodes):
    """The processor's seconds, since the clock counts other processes, too; the fewest of three, since those slow a processor down."""
    pack = loaded_packs[PACK_FOLDER]
    assert pack["loaded"], pack["log"]
    print(f"import: {pack['seconds']:.3f} s, {pack['processor_seconds']:.3f} s of the processor, {len(pack['modules'])} modules")
    assert {name.split(".")[0] for name in pack["modules"]} & HEAVY == set()
    seconds = [pack["processor_seconds"]]
    while min(seconds) > LONGEST_IMPORT_SECONDS and len(seconds) < 3:
        (again,) = comfyui.call("load_packs.py", folders=[str(custom_nodes / PACK_FOLDER)])
        seconds.append(again["processor_seconds"])
    assert min(seconds) <= LONGEST_IMPORT_SECONDS


@pytest.mark.parametrize(("name", "file"), [("frame", "nodes/__init__.py"), ("module", "nodes/models.py"), ("schema", "nodes/models.py")])
def test_a_pack_that_cannot_be_loaded_shows_the_traceback(loaded_packs, name, file):
    broken = loaded_packs[f"broken-{name}"]
    assert not broken["loaded"]
    assert "Traceback" in broken["log"]
    assert "on purpose" in broken["log"]
    assert str(Path(f"broken-{name}", file)) in broken["log"]
