"""What of memory.* a job cannot have, told before anything is loaded."""

from __future__ import annotations

from typing import Any

import pytest

from trainers.errors import JobError
from trainers.job import Job, parse_job
from trainers.preflight import check_settings, find_problems


def job(**fields: Any) -> Job:
    values = {"name": "cat", "base": {"transformer": "wan.safetensors"}, "encoded": "encoded", "steps": 5, "device": "cpu"}
    return parse_job(values | fields)


def test_what_needs_checkpointing_is_told_all_at_once() -> None:
    memory = {"activations": "host", "chunks": 4, "stream": "always"}
    with pytest.raises(JobError) as error:
        check_settings(job(gradient_checkpointing=False, memory=memory))
    assert [problem.value for problem in error.value.problems] == [
        "memory.activations is host and gradient_checkpointing is false",
        "memory.chunks is 4 and gradient_checkpointing is false",
        "memory.stream is always and gradient_checkpointing is false",
    ]
    assert "or memory.chunks to 1." in error.value.problems[1].remedy
    told = {str(problem) for problem in find_problems(job(gradient_checkpointing=False, memory=memory))}
    assert told >= {str(problem) for problem in error.value.problems}
    check_settings(job(memory=memory))


def test_without_checkpointing_the_defaults_are_no_problem() -> None:
    check_settings(job(gradient_checkpointing=False, memory={"activations": "device", "chunks": 1, "stream": "never", "host": "pinned"}))


def test_a_dora_is_not_streamed() -> None:
    with pytest.raises(JobError, match=r"memory.stream is always and lora.dora is true; .* Set memory.stream to auto"):
        check_settings(job(lora={"dora": True}, memory={"stream": "always"}))
    check_settings(job(lora={"dora": True}, memory={"stream": "auto", "activations": "host"}))
