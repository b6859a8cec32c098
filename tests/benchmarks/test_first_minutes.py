"""The script for the first minutes on a GPU asks for cases that exist, and reads what they found."""

from __future__ import annotations

import json

import first_minutes
import full_size  # first: it says where the others are
import pytest
from cases import CASES, case_of
from first_minutes import ASYNC, CHUNKS, IN_12, PART_SECONDS, PARTS, SMALL, STREAMED, _rounds, found_in, main

QUESTIONS = [question for part in PARTS for question in part]


def result(name: str, reserved_gib: float) -> dict:
    """A case as `full_size.py` writes it."""
    return {
        "case": name,
        "step_seconds": 2.0,
        **({"ratio_median": 1.04} if case_of(name.replace(ASYNC, SMALL)).kind != "train" else {}),
        "opened_seconds": 20.0,
        "sizes": [[17, 256, 256], [33, 256, 256]],
        "first_step_seconds_each": [3.0, 2.5],
        "second_step_seconds_each": [2.0, 2.0],
        "card": {"peak_reserved_gib": reserved_gib, "peak_allocated_gib": 0.9 * reserved_gib, "context_gib": 0.5},
        "arrangement": {"chunks": 1},
        "predicted": {"allocated_gib": 0.9 * reserved_gib, "step_seconds": 1.0, "arrangement": {"chunks": 1}},
        "profile": {"idle_share": 0.03, "host_bytes_beside_activations": 4},
    }


def test_every_case_is_selected_by_its_name_alone():
    for part in (1, 2):
        for names in _rounds(part):
            selected = [case.name for case in CASES if case.kind != "peer" and any(name in case.name for name in names)]
            wanted = {name for question in PARTS[part - 1] for name in question.cases}
            assert set(selected) <= wanted
            assert {name.partition(",")[0] for name in wanted - {ASYNC}} >= set(names)
    assert {name for question in QUESTIONS for name in question.cases} - {ASYNC} <= {case.name for case in CASES}
    assert sum(PART_SECONDS) <= 780, "of 15 minutes some go into starting and fetching"


@pytest.mark.parametrize("part", [1, 2])
def test_a_part_takes_no_longer_than_it_says(part, tmp_path, monkeypatch):
    """Part 2 gave all of its 7 minutes to each of two rounds: 14 minutes, of 15 that a GPU may be lent for."""
    clock, commands = [1000.0], []

    def run(command, **_):
        commands.append(command)
        clock[0] += float(command[command.index("--budget-seconds") + 1]) if "--budget-seconds" in command else 60.0

    monkeypatch.setattr(first_minutes.subprocess, "run", run)
    monkeypatch.setattr(first_minutes.time, "monotonic", lambda: clock[0])
    main(["--out", str(tmp_path), "--part", str(part)])
    rounds = [command for command in commands if "--budget-seconds" in command]
    assert len(rounds) == len(_rounds(part))
    assert clock[0] - 1000.0 <= PART_SECONDS[part - 1]
    assert all(float(command[command.index("--budget-seconds") + 1]) >= 60 for command in rounds)
    assert len({command[command.index("--folder") + 1] for command in rounds}) == 1, "models are made in one folder"


def test_answers_are_read_from_the_results(tmp_path, capsys):
    names = {name for question in QUESTIONS for name in question.cases} - {ASYNC}
    (tmp_path / "part1.json").write_text(json.dumps({"cases": [result(name, 10.0) for name in sorted(names)]}))
    (tmp_path / "part2_async.json").write_text(json.dumps({"cases": [result("wan-1.3b 480x832x33 in 16 GiB", 12.0)]}))
    main(["--out", str(tmp_path), "--answer"])
    said = capsys.readouterr().out
    assert "not measured" not in said
    assert "1: 10.00 GiB, 2.00 s a step; 2: 10.00 GiB" in said
    assert "cudaMallocAsync: 12.00 GiB reserved" in said
    assert "2 first steps took 1.50 s more than the second ones" in said
    assert "opened in 20 s beside 20; 2.00 s a step beside 2.00" in said
    assert found_in(tmp_path)[ASYNC]["card"]["peak_reserved_gib"] == 12.0


def test_only_what_ran_as_planned_is_compared_with_its_plan(tmp_path, capsys):
    """A chunked case was compared with the price of a plan without chunks, and one beside a second model with its own alone."""
    chunked = result(CHUNKS[4], 8.0) | {"arrangement": {"chunks": 4}}
    beside = result(STREAMED, 8.0)
    (tmp_path / "part1.json").write_text(json.dumps({"cases": [chunked, beside, result(IN_12, 8.0)]}))
    main(["--out", str(tmp_path), "--answer"])
    said = next(line for line in capsys.readouterr().out.splitlines() if "Are plan and peak" in line)
    assert IN_12 in said
    assert CHUNKS[4] not in said
    assert STREAMED not in said


def test_cases_run_in_the_order_of_the_questions(monkeypatch):
    for part in (1, 2):
        (names, *_) = _rounds(part)
        asked = full_size._asked(full_size._options(["--cases", ",".join(names)]))
        wanted = list(dict.fromkeys(name for question in PARTS[part - 1] for name in question.cases if name != ASYNC))
        assert [case.name for case in asked] == wanted


def test_what_was_not_measured_is_named(tmp_path, capsys):
    (tmp_path / "part1.json").write_text(json.dumps({"cases": [{"case": CHUNKS[1], "error": "out of memory"}, result(CHUNKS[2], 8.0)]}))
    main(["--out", str(tmp_path), "--answer"])
    said = capsys.readouterr().out
    assert f"Do chunks save anything?** not measured ({CHUNKS[1]}, {CHUNKS[4]})" in said
    assert f"{CHUNKS[2]}: 1.00" in said, "plan and peak are read from any case that has them"
