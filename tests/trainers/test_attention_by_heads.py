"""Attention by groups of heads: the same bits as in one launch, for every model, and only where a GPU has a time limit."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry, dispatch_attention_fn
from tiny_families import filled, tiny_conditions, tiny_config, tiny_job_of, tiny_latents, tiny_text

from trainers import attention_by_heads
from trainers.attention import use_attention
from trainers.attention_by_heads import by_heads, limit_attention
from trainers.checkpoint import Checkpoint
from trainers.family import Family, Variant, detect, families
from trainers.job import LoraSpec
from trainers.job_memory import tracer_of
from trainers.lora import inject
from trainers.machine import CARDS, Machine
from trainers.memory_trace import StepShape
from trainers.nvidia_smi import ends_long_kernels
from trainers.offload.arrangement import Arrangement
from trainers.offload.blocks import Blocks
from trainers.offload.chunks import in_chunks
from trainers.offload.compiled import compiled
from trainers.residency import blocks_of

HEADS = 5
"""Of every tiny model here: groups of two do not divide them."""

VARIANTS = [(family, variant) for family in families().values() for variant in family.variants]
of_every_variant = pytest.mark.parametrize(("family", "variant"), VARIANTS, ids=[variant.id for _, variant in VARIANTS])


class Launches:
    """Stands where PyTorch's attention is registered, and notes how many heads each launch has."""

    def __init__(self) -> None:
        self.heads: list[int] = []
        self.whole = _AttentionBackendRegistry._backends[AttentionBackendName.NATIVE]

    def __call__(self, query: torch.Tensor, **given: Any) -> torch.Tensor:
        self.heads.append(query.shape[2])
        found: torch.Tensor = self.whole(query=query, **given)
        return found


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[Launches]:
    noted = Launches()
    monkeypatch.setattr(_AttentionBackendRegistry, "_active_backend", AttentionBackendName.NATIVE)
    monkeypatch.setitem(_AttentionBackendRegistry._backends, AttentionBackendName.NATIVE, by_heads(noted, 10**30))
    yield noted
    limit_attention(None)


def limited(flops_rate: float = 1.0, kernel_time_limit: bool = True) -> Machine:
    return replace(CARDS[0].machine(ram_gib=32), flops_rate=flops_rate, kernel_time_limit=kernel_time_limit)


def attended(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, **given: Any
) -> tuple[torch.Tensor, ...]:
    inputs = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
    output = dispatch_attention_fn(*inputs, attn_mask=mask, backend=AttentionBackendName.NATIVE, **given)
    output.backward(torch.linspace(-1, 1, output.numel()).view(output.shape))
    return output.detach(), *(tensor.grad for tensor in inputs)  # type: ignore[misc]


MASKS = {
    "none": None,
    "of keys": torch.arange(7).expand(2, 7) < torch.tensor([[7], [4]]),
    "of keys, four axes": (torch.arange(7).expand(2, 7) < torch.tensor([[7], [4]]))[:, None, None],
    "of pairs": torch.rand(2, 1, 9, 7, generator=torch.Generator().manual_seed(5)) < 0.8,
    "of heads": torch.randn(2, 6, 9, 7, generator=torch.Generator().manual_seed(6)),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("key_heads", [6, 3, 1])
def test_the_bits_are_those_of_one_launch(launches: Launches, mask: str, key_heads: int) -> None:
    """With masks of every form, with keys that several heads share, forward and backward."""
    chance = torch.Generator().manual_seed(1)
    query = torch.randn(2, 9, 6, 8, generator=chance)
    key, value = (torch.randn(2, 7, key_heads, 8, generator=chance) for _ in range(2))
    given = {"enable_gqa": key_heads < 6}
    whole = attended(query, key, value, MASKS[mask], **given)
    assert launches.heads == [6]
    flops = 10 * query.numel() * key.shape[1]
    for most, sizes in ((flops, [6]), (flops // 2, [3, 3]), (flops // 4, [1] * 6), (1, [1] * 6)):
        if key_heads == 1:
            sizes = [6]
        elif key_heads == 3 and len(sizes) > 1:
            sizes = [2, 2, 2]
        launches.heads.clear()
        limit_attention(limited(most / attention_by_heads.LONGEST_SECONDS / attention_by_heads.ATTENTION_EFFICIENCY + 1))
        found = attended(query, key, value, MASKS[mask], **given)
        assert launches.heads == sizes
        assert all(torch.equal(a, b) for a, b in zip(found, whole, strict=True))


def model_of(family: Family, variant: Variant) -> torch.nn.Module:
    """A tiny model of several heads with a LoRA that counts."""
    config = tiny_config(family, variant) | {"num_attention_heads": HEADS}
    if config.get("added_kv_proj_dim"):
        config["added_kv_proj_dim"] = HEADS * config["attention_head_dim"]
    if family.id == "ltx":
        config["cross_attention_dim"] = HEADS * config["attention_head_dim"]
    transformer = filled(family.build(config))
    inject(transformer, family, LoraSpec(rank=2), 0, device=torch.device("cpu"))
    torch.manual_seed(2)
    for parameter in transformer.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    return transformer


def gradients(family: Family, variant: Variant, transformer: torch.nn.Module, frames: int = 3) -> list[torch.Tensor]:
    """Of a batch of two captions of different lengths, so that there is a mask where the family has one."""
    transformer.zero_grad()
    noisy, rule = tiny_latents(family, variant, 2)[:, :, :frames], family.first_frame(variant)
    conditions = tiny_conditions(family, variant, noisy, [rule is not None and rule.always] * 2)
    inputs = family.prepare(variant, noisy, torch.full((2,), 0.6), conditions)
    text = family.collate_text([tiny_text(family, length, length) for length in (3, 5)], torch.device("cpu"), torch.float32)
    velocity = family.predict(transformer, inputs, text)
    velocity.square().mean().backward()  # type: ignore[no-untyped-call]
    return [velocity.detach(), *(p.grad for p in transformer.parameters() if p.requires_grad)]  # type: ignore[misc]


@of_every_variant
@pytest.mark.parametrize("chunks", [1, 2])
def test_every_model_is_split_with_the_same_bits(launches: Launches, family: Family, variant: Variant, chunks: int) -> None:
    """With checkpointing, whole and in chunks. A long clip ended as "the launch timed out and was terminated": a lost run."""
    transformer = model_of(family, variant)
    use_attention(transformer, "auto")
    modules = blocks_of(transformer, family)
    in_chunks(modules, family.chunked, chunks)
    Blocks(modules)
    whole = gradients(family, variant, transformer)
    assert max(launches.heads) == HEADS
    launches.heads.clear()
    limit_attention(limited())
    found = gradients(family, variant, transformer)
    assert set(launches.heads) == {1}
    assert all(torch.equal(a, b) for a, b in zip(found, whole, strict=True))


@pytest.mark.slow
def test_a_compiled_block_is_split_and_not_compiled_for_each_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted in the graphs: what a test notes while a block runs would itself be a reason to compile it again."""
    native = AttentionBackendName.NATIVE
    monkeypatch.setattr(_AttentionBackendRegistry, "_active_backend", native)
    monkeypatch.setitem(_AttentionBackendRegistry._backends, native, by_heads(_AttentionBackendRegistry._backends[native], 10**30))
    family = families()["wan"]
    transformer = model_of(family, family.variants[0])
    modules = blocks_of(transformer, family)
    in_chunks(modules, family.chunked, 1)
    sizes = (3, 2, 4)
    whole = {frames: gradients(family, family.variants[0], transformer, frames) for frames in sizes}
    graphs: list[Any] = []
    graphs_after: list[int] = []

    def noted(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    Blocks(modules).run_with([compiled(block, noted) for block in modules])
    limit_attention(limited())
    try:
        for frames in sizes:
            found = gradients(family, family.variants[0], transformer, frames)
            assert all(torch.equal(a, b) for a, b in zip(found, whole[frames], strict=True))
            graphs_after.append(len(graphs))
    finally:
        limit_attention(None)
    assert graphs_after[2] == graphs_after[1] == 2 * graphs_after[0], "once for the first size, once for all others"
    attentions = [sum("scaled_dot_product" in str(node.target) for node in graph.graph.nodes) for graph in graphs]
    assert set(attentions) == {2 * HEADS}, "self and cross attention, head by head, without a break between"


@pytest.mark.parametrize("machine", [None, limited(kernel_time_limit=False)])
def test_without_a_time_limit_attention_is_whole(launches: Launches, machine: Machine | None) -> None:
    rows = torch.randn(1, 9, 6, 8)
    limit_attention(limited())
    limit_attention(machine)
    attended(rows, rows, rows, None)
    assert launches.heads == [6]


def test_a_long_clip_is_split_on_a_slow_gpu_and_a_short_one_is_not(launches: Launches) -> None:
    """81 frames of 1280x720 in Wan 14B, without values; 33 frames of 512x512 take no half second."""
    limit_attention(limited(flops_rate=22e12))
    for tokens, groups in ((75_600, 40), (9_216, 1)):
        launches.heads.clear()
        rows = torch.empty(1, tokens, 40, 128, device="meta")
        launches.whole = lambda query, **_: torch.empty_like(query)
        assert dispatch_attention_fn(rows, rows, rows).shape == rows.shape
        assert len(launches.heads) == groups


def test_the_plan_counts_what_it_takes(launches: Launches, tmp_path: Path) -> None:
    """The groups' outputs and the whole one are there at once. Without it, a plan that just fits would run out of memory."""
    family = families()["ltx"]
    job = tiny_job_of(tmp_path, family, family.variants[0], gradient_checkpointing=True)
    checkpoint = Checkpoint.open(job.base.transformer)
    shape = StepShape((128, 5, 24, 24), 1, 4, 32)
    peaks = []
    for machine in (limited(kernel_time_limit=False), limited()):
        tracer = tracer_of(job, checkpoint, detect(checkpoint), machine, torch.float32)
        peaks.append(tracer.step(shape, Arrangement()).peak_bytes)
    assert peaks[1] > peaks[0]


ANSWERS = {"GPU-screen": "[N/A], Enabled", "GPU-other": "[N/A], Disabled", "GPU-tcc": "TCC, Disabled"}


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program nvidia-smi that answers as NVIDIA's does."""
    program = tmp_path / "nvidia-smi"
    cases = "".join(f'*--id={uuid}*) echo "{answer}";;\n' for uuid, answer in ANSWERS.items())
    program.write_text(f'#!/bin/sh\ncase "$*" in\n{cases}*) exit 6;;\nesac\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr("platform.release", lambda: "6.1.0")
    return program


def test_the_driver_says_whether_there_is_a_time_limit(driver: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {uuid: ends_long_kernels(uuid, "linux") for uuid in (*ANSWERS, "GPU-unknown")}
    assert found == {"GPU-screen": True, "GPU-other": False, "GPU-tcc": False, "GPU-unknown": False}
    assert [ends_long_kernels(uuid, "win32") for uuid in ("GPU-other", "GPU-tcc")] == [True, False]
    monkeypatch.setattr("platform.release", lambda: "5.15.153.1-microsoft-standard-WSL2")
    assert ends_long_kernels("GPU-other", "linux")
    driver.unlink()
    assert ends_long_kernels("GPU-other", "linux"), "WSL without an answer"
    monkeypatch.setattr("platform.release", lambda: "6.1.0")
    assert not ends_long_kernels("GPU-other", "linux")
    assert ends_long_kernels("GPU-other", "win32")
