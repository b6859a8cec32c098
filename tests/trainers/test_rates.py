"""Rates are measured once for each device and drive, kept in check.json beside the runs, and used by every later plan."""

from __future__ import annotations

import json
import mmap
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import tiny_job

from trainers import nvidia_smi, rates
from trainers.lock import device_lock
from trainers.machine import this_machine
from trainers.measurements import Measurements, device_key, drive_key
from trainers.memory_report import report
from trainers.plan import make_plan

CPU = torch.device("cpu")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A file that is large enough to be measured."""
    path = tmp_path / "base.safetensors"
    path.write_bytes(b"\1" * 10 * rates.PIECE_BYTES)
    return path


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the measurements that were made."""
    made: list[str] = []
    for name in ("flops_rate", "memory_rate", "copy_rate", "read_rate", "host_copy_rate"):
        monkeypatch.setattr(rates, name, lambda *_, name=name: made.append(name) or 1e9)
    return made


def test_the_second_plan_measures_nothing(tmp_path: Path, base: Path, measured: list[str]) -> None:
    first = this_machine(CPU, torch.float32, base, tmp_path)
    assert sorted(measured) == ["copy_rate", "flops_rate", "host_copy_rate", "memory_rate", "read_rate"]
    assert first.measured == {"flops", "memory", "copy", "host_copy", "disk"}
    measured.clear()
    again = this_machine(CPU, torch.float32, base, tmp_path)
    assert measured == []
    assert replace(again, free_bytes=0, total_bytes=0, ram_bytes=0) == replace(first, free_bytes=0, total_bytes=0, ram_bytes=0)
    this_machine(CPU, torch.bfloat16, base, tmp_path)
    assert measured == ["flops_rate"], "another precision computes at another rate"


def test_a_large_file_is_measured_and_a_small_one_is_not(tmp_path: Path, base: Path) -> None:
    read, copied = rates.read_rate(base), rates.host_copy_rate(base)
    assert read is not None
    assert copied is not None
    assert min(read, copied) > 1e6
    small = tmp_path / "small.safetensors"
    small.write_bytes(b"\1" * 1000)
    found = rates.rates_of(CPU, torch.float32, small)
    assert (found.disk, found.host_copy) == (rates.ASSUMED_DISK_RATE, rates.ASSUMED_HOST_COPY_RATE)
    assert not found.measured & {"disk", "host_copy"}
    assert rates.rates_of(CPU, torch.float32, tmp_path / "nowhere").disk == rates.ASSUMED_DISK_RATE


@pytest.mark.parametrize("name", ["host_copy_rate", "read_rate", "drive_key"])
def test_a_file_that_cannot_be_measured_has_the_assumed_rate(
    tmp_path: Path, base: Path, measured: list[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """On Windows a 28 GB file did not fit the paging file (error 1455): every run and plan over it ended with that."""

    def fails(*_: object) -> float:
        raise OSError(1455, "The paging file is too small for this operation to complete")

    monkeypatch.setattr(rates, name, fails)
    found = rates.rates_of(CPU, torch.float32, base, Measurements(tmp_path))
    lacks = "host_copy" if name == "host_copy_rate" else "disk"
    assert found.measured == {"flops", "memory", "copy", "host_copy", "disk"} - {lacks}
    assert getattr(found, lacks) == (rates.ASSUMED_HOST_COPY_RATE if lacks == "host_copy" else rates.ASSUMED_DISK_RATE)


def test_no_memory_is_promised_for_a_mapped_file(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A private, writable mapping counts as memory in full: on Windows always, on Linux where the kernel does not overcommit."""
    opened, real = [], mmap.mmap

    class Watched(real):  # type: ignore[misc, valid-type]
        def __new__(cls, descriptor: int, length: int, **options: int) -> Watched:
            opened.append((descriptor, options.get("access")))
            return real.__new__(cls, descriptor, length, **options)

    monkeypatch.setattr(mmap, "mmap", Watched)
    assert rates.host_copy_rate(base)
    assert all(access == mmap.ACCESS_READ for descriptor, access in opened if descriptor != -1)


def test_a_rate_is_that_of_the_shortest_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another program that computed for a moment made the GPU seem slow in every later plan."""
    now, took = [0.0], iter([9.0, 0.01, 0.03, 0.02])
    monkeypatch.setattr(rates.time, "perf_counter", lambda: now[0])

    def work() -> None:
        now[0] += next(took)

    assert rates.seconds_of(work, CPU) == pytest.approx(0.01)


@pytest.mark.parametrize(
    ("percent", "processes", "used"),
    [("95", "4711", True), ("3", "4711", False), ("95", "", False), ("[N/A]", "4711", False), ("", "", False)],
)
def test_whether_another_program_computes_on_the_gpu(monkeypatch: pytest.MonkeyPatch, percent: str, processes: str, used: bool) -> None:
    """ComfyUI keeps a GPU open all the time: only while it renders do rates not count."""
    monkeypatch.setattr(nvidia_smi, "answer_of", lambda command, _: processes if "--query-compute-apps=pid" in command else percent)
    assert nvidia_smi.is_used_by_others("GPU-1") is used


def test_rates_of_a_gpu_that_another_program_uses_are_not_kept(
    tmp_path: Path, measured: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that was started while ComfyUI rendered had half the GPU's rate in every later plan."""
    monkeypatch.setattr(rates, "is_used_by_others", lambda device: True)
    assert rates.rates_of(CPU, torch.float32, None, Measurements(tmp_path)).copy == 1e9
    assert not (tmp_path / "check.json").exists()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"version": 99, "devices": {"KEY": {"copy": 5.0}}}', '{"version": 1, "devices": 7}'])
def test_a_damaged_or_later_file_is_ignored(tmp_path: Path, content: str) -> None:
    (tmp_path / "check.json").write_text(content.replace("KEY", device_key(CPU)))
    kept = Measurements(tmp_path)
    assert kept.rates("devices", device_key(CPU)) == {}
    kept.keep("devices", device_key(CPU), {"copy": 2.0})
    assert kept.rates("devices", device_key(CPU)) == {"copy": 2.0}


@pytest.mark.parametrize("value", ["null", '"fast"', "-1", "0", "NaN", "Infinity", "1e30"])
def test_a_senseless_number_is_measured_anew(tmp_path: Path, measured: list[str], value: str) -> None:
    content = {"version": 1, "devices": {device_key(CPU): {"copy": "VALUE", "memory": 3.0}}}
    (tmp_path / "check.json").write_text(json.dumps(content).replace('"VALUE"', value))
    found = rates.rates_of(CPU, torch.float32, None, Measurements(tmp_path))
    assert (found.copy, found.memory) == (1e9, 3.0)
    assert "memory_rate" not in measured


def test_what_older_hardware_left_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measured: list[str]) -> None:
    this_machine(CPU, torch.float32, None, tmp_path)
    measured.clear()
    monkeypatch.setattr(torch, "__version__", "3.0")
    this_machine(CPU, torch.float32, None, tmp_path)
    assert "flops_rate" in measured


def test_to_plan_makes_no_folder(tmp_path: Path, measured: list[str]) -> None:
    this_machine(CPU, torch.float32, None, tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_nothing_is_kept_of_a_device_that_another_run_uses(tmp_path: Path, measured: list[str]) -> None:
    """A user who queues a second run while the first one trains had half the GPU's rate in every later plan."""
    path = device_lock("cpu").path
    program = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.flock(f, fcntl.LOCK_EX); print(flush=True); sys.stdin.read()"
    path.parent.mkdir(parents=True, exist_ok=True)
    with subprocess.Popen([sys.executable, "-c", program, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout
        other.stdout.readline()
        this_machine(CPU, torch.float32, None, tmp_path)
        assert not (tmp_path / "check.json").exists()
        other.communicate()
    with device_lock("cpu"):  # a worker's own
        this_machine(CPU, torch.float32, None, tmp_path)
    assert Measurements(tmp_path).rates("devices", device_key(CPU))["copy"] == 1e9


def test_a_plan_rests_on_what_was_measured_and_says_so(tmp_path: Path, measured: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """`plan` promised the speed of a drive that it had never read."""
    job = tiny_job(tmp_path)
    Path(job.runs_folder).mkdir()
    kept = Measurements(Path(job.runs_folder))
    kept.keep("devices", device_key(CPU), {"float32_flops": 5e12, "memory": 1e11, "copy": 7e9})
    found = make_plan(job)
    assert measured == []
    assert "(measured: 5 TFLOPS, 7 GB/s to it; assumed: 2 GB/s from the drive, 8 GB/s from a file in memory)" in str(found)
    assert found.as_values()["memory"]["machine"]["measured_rates"] == ["copy", "flops", "memory"]
    monkeypatch.setattr(rates, "_LEAST_FILE_BYTES", 0)
    kept.keep("drives", drive_key(Path(job.base.transformer)), {"read": 3e8})
    machine = make_plan(job).memory.machine
    assert (machine.disk_rate, "disk" in machine.measured) == (3e8, True)
    assert "0.3 GB/s from the drive" in "\n".join(report(make_plan(job).memory, 1.0))
