from __future__ import annotations

import importlib.util
import shutil

import pytest
import torch

from trainers.errors import JobError
from trainers.job import parse_job
from trainers.preflight import check_settings


def job(**fields):
    values = {"name": "cat", "base": {"transformer": "wan.safetensors"}, "encoded": "encoded", "steps": 5, "device": "cpu"}
    return parse_job(values | {"speed": {"compile": True}} | fields)


def test_a_compiled_block_draws_no_dropout():
    with pytest.raises(JobError, match=r"lora.dropout is 0.1; .*draw the same"):
        check_settings(job(lora={"dropout": 0.1}))
    check_settings(job(lora={"dropout": 0.1}, speed={"compile": False}))


def test_a_missing_compiler_is_told_before_anything_is_loaded(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(JobError, match=r"needs a C\+\+ compiler. Install one"):
        check_settings(job())
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/c++")
    check_settings(job())


def test_a_card_needs_triton(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "triton" else found(name, *rest))
    with pytest.raises(JobError, match="triton-windows"):
        check_settings(job(device="cuda:0"))
