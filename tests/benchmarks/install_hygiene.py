"""What installing this pack does to ComfyUIs that already have other packages: nothing may be downgraded, all must still work.

    python tests/benchmarks/install_hygiene.py [--only TEXT] [--folder build/install] [--requirements requirements.txt] [--out FILE]

Each host is the environment of a ComfyUI (found as the host tests do; torch and other large packages are linked, not copied)
with some packages in versions that users have. Into it goes requirements.txt in one of four ways:

    manager   each line by `pip install` of its own, as ComfyUI-Manager does (torch, torchvision, torchaudio are left out)
    startup   the same, without the lines that were already fulfilled before, as the Manager does when ComfyUI starts (on Windows
              it installs then)
    uv        each line by `uv pip install`, the Manager's other way
    pip       `pip install -r requirements.txt`, by hand

Looked at before and after: versions, `pip check`, whether ComfyUI's tokenizers answer as before, whether ComfyUI starts (after:
with the pack, and its nodes are there), and after: whether the worker trains. A minute or more each; needs a package index.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "host"), str(ROOT / "tests" / "trainers")]

from by_path import train_by_path
from comfy_server import Server
from installation import ComfyUI, find_comfyui

LINKED = ("torch", "torchgen", "torchvision", "torchaudio", "nvidia", "triton", "functorch", "comfy_kitchen")
NOT_COMFYUIS = ("diffusers", "peft", "accelerate", "opencv-python", "opencv-python-headless")
SKIPPED = {"torch", "torchvision", "torchaudio"}

OLD = ("transformers==4.57.6", "huggingface_hub==0.36.0")
NEW = ("transformers==5.23.0", "huggingface_hub==2.4.0")
HOSTS: dict[str, tuple[str, ...]] = {
    "transformers 4.57": OLD,
    "transformers 4.57, diffusers 0.35.1, headless OpenCV 4.11": (*OLD, "diffusers==0.35.1", "opencv-python-headless==4.11.0.86"),
    "transformers 4.57, diffusers 0.39, OpenCV 4.11": (*OLD, "diffusers==0.39.0", "peft==0.17.1", "opencv-python==4.11.0.86"),
    "transformers 4.57, numpy 1.26": (*OLD, "numpy==1.26.4"),
    "transformers 4.57, numpy 1.26, headless OpenCV 4.11": (*OLD, "numpy==1.26.4", "opencv-python-headless==4.11.0.86"),
    "transformers 5.10, hub 1.24, diffusers 0.40": ("transformers==5.10.4", "huggingface_hub==1.24.0", "diffusers==0.40.0"),
    "transformers 5.23": NEW,
    "transformers 5.23, diffusers 0.35.2": (*NEW, "diffusers==0.35.2"),
    "transformers 5.23, diffusers 0.42, peft 0.21": (*NEW, "diffusers==0.42.1", "peft==0.21.2", "accelerate==1.15.0"),
}
CASES = [
    *((host, "manager") for host in HOSTS),
    ("transformers 4.57, diffusers 0.35.1, headless OpenCV 4.11", "startup"),
    ("transformers 4.57, diffusers 0.39, OpenCV 4.11", "startup"),
    *(("transformers 4.57", way) for way in ("startup", "uv", "pip")),
    *(("transformers 5.23, diffusers 0.42, peft 0.21", way) for way in ("startup", "uv", "pip")),
]


@dataclass(frozen=True)
class Environment:
    """A virtual environment in `folder`."""

    folder: Path

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    @property
    def packages(self) -> Path:
        return next(self.folder.glob("lib/python3*/site-packages"))

    def versions(self) -> dict[str, str]:
        listed = json.loads(self.pip("list", "--format=json").stdout)
        return {canonicalize_name(package["name"]): package["version"] for package in listed}

    def complaints(self) -> list[str]:
        """What `pip check` finds."""
        done = self.pip("check", may_fail=True)
        return done.stdout.splitlines() if done.returncode else []

    def pip(self, *arguments: str, may_fail: bool = False) -> subprocess.CompletedProcess[str]:
        return self.run("-m", "pip", *arguments, may_fail=may_fail)

    def run(self, *arguments: str, may_fail: bool = False) -> subprocess.CompletedProcess[str]:
        done = subprocess.run([self.python, *arguments], capture_output=True, text=True, check=False)
        if done.returncode and not may_fail:
            raise RuntimeError(f"{' '.join(arguments)}:\n{done.stdout}{done.stderr}")
        return done


def make_host(folder: Path, comfyui: ComfyUI, packages: tuple[str, ...]) -> Environment:
    """ComfyUI's environment without what only packs bring, with `packages`."""
    subprocess.run([comfyui.python, "-m", "venv", folder], check=True)
    host, source = Environment(folder), next(comfyui.python.parents[1].glob("lib/python3*/site-packages"))
    for entry in source.iterdir():
        target = host.packages / entry.name
        if entry.name.startswith(("pip", "setuptools")) or target.exists():
            continue
        copy = os.link if entry.name in LINKED else shutil.copy2
        if entry.is_dir():
            shutil.copytree(entry, target, copy_function=copy, symlinks=True)
        else:
            copy(entry, target)
    host.pip("uninstall", "--yes", *NOT_COMFYUIS)
    host.pip("install", *packages)
    return host


def lines_of(requirements: Path) -> list[str]:
    lines = [line.strip() for line in requirements.read_text("utf-8").splitlines()]
    return [line for line in lines if line and not line.startswith("#") and Requirement(line).name not in SKIPPED]


def install(host: Environment, requirements: Path, way: str) -> list[str]:
    """Install in one of the ways; the warnings that it gave."""
    if way == "pip":
        done = [host.pip("install", "-r", str(requirements))]
    elif way == "uv":
        uv = [sys.executable, "-m", "uv", "pip", "install", "--python", str(host.python)]
        done = [subprocess.run([*uv, line], capture_output=True, text=True, check=True) for line in lines_of(requirements)]
    else:
        lines = lines_of(requirements)
        if way == "startup":
            versions = host.versions()
            lines = [line for line in lines if not _fulfilled(versions, line)]
        done = [host.pip("install", line) for line in lines]
    return [line for each in done for line in each.stderr.splitlines() if "incompatible" in line or "conflict" in line]


def _fulfilled(versions: dict[str, str], line: str) -> bool:
    wanted = Requirement(line)
    version = versions.get(canonicalize_name(wanted.name))
    return version is not None and wanted.specifier.contains(version)


@dataclass(frozen=True)
class State:
    """What is seen of a host."""

    versions: dict[str, str]
    complaints: list[str]
    tokens: dict[str, Any] | str
    starts: bool | str


def look_at(host: Environment, comfyui: ComfyUI, folder: Path, packs: dict[str, Path] | None) -> State:
    here = ComfyUI(comfyui.root, host.python)
    return State(host.versions(), host.complaints(), _try(lambda: here.call("tokens.py")), _try(lambda: _starts(here, folder, packs)))


def _starts(comfyui: ComfyUI, folder: Path, packs: dict[str, Path] | None) -> bool:
    server = Server(comfyui, folder, packs=packs)
    try:
        server.start()
        return packs == {} or any(name.startswith("VideoTrainer_") for name in server.object_info())
    finally:
        server.kill()


def _try(call: Any) -> Any:
    """What a call returns, or the last line of why it failed."""
    try:
        return call()
    except Exception as error:
        return [line for line in str(error).splitlines() if line.strip()][-1]


def measure(name: str, ways: list[str], folder: Path, comfyui: ComfyUI, requirements: Path) -> Iterator[dict[str, Any]]:
    """The cases of one host, as they go into the result file."""
    host = make_host(folder / "host", comfyui, HOSTS[name])
    before = look_at(host, comfyui, folder / "before", packs={})
    for way in ways:
        copied = Environment(folder / way / "host")
        shutil.copytree(host.folder, copied.folder, copy_function=os.link, symlinks=True)
        yield {"host": name, "way": way} | _after(copied, before, way, folder / way, comfyui, requirements)
        shutil.rmtree(folder / way)


def _after(host: Environment, before: State, way: str, folder: Path, comfyui: ComfyUI, requirements: Path) -> dict[str, Any]:
    warnings = install(host, requirements, way)
    after = look_at(host, comfyui, folder / "after", packs=None)
    trained = _try(lambda: train_by_path(folder / "training", host.python, "-I", environment=comfyui.environment) and True)
    return {
        "changed": dict(_changes(before.versions, after.versions)),
        "downgraded": [f"{package} {old} -> {new}" for package, (old, new) in _pairs(before.versions, after.versions) if new < old],
        "pip check": {"before": before.complaints, "after": after.complaints},
        "same tokens": before.tokens == after.tokens if isinstance(after.tokens, dict) else after.tokens,
        "cv2": _try(lambda: host.run("-c", "import cv2; print(cv2.__version__)").stdout.strip()),
        "starts": {"before": before.starts, "after": after.starts},
        "trains": trained,
        "warnings of the installer": warnings,
    }


def _changes(before: dict[str, str], after: dict[str, str]) -> Iterator[tuple[str, str]]:
    for package in sorted(before.keys() | after.keys()):
        if before.get(package) != after.get(package):
            yield package, f"{before.get(package, 'none')} -> {after.get(package, 'none')}"


def _pairs(before: dict[str, str], after: dict[str, str]) -> Iterator[tuple[str, tuple[Version, Version]]]:
    for package in sorted(before.keys() & after.keys()):
        yield package, (Version(before[package]), Version(after[package]))


def is_clean(result: dict[str, Any]) -> bool:
    good = result["starts"]["after"] is True and result["trains"] is True and result["same tokens"] is True
    return good and not result["downgraded"] and not result["pip check"]["after"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="only cases whose `host: way` matches this regular expression")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "install", help="for the environments, on the disk of ComfyUI's")
    parser.add_argument("--requirements", type=Path, default=ROOT / "requirements.txt")
    parser.add_argument("--out", type=Path, help="result file")
    options = parser.parse_args()
    comfyui, results = find_comfyui(), []
    options.folder.mkdir(parents=True, exist_ok=True)
    for name in HOSTS:
        ways = [way for host, way in CASES if host == name and re.search(options.only, f"{name}: {way}")]
        if not ways:
            continue
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            for result in measure(name, ways, Path(folder), comfyui, options.requirements):
                results.append(result | {"clean": is_clean(result)})
                print(json.dumps(results[-1], indent=1), flush=True)
        if options.out:
            report = {"comfyui": comfyui.version, "requirements": lines_of(options.requirements), "cases": results}
            options.out.write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    return 0 if all(result["clean"] for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
