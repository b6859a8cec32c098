"""The rules that keep the parts apart, checked on the source itself."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TRAINERS = sorted((ROOT / "trainers").rglob("*.py"))
NODES = sorted((ROOT / "nodes").glob("*.py"))
ENTRIES = {"trainers/worker.py", "trainers/__main__.py"}  # started by path: they cannot import relatively
COMFY = {"comfy", "comfy_api", "comfy_extras", "comfy_execution", "folder_paths", "nodes", "server", "execution", "node_helpers"}
HEAVY = {"diffusers", "transformers", "peft", "accelerate", "cv2", "bitsandbytes", "prodigyopt"}
LONGEST_FUNCTION, LONGEST_FILE = 70, 500


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _module(path: Path) -> str:
    return _name(path).removesuffix(".py").replace("/", ".").removesuffix(".__init__")


def _imports(path: Path) -> Iterator[tuple[str, int]]:
    """(absolute module name, number of leading dots) of every import in a file, however deep."""
    package = _module(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, 0) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield base, node.level
            yield from ((f"{base}.{alias.name}", node.level) for alias in node.names)


def _tracked() -> list[Path]:
    names = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, check=True
    )
    return [ROOT / name for name in names.stdout.decode().split("\0") if name and (ROOT / name).is_file()]


def _outside_strings(path: Path, pattern: str) -> list[str]:
    """Lines of code (not of docstrings or comments) that match."""
    tree = ast.parse(path.read_text("utf-8"))
    return [
        text for node in ast.walk(tree) if isinstance(node, (ast.Attribute, ast.Name)) and re.search(pattern, text := ast.unparse(node))
    ]


@pytest.mark.parametrize("path", TRAINERS, ids=_name)
def test_imports_of_a_trainer_module(path):
    for module, level in _imports(path):
        top = module.split(".")[0]
        assert level or top not in COMFY, f"{_name(path)} imports ComfyUI's {module}"
        assert level or top != "trainers" or _name(path) in ENTRIES, f"{_name(path)} must import {module} relatively"
        if not _module(path).startswith(("trainers.demo", "trainers.cli")):
            assert not module.startswith("trainers.demo"), "nothing rests on the demo"
        if _module(path).startswith("trainers.families."):
            assert not module.startswith("trainers.trainer"), "a family knows no trainer"
            if module.startswith("trainers.families."):
                family = path.stem.lstrip("_").split("_")[0]
                own = (f"trainers.families.{family}", f"trainers.families._{family}_")
                assert module.startswith(own), "families do not know each other"
        if _module(path).startswith("trainers.offload"):
            allowed = module.startswith("trainers.offload") if level else top in {"torch", *sys.stdlib_module_names}
            assert allowed, f"{_name(path)} imports {module}; offload knows only torch and itself"


@pytest.mark.parametrize("path", TRAINERS + NODES, ids=_name)
def test_a_module_can_be_read_at_a_sitting(path):
    text = path.read_text("utf-8")
    assert text.count("\n") <= LONGEST_FILE
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < LONGEST_FUNCTION, f"{node.name} in {_name(path)} is too long"


def test_one_module_starts_processes():
    users = {
        _name(path) for path in TRAINERS if any(module.split(".")[0] in {"subprocess", "multiprocessing"} for module, _ in _imports(path))
    }
    users |= {
        _name(path) for path in TRAINERS if _outside_strings(path, r"^os\.(system|popen|exec\w*|spawn\w*|posix_spawn\w*|startfile|fork)$")
    }
    assert users == {"trainers/launch.py"}


def test_one_module_touches_the_environment():
    users = {_name(path) for path in TRAINERS if _outside_strings(path, r"^os\.(environ\w*|getenv\w*|putenv)$")}
    assert users == {"trainers/environment.py"}


def test_nothing_of_the_machine_is_committed():
    # Put together here, so that this file does not match itself.
    pattern = re.compile(
        "|".join(re.escape(start + rest) for start, rest in (("/wo", "rk/"), ("/ro", "ot/"), ("/ho", "me/"), ("/Us", "ers/")))
    )
    found = []
    for path in _tracked():
        try:
            text = path.read_text("utf-8")
        except UnicodeDecodeError:
            continue
        found += [f"{_name(path)}: {match[0]}" for match in pattern.finditer(text)]
    assert found == []


def _loaded_by(code: str) -> set[str]:
    program = f"import sys, json\n{code}\nprint(json.dumps(sorted({{name.split('.')[0] for name in sys.modules}})))"
    answer = subprocess.run([sys.executable, "-P", "-c", program], cwd=ROOT.parent, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    return set(json.loads(answer.stdout.splitlines()[-1]))


# As ComfyUI does it: the pack is a module named after its folder, and no package `trainers` can be found.
_LOAD_PACK = """
import importlib.util
spec = importlib.util.spec_from_file_location("/packs/video-trainer", {init!r}, submodule_search_locations=[{root!r}])
pack = importlib.util.module_from_spec(spec)
sys.modules["/packs/video-trainer"] = pack
spec.loader.exec_module(pack)
"""


def test_importing_the_pack_loads_nothing_heavy():
    loaded = _loaded_by(_LOAD_PACK.format(init=str(ROOT / "__init__.py"), root=str(ROOT)))
    assert loaded & (HEAVY | COMFY | {"torch", "pydantic"}) == set()


def test_every_trainer_module_can_be_imported_in_the_pack_without_anything_heavy():
    """One process imports all: as parts of the pack, none may need `trainers` or load a heavy library.

    The demo is a program of its own, which only its verb imports.
    """
    parts = [path for path in TRAINERS if _name(path) not in ENTRIES and not _module(path).startswith("trainers.demo.")]
    modules = [f"/packs/video-trainer.{_module(path)}" for path in parts]
    imports = "import importlib\n" + "\n".join(f"importlib.import_module({module!r})" for module in modules)
    loaded = _loaded_by(_LOAD_PACK.format(init=str(ROOT / "__init__.py"), root=str(ROOT)) + imports)
    assert loaded & (HEAVY | COMFY | {"trainers"}) == set()


def _requirements(name: str, separator: str) -> dict[str, str]:
    lines = [line for line in (ROOT / name).read_text().splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(rf"[A-Za-z0-9_-]+{separator}[0-9.]+", line) for line in lines), f"{name}: every line is NAME{separator}VERSION"
    return {
        package.replace("opencv-python-headless", "opencv-python"): version
        for package, version in (line.split(separator) for line in lines)
    }


def test_requirements_are_lower_bounds_that_are_tested():
    declared, lowest, tested = (
        _requirements(name, separator)
        for name, separator in (("requirements.txt", ">="), ("requirements-lowest.txt", "=="), ("requirements-test.txt", "=="))
    )
    assert not declared.keys() & {"torch", "torchvision", "torchaudio", "numpy", "xformers"}
    assert next(iter(declared)) == "transformers", "it must be installed first; requirements.txt says why"
    padded = {package: version if version.count(".") > 1 else f"{version}.0" for package, version in declared.items()}
    assert padded.items() <= lowest.items()
    assert declared.keys() | {"torch"} <= tested.keys()


def test_test_files_have_names_of_their_own():
    """Pytest imports them by their bare names: of two alike it would refuse one."""
    names = [path.name for path in (ROOT / "tests").rglob("*.py") if path.name != "conftest.py"]
    assert sorted(names) == sorted(set(names))


def test_the_project_file_names_what_is_there():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    version = re.search(r'__version__ = "(.+)"', (ROOT / "trainers" / "__init__.py").read_text())
    assert version
    assert version[1] == project["project"]["version"]
    assert "web" not in project["tool"]["comfy"], "WEB_DIRECTORY says it already; twice would load each script twice"
    assert (ROOT / "web").is_dir()
    assert (ROOT / "LICENSE").read_text().strip().startswith("Apache License")


def test_the_readme_names_files_that_are_there():
    text = (ROOT / "README.md").read_text("utf-8")
    there = {path.name for path in TRAINERS + NODES} | {"__init__.py"}
    named = set(re.findall(r"\b(\w+\.py)\b", text))
    assert named <= there
    top = {_name(path) for path in TRAINERS if path.parent == ROOT / "trainers"} - {"trainers/__init__.py", "trainers/__main__.py"}
    top |= {_name(path) for path in NODES} - {"nodes/__init__.py"}
    assert {name for name in top if Path(name).stem not in text} == set()
