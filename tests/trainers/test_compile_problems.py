from __future__ import annotations

import importlib.util
import shutil

import pytest
import torch

from trainers import environment
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


def test_the_allocator_is_told_once_and_the_users_word_counts(monkeypatch):
    monkeypatch.setattr(environment.sys, "platform", "linux")
    monkeypatch.setattr(environment.os, "environ", {})
    environment.use_memory_without_gaps()
    assert environment.os.environ == {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    for own in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        monkeypatch.setattr(environment.os, "environ", {own: "max_split_size_mb:64"})
        environment.use_memory_without_gaps()
        assert environment.os.environ == {own: "max_split_size_mb:64"}
