"""`check` says what works on a machine: a line for everything, whatever fails, and nothing that a bug report should not show."""

from __future__ import annotations

import getpass
import json
import socket
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from check_page import lines_of_page
from tiny import tiny_job

from trainers import cli, rates
from trainers.errors import RunError
from trainers.measurements import Measurements, device_key
from trainers.plan import make_plan
from trainers.selftest import checks, models
from trainers.selftest.checks import CHECKS, NO_GPU, run_checks
from trainers.selftest.lines import Bench, Check, Line
from trainers.selftest.report import Report, Section, without_names
from trainers.selftest.speeds import usual_gpu

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def report(runs: Path) -> Iterator[Report]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "SIDE_ON_CPU", 4)
        patch.setattr(rates, "_LEAST_FILE_BYTES", 4 * rates.PIECE_BYTES)
        base = runs / "a model.safetensors"
        base.write_bytes(b"\1" * 4 * rates.PIECE_BYTES)
        yield run_checks(CPU, runs, base, limit_seconds=600.0)
        base.unlink()


def ok(bench: Bench) -> Iterator[Line]:
    yield Line("fine", "ok", "it works")


def raising(bench: Bench) -> Iterator[Line]:
    yield Line("before", "ok", "it works")
    raise OSError(f"no such file: {Path.home() / 'secret' / 'model.safetensors'}")


def test_on_a_cpu_all_but_the_gpu_s_lines_run(report: Report) -> None:
    states = {line.state for line in report.lines}
    assert "failed" not in states, report.table()
    skipped = [line for line in report.lines if line.text == NO_GPU]
    assert len(skipped) == sum(check.gpu_only for check in CHECKS)
    others = [line for line in report.lines if line.state == "skipped" and line.text != NO_GPU]
    assert {line.name for line in others} <= {"adamw8bit", "prodigy", "adamw_kahan", "nf4 weights", "reading the model"}, (
        "packages may be missing"
    )


def test_nothing_stays_in_the_runs_folder(report: Report, runs: Path) -> None:
    assert sorted(path.name for path in runs.iterdir()) == ["a model.safetensors", "check.json"]


def test_the_page_shows_the_lines_of_the_command(report: Report) -> None:
    names = [(section.title, line.name) for section in report.sections for line in section.lines]
    assert [(title, name) for title, name, _ in lines_of_page("On a CPU")] == names
    assert {state for _, _, state in lines_of_page("On a CPU")} <= {"ok", "slow", "skipped"}


def test_plan_uses_what_check_measured(report: Report, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan rested on assumed rates, and measured the others anew each time."""
    for name in ("flops_rate", "memory_rate", "copy_rate"):
        monkeypatch.setattr(rates, name, lambda *_: pytest.fail("measured again"))
    found = make_plan(tiny_job(tmp_path, runs_folder=str(runs))).memory.machine
    kept = Measurements(runs).rates("devices", device_key(CPU))
    assert (found.flops_rate, found.memory_rate, found.copy_rate) == (kept["float32_flops"], kept["memory"], kept["copy"])
    assert {"flops", "memory", "copy", "host_copy"} <= found.measured


def test_a_check_that_raises_is_a_line_and_the_others_go_on(tmp_path: Path) -> None:
    told: list[str] = []
    found = run_checks(
        CPU, tmp_path, None, lambda _, line: told.append(line.name), (Check("one", "broken", raising), Check("two", "fine", ok))
    )
    assert [(line.name, line.state) for line in found.lines] == [("before", "ok"), ("broken", "failed"), ("fine", "ok")]
    assert told == ["before", "broken", "fine"]
    assert found.failed
    assert "OSError" in found.block()
    assert "secret" in found.table(), "who sits at the machine may see it"
    assert "secret" not in found.block()
    assert "secret" not in (tmp_path / "check.json").read_text()


def test_an_error_of_ours_is_said_as_it_is(tmp_path: Path) -> None:
    def refused(bench: Bench) -> Iterator[Line]:
        raise RunError("Out of disk. Make room.")
        yield

    (line,) = run_checks(CPU, tmp_path, checks=(Check("one", "disk", refused),)).lines
    assert (line.state, line.text) == ("failed", "Out of disk. Make room.")


def test_no_check_begins_when_no_time_is_left(tmp_path: Path) -> None:
    found = run_checks(CPU, tmp_path, checks=(Check("one", "fine", ok), Check("one", "broken", raising)), limit_seconds=0.5)
    assert [(line.state, line.text) for line in found.lines] == [("skipped", "no time was left")] * 2


@pytest.mark.parametrize(
    "text",
    [
        f"user {getpass.getuser()} here",
        f"host {socket.gethostname()}",
        f"cannot open {Path.home() / 'models' / 'wan.safetensors'}",
        r"cannot open C:\Users\ada\runs\kitten: denied",
        "'/srv/data/kitten.toml' is missing",
        r"cannot open D:\Kunden\Ada Lovelace\wan\kitten.txt",
        "cannot open /srv/My Films/ada private/kitten.mp4",
        "my_private_model.safetensors is torn",
        "a model of mine.safetensors is torn",
    ],
)
def test_what_is_pasted_has_no_path_and_no_name(text: str) -> None:
    line = Line("line", "failed", text)
    block = Report((Section("section", (line,)),), names=("a model of mine.safetensors",)).block()
    for private in (
        getpass.getuser(),
        socket.gethostname(),
        Path.home().name,
        "wan",
        "ada",
        "kitten",
        "private",
        "mine",
        "srv",
        "Lovelace",
        "Films",
    ):
        assert private not in block.replace("  failed  line", "")


@pytest.mark.parametrize(
    ("name", "usual"),
    [
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("Tesla T4", "T4"),
        ("NVIDIA RTX A1000", None),
        ("T400", None),
    ],
)
def test_which_gpu_is_usual(name: str, usual: str | None) -> None:
    """An RTX A1000 was told that it computes 230 TFLOPS."""
    found = usual_gpu(name)
    assert (found and found.name) == usual


def test_a_folder_of_runs_that_is_given_relatively(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The README's `check` failed two lines on Python 3.11 and skipped the rest: what it starts has another working folder."""
    monkeypatch.chdir(tmp_path)
    few = tuple(check for check in CHECKS if check.name in ("a lock", "a worker"))
    assert len(few) == 2
    monkeypatch.setattr(checks, "run_checks", partial(run_checks, checks=few))
    assert cli.main(["check", "--device", "cpu"]) == 0


@pytest.mark.parametrize(("change", "state"), [(0.0, "ok"), (1e-3, "failed"), (float("nan"), "failed")])
def test_gradients_that_differ_are_a_failed_line(change: float, state: str) -> None:
    resident = torch.linspace(-1, 1, 50)
    streamed = resident.clone()
    streamed[7] += change
    assert models._compared("mapped", streamed, resident, models._NEAR_ITSELF).state == state


def test_what_is_not_private_stays() -> None:
    text = "22.1 GB/s to it, torch 2.13.0+cu130, 512x512x81, 3/40 blocks, and/or"
    assert without_names(text) == text


def test_the_command_prints_the_table_and_a_block_and_keeps_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    few = (Check("one", "broken", raising), Check("two", "fine", ok), Check("two", "GPU", ok, gpu_only=True))
    monkeypatch.setattr(checks, "run_checks", partial(run_checks, checks=few))
    code = cli.main(["check", "--device", "cpu", "--runs", str(tmp_path / "runs")])
    printed = capsys.readouterr().out
    assert code == 1
    assert printed.count("  ok      fine") == 2, "in the table and in the block"
    assert "2 ok, 1 failed, 1 skipped" in printed
    assert printed.rstrip().endswith("```")
    kept = json.loads((tmp_path / "runs" / "check.json").read_text())
    assert [section["title"] for section in kept["report"]["sections"]] == ["one", "two"]
    monkeypatch.setattr(checks, "run_checks", partial(run_checks, checks=few[1:]))
    assert cli.main(["check", "--device", "cpu", "--runs", str(tmp_path / "runs")]) == 0
