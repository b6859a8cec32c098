"""A machine that trains does not fall asleep."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace

import pytest

from trainers import awake

CONTINUOUS, SYSTEM_REQUIRED = 0x80000000, 0x00000001


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What Windows was asked for, in order."""
    states: list[int] = []
    kernel = SimpleNamespace(SetThreadExecutionState=lambda state: states.append(state.value))
    monkeypatch.setattr(ctypes, "windll", SimpleNamespace(kernel32=kernel), raising=False)
    return states


def test_windows_stays_awake_until_the_training_ends(asked: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """A laptop left alone overnight slept after half an hour, with the training."""
    monkeypatch.setattr(awake, "sys", SimpleNamespace(platform="win32"))
    with awake.awake():
        assert asked == [CONTINUOUS | SYSTEM_REQUIRED]
    assert asked == [CONTINUOUS | SYSTEM_REQUIRED, CONTINUOUS]


def test_nothing_is_asked_of_other_systems(asked: list[int]) -> None:
    with awake.awake():
        pass
    assert asked == []
