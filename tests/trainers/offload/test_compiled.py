"""Blocks of every family with a LoRA over frozen weights, compiled: by the backend that runs the traced graphs as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from live_bytes import LiveBytes
from tiny_families import filled, tiny_config
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from trainers.family import Family, families
from trainers.job import LoraSpec
from trainers.lora import inject
from trainers.offload.compiled import compiled
from trainers.offload.linear import FrozenLinear
from trainers.quantise import Quantise, quantised
