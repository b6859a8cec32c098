"""The hash of objects: stable where nothing changes, another one where something does."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from trainers.content_hash import content_hash

ROOT = Path(__file__).parents[2]
BIG = torch.arange(40_000, dtype=torch.float32)


class Adapter:
    """Stands for the objects in which patches are kept."""

    def __init__(self, weight: torch.Tensor, keys: set[str]) -> None:
        self.weights = (weight, 4.0, None)
        self.loaded_keys = keys


class Stored(torch.Tensor):
    """A tensor that shows another shape than it stores, as GGUF packs have them."""

    @property
    def shape(self) -> Any:
        return torch.Size((10, 10))

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert function not in (torch.Tensor.detach, torch.Tensor.reshape), "it would give what it shows, not what it stores"
        return super().__torch_function__(function, types, args, kwargs or {})


class Quantised:
    """Stands for a quantised tensor: parts and a context."""

    def __init__(self, data: torch.Tensor, scale: float) -> None:
        self.data, self.scale = data, torch.tensor(scale)


def example(**changes: Any) -> dict[str, Any]:
    """Of every kind something."""
    values = {
        "weight": torch.arange(12.0).reshape(3, 4),
        "big": BIG,
        "patches": {"a.weight": [(1.0, Adapter(torch.ones(2, 2), {"up", "down"}), 1.0, None, None)]},
        "options": {"min_length": 512, "layer": None, "flags": (True, "x", b"y", 1.5)},
        "dtype": torch.float16,
        "function": len,
    }
    return values | changes


CHANGES: dict[str, dict[str, Any]] = {
    "a value": {"weight": torch.arange(12.0).reshape(3, 4) + torch.eye(3, 4)},
    "the shape": {"weight": torch.arange(12.0).reshape(4, 3)},
    "the dtype": {"weight": torch.arange(12.0).half().reshape(3, 4)},
    "the first page of a large tensor": {"big": torch.cat([torch.ones(1), BIG[1:]])},
    "the last page of a large tensor": {"big": torch.cat([BIG[:-1], torch.ones(1)])},
    "a number": {"dtype": torch.float32},
    "a strength": {"patches": {"a.weight": [(0.5, Adapter(torch.ones(2, 2), {"up", "down"}), 1.0, None, None)]}},
    "a patch's weights": {"patches": {"a.weight": [(1.0, Adapter(torch.zeros(2, 2), {"up", "down"}), 1.0, None, None)]}},
    "a patch's key": {"patches": {"b.weight": [(1.0, Adapter(torch.ones(2, 2), {"up", "down"}), 1.0, None, None)]}},
    "no patch": {"patches": {}},
    "an option": {"options": {"min_length": 256, "layer": None, "flags": (True, "x", b"y", 1.5)}},
    "True or 1": {"options": {"min_length": 512, "layer": None, "flags": (1, "x", b"y", 1.5)}},
    "a function": {"function": max},
    "one more entry": {"more": None},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_any_change_changes_it(change: dict[str, Any]):
    assert content_hash(example(**change)) != content_hash(example())


def test_equal_content_has_the_same_hash_however_it_lies():
    turned = torch.arange(12.0).reshape(3, 4).t().contiguous().t()
    again = example(weight=turned, big=BIG.clone())
    again = {name: again[name] for name in reversed(again)}
    assert content_hash(again) == content_hash(example())


def test_it_is_the_same_in_another_process():
    program = "import torch; from trainers.content_hash import content_hash; from tests.trainers.test_content_hash import example"
    program = program.replace("from tests.trainers.", "import sys; sys.path.insert(0, 'tests/trainers'); from ")
    program += "; print(content_hash(example()))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    named = done.stdout.strip()
    assert named == content_hash(example())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.uint8, torch.bool, torch.float64])
def test_every_dtype_counts(dtype: torch.dtype):
    ones, zeros = torch.ones(3).to(dtype), torch.zeros(3).to(dtype)
    assert content_hash(ones) != content_hash(zeros)
    assert content_hash(torch.tensor(1.0).to(dtype)) != content_hash(torch.tensor(0.0).to(dtype))
    assert content_hash(torch.ones(0).to(dtype)) == content_hash(torch.ones(0).to(dtype))


def test_subclasses_count_by_what_they_store():
    one, other = (torch.full((5,), value).as_subclass(Stored) for value in (1.0, 2.0))
    assert content_hash(one) == content_hash(one.as_subclass(Stored))
    assert content_hash(one) != content_hash(other)
    assert content_hash(Quantised(BIG, 1.0)) == content_hash(Quantised(BIG.clone(), 1.0))
    assert content_hash(Quantised(BIG, 1.0)) != content_hash(Quantised(BIG, 2.0))


def test_what_holds_itself_ends():
    one: dict[str, Any] = {"number": 1}
    one["self"] = one
    other: dict[str, Any] = {"number": 2}
    other["self"] = other
    assert content_hash(one) != content_hash(other)


def test_in_inference_mode():
    with torch.inference_mode():
        made = torch.arange(12.0).reshape(3, 4)
        assert content_hash(example(weight=made)) == content_hash(example())


def test_large_tensors_take_milliseconds():
    tensors = [torch.zeros(4_000_000) for _ in range(20)]
    started = time.process_time()
    content_hash(tensors)
    assert time.process_time() - started < 0.2
