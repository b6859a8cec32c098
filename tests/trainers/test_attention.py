"""The library that computes attention: what is refused before anything is loaded, who is asked, and when there is a mask."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_job
from tiny_families import of_every_variant, tiny_conditions, tiny_latents, tiny_text, tiny_transformer_of

from trainers import attention
from trainers.attention import BACKENDS, check_attention, use_attention
from trainers.errors import JobError, MissingPackage
from trainers.family import Family, TextBatch, Variant, families
from trainers.job import Job, parse_job
from trainers.preflight import find_problems
from trainers.text_masks import every_row

WAN, MOCHI, HUNYUAN = (families()[name] for name in ("wan", "mochi", "hunyuan"))


# What is refused


def job_with(name: str, **fields: object) -> Job:
    values = {"name": "cat", "base": {"transformer": "wan.safetensors"}, "encoded": "encoded", "steps": 5, "speed": {"attention": name}}
    return parse_job(values | fields)


@pytest.fixture
def a_card(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A card of a capability, as PyTorch tells of it."""
    card = {"capability": (7, 5)}
    monkeypatch.setattr(attention, "pick_device", lambda job: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: card["capability"])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    return card


def test_without_a_card_another_library_is_a_problem_beside_all_others(tmp_path: Path) -> None:
    job = tiny_job(tmp_path, speed={"attention": "flash"}, optimizer={"kind": "adamw_kahan"})
    told = [str(problem) for problem in find_problems(job)]
    assert "speed.attention is 'flash' on cpu; it computes on a CUDA card only. Use \"auto\"." in told
    assert len(told) == 2


@pytest.mark.parametrize("name", ["auto", "native"])
def test_pytorch_s_own_is_never_refused(name: str) -> None:
    check_attention(job_with(name, batch_size=4), MOCHI)


def test_a_card_that_is_too_old_and_a_precision_that_is_not_computed(a_card: dict[str, Any]) -> None:
    with pytest.raises(JobError) as raised:
        check_attention(job_with("flash", precision="fp32"), WAN)
    assert [str(problem) for problem in raised.value.problems] == [
        "speed.attention is 'flash' on Tesla T4 (compute capability 7.5); it needs 8.0. Use \"auto\".",
        "speed.attention is 'flash', precision is fp32; it computes in bf16 and fp16 only. Use \"auto\", or precision bf16.",
    ]
    with pytest.raises(JobError, match=r"it needs 9\.0"):
        check_attention(job_with("flash_3", precision="bf16"), WAN)


@pytest.mark.parametrize("name", BACKENDS)
def test_a_library_that_is_not_installed_is_named_with_its_remedy(a_card: dict[str, Any], name: str) -> None:
    a_card["capability"] = (9, 0)
    with pytest.raises(MissingPackage, match=rf'speed.attention is {name!r}; its package must work here \(.+\)\. .*or use "auto"\.'):
        check_attention(job_with(name, precision="bf16"), WAN)


@pytest.mark.parametrize("family", families().values(), ids=list(families()))
@pytest.mark.parametrize("name", BACKENDS)
def test_where_captions_need_a_mask_a_library_without_masks_is_refused(a_card: dict[str, Any], name: str, family: Family) -> None:
    a_card["capability"] = (9, 0)
    expected = MissingPackage if family is WAN else JobError
    with pytest.raises(expected, match="must work here" if family is WAN else "captions of .* need a mask where lengths differ"):
        check_attention(job_with(name, precision="bf16", batch_size=2), family)
    with pytest.raises(MissingPackage):
        check_attention(job_with(name, precision="bf16", batch_size=1), family)


# Who is asked


class Asked:
    """Stands where a library is registered with diffusers' dispatcher, computes as PyTorch does, and notes what it was given."""

    def __init__(self) -> None:
        self.masks: list[bool] = []
        self.dtypes: set[torch.dtype] = set()

    def __call__(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None = None) -> torch.Tensor:
        self.masks.append(attn_mask is not None)
        self.dtypes |= {tensor.dtype for tensor in (query, key, value)}
        BNHD = (tensor.transpose(1, 2) for tensor in (query, key, value))
        return torch.nn.functional.scaled_dot_product_attention(*BNHD, attn_mask=attn_mask).transpose(1, 2)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    """Every library is here, and is this one."""
    from diffusers.models import attention_dispatch
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    library = Asked()
    for name in ("_CAN_USE_FLASH_ATTN", "_CAN_USE_FLASH_ATTN_3", "_CAN_USE_XFORMERS_ATTN"):
        monkeypatch.setattr(attention_dispatch, name, True)
    for backend in BACKENDS.values():
        registered = AttentionBackendName(backend.diffusers_name)
        monkeypatch.setitem(_AttentionBackendRegistry._backends, registered, library)
        monkeypatch.setitem(_AttentionBackendRegistry._supported_arg_names, registered, {"query", "key", "value", "attn_mask"})
    monkeypatch.setattr(_AttentionBackendRegistry, "_active_backend", AttentionBackendName.NATIVE)  # a model's choice changes it
    return library


def velocity(family: Family, variant: Variant, transformer: torch.nn.Module, lengths: list[int], dtype: torch.dtype) -> torch.Tensor:
    noisy, rule = tiny_latents(family, variant, len(lengths)), family.first_frame(variant)
    conditions = tiny_conditions(family, variant, noisy, [rule is not None and rule.always] * len(lengths))
    inputs = family.prepare(variant, noisy, torch.full((len(lengths),), 0.6), conditions)
    records = [tiny_text(family, length, seed) for seed, length in enumerate(lengths)]
    with torch.no_grad():
        return family.predict(transformer, inputs, family.collate_text(records, torch.device("cpu"), dtype))


@of_every_variant
def test_every_attention_of_the_blocks_asks_the_library_of_the_job(asked: Asked, family: Family, variant: Variant) -> None:
    transformer = tiny_transformer_of(family, variant)
    native = velocity(family, variant, transformer, [3], torch.float32)
    for count, name in enumerate(BACKENDS, 1):
        use_attention(transformer, name)
        torch.testing.assert_close(velocity(family, variant, transformer, [3], torch.float32), native, rtol=1e-4, atol=1e-5)
        blocks = sum(len(transformer.get_submodule(name)) for name in family.blocks)  # type: ignore[arg-type]
        assert len(asked.masks) >= count * blocks
    use_attention(transformer, "auto")
    calls = len(asked.masks)
    assert torch.equal(velocity(family, variant, transformer, [3], torch.float32), native)
    assert len(asked.masks) == calls, "back to PyTorch's own"


@of_every_variant
def test_a_mask_is_given_only_where_lengths_differ(asked: Asked, family: Family, variant: Variant) -> None:
    transformer = tiny_transformer_of(family, variant)
    use_attention(transformer, "xformers")
    for lengths in ([4], [4, 4], [1]):
        velocity(family, variant, transformer, lengths, torch.float32)
    assert asked.masks
    assert not any(asked.masks)
    velocity(family, variant, transformer, [3, 5], torch.float32)
    assert any(asked.masks) == (family is not WAN)


@pytest.mark.parametrize("family", [MOCHI, HUNYUAN], ids=["mochi", "hunyuan"])
def test_the_answer_without_the_mask_is_the_answer_with_it(family: Family) -> None:
    """Also beside diffusers' own attention, which for Mochi leaves out the rows that do not count."""
    from diffusers.models.attention_processor import MochiAttnProcessor2_0

    for variant in family.variants:
        transformer = tiny_transformer_of(family, variant)
        without = velocity(family, variant, transformer, [6, 6], torch.float32)
        noisy = tiny_latents(family, variant, 2)
        inputs = family.prepare(variant, noisy, torch.full((2,), 0.6), tiny_conditions(family, variant, noisy, [False, False]))
        text = family.collate_text([tiny_text(family, 6, seed) for seed in range(2)], torch.device("cpu"), torch.float32)
        masked = TextBatch(text.embeds_BLD, every_row(text.embeds_BLD).contiguous(), text.pooled_BD)
        if family is MOCHI:
            for block in transformer.transformer_blocks:  # type: ignore[union-attr]
                block.attn1.processor = MochiAttnProcessor2_0()  # type: ignore[union-attr]
        with torch.no_grad():
            with_it = family.predict(transformer, inputs, masked)
        worst = float((with_it - without).abs().max() / with_it.abs().max())
        print(f"{variant.id}: {worst:.1e}")
        assert worst < 2e-6
        mixed = velocity(family, variant, tiny_transformer_of(family, variant), [6, 9], torch.float32)
        assert float((mixed[:1] - without[:1]).abs().max() / without.abs().max()) < 2e-6, "a longer caption beside it changes nothing"


@of_every_variant
def test_in_half_precision_every_library_gets_half_precision(asked: Asked, family: Family, variant: Variant) -> None:
    transformer = tiny_transformer_of(family, variant)
    kept = set(getattr(transformer, "_keep_in_fp32_modules", None) or ())
    for name, parameter in transformer.named_parameters():
        if kept.isdisjoint(name.split(".")):
            parameter.data = parameter.data.bfloat16()
    use_attention(transformer, "flash")
    velocity(family, variant, transformer, [4], torch.bfloat16)
    assert asked.dtypes == {torch.bfloat16}
