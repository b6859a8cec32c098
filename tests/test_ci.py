"""`.ci/run` says at its end what both of pytest's processes found, whichever of them failed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("said", "outcome", "last"),
    [
        (
            ["3377 passed, 2 skipped, 9 deselected in 700.12s (0:11:40)", "40 passed in 80.00s (0:01:20)"],
            0,
            "3417 passed, 0 failed, 2 skipped",
        ),
        (["1 failed, 9 passed in 3.50s", "2 errors in 0.10s"], 2, "9 passed, 3 failed, 0 skipped"),
        (["2 failed, 8 passed, 1 error in 3.50s", "1 skipped, 39 deselected in 2.00s"], 2, "8 passed, 3 failed, 1 skipped"),
        (["Found 3 errors in 1 file (checked 90 source files)"], 2, "0 passed, 0 failed, 0 skipped"),
    ],
)
def test_the_last_line_is_the_sum(tmp_path: Path, said: list[str], outcome: int, last: str) -> None:
    make = tmp_path / "make"
    make.write_text("#!/bin/sh\n" + "".join(f"echo '{line}'\n" for line in said) + f"exit {outcome}\n")
    make.chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(["bash", ROOT / ".ci/run"], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == outcome
    assert done.stdout.splitlines()[-1] == last
    assert all(done.stdout.count(line) == 2 for line in said if " in " in line and line.endswith(("s", ")")) and "file" not in line)


def test_both_processes_of_tests_run_and_either_fails_the_whole(tmp_path: Path) -> None:
    """The recipe itself, with a Python whose first or second run of pytest fails."""
    runs = tmp_path / "runs"
    for failing in ("-n 2", "simulated_gpu"):
        venv = tmp_path / failing.split()[-1]
        (venv / "bin").mkdir(parents=True)
        for name in ("ruff", "mypy", "python"):
            program = venv / "bin" / name
            program.write_text(
                f"#!/bin/sh\necho \"$*\" >> {runs}\ncase \"$*\" in *'pytest {failing}'*|*'tests/{failing}'*) exit 1;; esac\n"
            )
            program.chmod(0o755)
        (venv / "installed").touch()
        runs.unlink(missing_ok=True)
        done = subprocess.run(["make", "test", f"VENV={venv}"], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert [line for line in runs.read_text().splitlines() if "pytest" in line] == [
            "-m pytest -n 2 -m not slow and not matrix",
            "-m pytest -p simulated_gpu.plugin tests/simulated_gpu -n 2 -m not slow and not matrix",
            "-m pytest -p simulated_gpu.plugin tests/simulated_gpu/test_second_gpu.py -m not slow and not matrix",
        ]


@pytest.mark.parametrize(
    ("ci", "outcome", "said"),
    [("", 0, r"3 tests not run: the simulated GPU needs g\+\+"), ("1", 4, r"ERROR: the simulated GPU needs g\+\+")],
)
def test_without_a_compiler_tests_of_the_gpu_are_skipped_in_one_line_and_in_ci_are_an_error(
    tmp_path: Path, ci: str, outcome: int, said: str
) -> None:
    """In two processes, as `make test` has them: "no tests ran" would be taken for a pass."""
    for index in range(3):
        (tmp_path / f"test_{index}.py").write_text("def test_on_the_gpu(): raise AssertionError\n")
    environment = os.environ | {"CI": ci, "CXX": "no-such-compiler", "PYTHONPATH": str(ROOT / "tests")}
    command = [sys.executable, "-m", "pytest", "-p", "simulated_gpu.plugin", "-n", "2", "-rs", "-q", str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == outcome, done.stdout + done.stderr
    assert len(re.findall(said, done.stdout + done.stderr)) == 1
    assert "no tests ran" not in done.stdout
