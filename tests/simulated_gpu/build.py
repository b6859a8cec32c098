"""Builds cpp/gpu.cpp on demand, once for each version of torch and of the source. Takes half a minute on one core."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

NAME = "simulated_gpu_module"
SOURCES = sorted((Path(__file__).parent / "cpp").iterdir())
_MAIN = Path(__file__).parent / "cpp" / "gpu.cpp"
_FLAGS = ["-O1", "-fPIC", "-shared", "-std=c++20", f"-DTORCH_EXTENSION_NAME={NAME}", "-DTORCH_API_INCLUDE_EXTENSION_H"]
_LIBRARIES = ["c10", "torch_cpu", "torch", "torch_python"]


class CannotBuildError(RuntimeError):
    """There is no C++ compiler, or torch is not a CPU build, or cpp/gpu.cpp does not fit this torch."""


def library() -> Path:
    """The compiled library, built if it is missing. Does not import torch: the GPU must exist before torch does.

    Raises CannotBuildError with the reason, including what the compiler printed.
    """
    version, compiler = importlib.metadata.version("torch"), shutil.which(os.environ.get("CXX", "g++"))
    if not version.endswith("+cpu") or compiler is None:
        raise CannotBuildError(f"the simulated GPU needs g++ (found: {compiler}) and a CPU build of torch (found: {version})")
    key = hashlib.sha256(f"{version} {sys.version} {compiler} {_FLAGS}".encode())
    for source in SOURCES:
        key.update(source.read_bytes())
    path = _cache_folder() / key.hexdigest()[:16] / f"{NAME}.so"
    if not path.exists():
        _compile(compiler, version, path)
    return path


def _cache_folder() -> Path:
    return Path(os.environ.get("SIMULATED_GPU_CACHE", Path.home() / ".cache" / "video-trainer-simulated-gpu"))


def _compile(compiler: str, version: str, path: Path) -> None:
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    torch = Path(spec.origin).parent
    includes = [torch / "include", torch / "include/torch/csrc/api/include", Path(sysconfig.get_paths()["include"])]
    linked = [f"-L{torch / 'lib'}", *(f"-l{name}" for name in _LIBRARIES), f"-Wl,-rpath,{torch / 'lib'}"]
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}")
    command = [compiler, *_FLAGS, *(f"-I{folder}" for folder in includes), str(_MAIN), "-o", str(unfinished), *linked]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        unfinished.unlink(missing_ok=True)
        raise CannotBuildError(f"cpp/gpu.cpp does not compile against torch {version}:\n{done.stderr[-3000:]}")
    os.replace(unfinished, path)  # two processes may build at once; either result is whole
