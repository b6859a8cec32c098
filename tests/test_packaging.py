"""What is published: only what users need, described in full, and nothing that the registry's scanner holds back.

The scanner reads files as text; a finding means that a person must look at the version before anyone can install it.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
from packed import ROOT, pack

pytest.importorskip("comfy_cli", reason="packing needs comfy-cli (requirements-test.txt)")

LARGEST_PACKED_MIB = 16
CODE = {".py", ".js", ".mjs", ".ts", ".html", ".sh", ".bat", ".ps1"}
FLAGGED = {
    r"\bsubprocess\.\w+\(": "trainers/launch.py",
    r"\bos\.environ\b": "trainers/environment.py",
    r"\bos\.(system|popen|getenv|putenv|spawn\w*|exec\w*|fork)\(": None,
    r"\bmultiprocessing\b|\bpty\b|\bctypes\b": None,
    r"\brequests\.\w+\(|\burlopen\(|\burlretrieve\(|\bhttpx?\.client\b|\baiohttp\.ClientSession": None,
    r"\bsocket\.(socket|create_connection)\(": None,
    r"(?<![\w.])(eval|exec|compile|__import__)\(": None,
    r"""["']pip3?["']|\bpip\.main\b|-m pip\b""": None,
    r"\b(pickle|marshal|dill)\.loads?\(|\bb64decode\(|\bfromhex\(": None,
    r"\bshell\s*=\s*True": None,
    r"\bnew Function\(|\bdocument\.write\(|\binnerHTML\b|\bimportScripts\(": None,
    r"sourceMappingURL|__webpack|\bvite\b": None,
}
"""What a scanner stumbles over, and the one file that may have it."""


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    return pack(tmp_path_factory.mktemp("packed") / "video-trainer")


@pytest.fixture(scope="module")
def code(packed):
    """Name -> text of every file with code."""
    files = (path for path in sorted(packed.rglob("*")) if path.suffix in CODE)
    return {path.relative_to(packed).as_posix(): path.read_text("utf-8") for path in files}


def test_only_what_users_need_is_packed(packed):
    there = {path.name for path in packed.iterdir()}
    assert there <= {
        *("__init__.py", "nodes", "trainers", "web", "workflows"),
        *("pyproject.toml", "requirements.txt", "README.md", "CHANGELOG.md", "LICENSE", "docs", "locales", "subgraphs"),
    }
    assert there >= {"__init__.py", "nodes", "trainers", "web", "workflows", "pyproject.toml", "requirements.txt", "LICENSE", "README.md"}
    size = packed.with_suffix(".zip").stat().st_size / 2**20
    print(f"packed: {size:.1f} MiB, {sum(path.is_file() for path in packed.rglob('*'))} files")
    assert size <= LARGEST_PACKED_MIB


@pytest.mark.parametrize("pattern", FLAGGED)
def test_the_scanner_finds_nothing_to_hold_back(code, pattern):
    found = {name for name, text in code.items() if re.search(pattern, text)}
    assert found <= {FLAGGED[pattern]}


def test_the_patterns_find_what_they_are_for():
    bad = (
        *("subprocess.run(", "os.environ[", "os.system(", "from multiprocessing import", "requests.get(", "socket.socket("),
        *("x = eval(", '[python, "-m", "pip"', "pickle.loads(", "shell=True", "new Function(", "//# sourceMappingURL"),
    )
    assert [pattern for pattern, text in zip(FLAGGED, bad, strict=True) if not re.search(pattern, text)] == []
    assert not any(re.search(pattern, "model.eval()") for pattern in FLAGGED)


def test_one_process_is_started_with_nothing_that_a_user_wrote(code):
    """The arguments are constants, this Python, the worker's path and the run's folder, which the pack itself names.

    `check` starts helpers of its own lines in a folder of its own, and asks nvidia-smi.
    """
    assert code["trainers/launch.py"].count("subprocess.Popen(") == code["trainers/launch.py"].count("subprocess.check_output(") == 1
    users = {name for name, text in code.items() if re.search(r"\b(start_apart|answer_of|helper_command)\(", text)}
    assert users == {"trainers/launch.py", "trainers/selftest/file_checks.py", "trainers/nvidia_smi.py"}
    assert "[*python, str(WORKER), str(run.folder)]" in code["trainers/launch.py"]


def test_the_registrys_own_check_is_silent(packed):
    command = [sys.executable, "-m", "ruff", "check", ".", "--isolated", "-q", "--select", "S102,S307,E702"]
    done = subprocess.run(command, cwd=packed, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_scripts_are_written_by_hand_and_load_nothing_from_elsewhere(packed):
    for path in [path for path in (packed / "web").rglob("*") if path.suffix in {".js", ".css"}]:
        text = path.read_text("utf-8")
        assert max(map(len, text.splitlines())) <= 200, f"{path.name} looks like a bundler's"
        assert set(re.findall(r"https?://[^\s\"'`)]+", text)) <= {"http://www.w3.org/2000/svg"}, path.name
        imported = re.findall(r"""(?:\bfrom|\bimport|\bimport\()\s*["']([^"']+)""", text)
        assert [name for name in imported if not name.startswith(("./", "../../scripts/"))] == [], path.name


def test_one_script_does_something_when_it_is_loaded(packed):
    """ComfyUI loads every script below `web/` by itself: all but the entry may only declare."""
    declares = re.compile(r"(import|export|const|let|async function|function|class|//|/\*|\*| |[})\]])|$")
    for path in (packed / "web").rglob("*.js"):
        acts = [line for line in path.read_text("utf-8").splitlines() if not declares.match(line)]
        assert bool(acts) == (path.name == "video_trainer.js"), f"{path.name}: {acts}"


def test_the_registry_reads_the_description(packed, monkeypatch):
    from comfy_cli.registry import config_parser

    monkeypatch.chdir(packed)
    config = config_parser.extract_node_configuration()
    project, comfy = config.project, config.tool_comfy
    assert project.name == "video-trainer"
    assert re.fullmatch(r"\d+\.\d+\.\d+", project.version)
    assert project.description
    assert comfy.publisher_id
    assert comfy.display_name
    assert not comfy.web, "WEB_DIRECTORY says it already; twice would load each script twice"
    assert project.supported_comfyui_version == ">=0.8.0"
    assert project.supported_os == ["OS Independent"]
    assert project.supported_accelerators == ["GPU :: NVIDIA CUDA"]
    lines = (ROOT / "requirements.txt").read_text("utf-8").splitlines()
    assert project.dependencies == [line for line in lines if line and not line.startswith("#")]


def test_each_template_has_a_picture(packed):
    """ComfyUI lists `workflows/*.json`, with a picture of the same name."""
    names = {path.stem for path in (packed / "workflows").glob("*.json")}
    assert names
    assert {path.stem for path in (packed / "workflows").glob("*.jpg")} == names
    assert [path.name for path in (packed / "workflows").iterdir() if path.is_dir()] == []
    assert all(json.loads(path.read_text("utf-8"))["nodes"] for path in (packed / "workflows").glob("*.json"))
