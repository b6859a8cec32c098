"""Two experts in one run: turns, noise levels, files, resuming; on two tiny transformers that differ in their weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import WAN, TinyShape, random_transformer, tiny_job

from trainers import family
from trainers.errors import JobError
from trainers.experts import Expert, expert_at, experts_of, lora_of, turn_of
from trainers.flow import draw_sigma, generator
from trainers.job import Job, NoiseSpec, parse_job
from trainers.load import native_state
from trainers.lora_description import expert_of
from trainers.preflight import check
from trainers.run import Run
from trainers.stable_file import save_file
from trainers.trainer import train
from trainers.training import open_training

BOUNDARY = 0.875


@pytest.fixture(autouse=True)
def two_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny Wan counts as one of two experts, as its name says."""
    real = type(WAN).detect

    def detect(self: object, checkpoint: object) -> family.Detection | None:
        found = real(self, checkpoint)
        name = checkpoint.path.name
        expert = "high" if "high" in name else "low" if "low" in name else None
        return found and replace(found, variants=(replace(found.variant, boundary=BOUNDARY),), expert=expert)

    monkeypatch.setattr(type(WAN), "detect", detect)


def job(folder: Path, **fields: object) -> Job:
    """A job over two files, whose transformers differ."""
    folder.mkdir(exist_ok=True)
    made = tiny_job(folder, **({"steps": 8, "experts": {"turn_steps": 2}, "checkpoints": {"every_steps": 4}} | fields))
    for name, seed in (("high", 1), ("low", 2)):
        state = random_transformer(TinyShape(), seed).state_dict()
        save_file(native_state(state, WAN.keys), folder / f"tiny_{name}_noise.safetensors")
    base = {"transformer": str(folder / "tiny_high_noise.safetensors"), "transformer_low_noise": str(folder / "tiny_low_noise.safetensors")}
    return parse_job(made.model_dump() | {"base": base | fields.get("base", {})})  # type: ignore[operator]


def test_they_take_turns_and_count_their_own_steps() -> None:
    turns = [turn_of(step, 9, 2, 2) for step in range(1, 10)]
    assert [turn.index for turn in turns] == [0, 0, 1, 1, 0, 0, 1, 1, 0]
    assert [turn.step for turn in turns] == [1, 2, 1, 2, 3, 4, 3, 4, 5]
    assert {(turn.index, turn.total_steps) for turn in turns} == {(0, 5), (1, 4)}
    assert [turn_of(step, 3, 2, 1) for step in (1, 2, 3)] == [replace(turns[0], step=step, total_steps=3) for step in (1, 2, 3)]


@pytest.mark.parametrize("distribution", ["logit_normal", "uniform", "shift"])
def test_noise_levels_lie_in_the_range_and_are_spread_as_the_distribution_is(distribution: str) -> None:
    noise = NoiseSpec(distribution=distribution)
    everywhere = [draw_sigma(noise, generator(0, i)) for i in range(20_000)]
    low, high = 0.6, 0.9
    expected = torch.tensor(sorted(sigma for sigma in everywhere if low <= sigma <= high))
    found = torch.tensor(sorted(draw_sigma(noise, generator(1, i), low, high) for i in range(len(expected))))
    assert low <= found[0] < found[-1] <= high
    assert (found - expected).abs().mean() < 0.01


def test_the_ranges_overlap_at_the_boundary(tmp_path: Path) -> None:
    variant = family.Variant("two", "Two", boundary=0.9)
    high, low = experts_of(job(tmp_path), variant)
    assert (high.name, high.lowest_sigma, high.highest_sigma) == ("high", pytest.approx(0.87), 1.0)
    assert (low.name, low.lowest_sigma, low.highest_sigma) == ("low", 0.0, pytest.approx(0.93))
    assert expert_at([high, low], 0.9, 0.9) is high
    assert expert_at([high, low], 0.89, 0.9) is low
    assert experts_of(job(tmp_path), family.Variant("one", "One")) == (Expert("", high.path),)


def test_each_gets_its_lora_from_its_own_steps(tmp_path: Path) -> None:
    run = Run.create(job(tmp_path, held_out={"every_steps": 8, "sigmas": [0.2, 0.95]}))
    assert train(run) == "done"
    folder = tmp_path / "loras" / "tiny"
    assert sorted(path.name for path in folder.iterdir()) == [
        f"tiny-{name}-00000{step}.safetensors" for name in ("high", "low") for step in (4, 8)
    ]
    assert [expert_of(folder / f"tiny-{name}-000008.safetensors") for name in ("high", "low")] == ["high", "low"]
    metrics = run.read_metrics()
    assert [line["expert"] for line in metrics] == ["high", "high", "low", "low"] * 2
    assert [line["expert_step"] for line in metrics] == [1, 2, 1, 2, 3, 4, 3, 4]
    assert all((line["sigma"] >= BOUNDARY - 0.03) if line["expert"] == "high" else (line["sigma"] <= BOUNDARY + 0.03) for line in metrics)
    assert {"held_out_loss_0.2", "held_out_loss_0.95"} <= metrics[-1].keys()
    first, last = (load_file(folder / f"tiny-high-00000{step}.safetensors") for step in (4, 8))
    other = load_file(folder / "tiny-low-000008.safetensors")
    assert first.keys() == last.keys() == other.keys()
    assert any(not torch.equal(first[key], last[key]) for key in first)
    assert any(not torch.equal(other[key], last[key]) for key in other)


def test_a_resumed_run_is_the_run(tmp_path: Path) -> None:
    straight, broken = (Run.create(job(tmp_path / name)) for name in ("straight", "broken"))
    assert train(straight) == "done"
    real, seen = broken.requested, []
    object.__setattr__(broken, "requested", lambda: "stop" if seen.append(0) or len(seen) == 6 else real())
    assert train(broken) != "done"
    assert train(Run.open(broken.folder)) == "done"
    for name in ("high", "low"):
        files = [tmp_path / which / "loras" / "tiny" / f"tiny-{name}-000008.safetensors" for which in ("straight", "broken")]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_one_expert_alone(tmp_path: Path) -> None:
    made = job(tmp_path, experts={"train": "low"})
    alone = made.model_copy(
        update={"base": made.base.model_copy(update={"transformer": made.base.transformer_low_noise, "transformer_low_noise": None})}
    )
    run = Run.create(alone)
    assert train(run) == "done"
    assert {line["expert"] for line in run.read_metrics()} == {"low"}
    assert max(line["sigma"] for line in run.read_metrics()) <= BOUNDARY + 0.03
    assert not list((tmp_path / "loras" / "tiny").glob("*high*"))


def test_the_other_expert_takes_part_where_it_is_asked(tmp_path: Path) -> None:
    training = open_training(Run.create(job(tmp_path, experts={"train": "low"})))
    high, low = training.learners
    assert (high.optimizer, high.parameters) == (None, [])
    assert training.transformer_at(0.95) is high.transformer
    assert training.transformer_at(0.5) is low.transformer


def test_learning_rates_of_their_own(tmp_path: Path) -> None:
    run = Run.create(job(tmp_path, experts={"turn_steps": 2, "learning_rate_low": 1e-3}, optimizer={"learning_rate": 1e-4}))
    assert train(run) == "done"
    assert {(line["expert"], line["lr"]) for line in run.read_metrics()} == {("high", 1e-4), ("low", 1e-3)}


def test_a_run_starts_from_a_pair_of_loras(tmp_path: Path) -> None:
    first = Run.create(job(tmp_path / "first"))
    assert train(first) == "done"
    lora = tmp_path / "first" / "loras" / "tiny" / "tiny-high-000008.safetensors"
    second = open_training(Run.create(job(tmp_path / "second", start={"initial_lora": str(lora)})))
    for learner in second.learners:
        expected = load_file(lora_of(lora, learner.expert.name))
        key = next(iter(key for key in expected if "lora_B" in key))
        assert any(torch.equal(parameter.data, expected[key]) for parameter in learner.parameters)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda base: base | {"transformer_low_noise": None}, "experts.train is both, and one file is given; .* has two experts"),
        (lambda base: base | {"transformer": base["transformer_low_noise"]}, "are one file"),
        (lambda base: {name: base[other] for name, other in zip(base, reversed(base), strict=True)}, "Exchange them"),
        (lambda base: base | {"transformer_low_noise": "nowhere.safetensors"}, "nowhere.safetensors does not exist"),
    ],
)
def test_files_that_cannot_be_the_two_experts(tmp_path: Path, change: object, told: str) -> None:
    made = job(tmp_path)
    base = {name: getattr(made.base, name) for name in ("transformer", "transformer_low_noise")}
    with pytest.raises(JobError, match=told):
        check(parse_job(made.model_dump() | {"base": change(base)}))  # type: ignore[operator]


def test_the_wrong_expert_alone(tmp_path: Path) -> None:
    made = job(tmp_path, experts={"train": "low"})
    base = {"transformer": made.base.transformer}
    with pytest.raises(JobError, match=r"experts\.train is low, base.transformer is the high-noise expert by its name"):
        check(parse_job(made.model_dump() | {"base": base}))


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("a-high-000500", "a-low-000500"),
        ("Wan_HIGH_x", "Wan_LOW_x"),
        ("High noise", "Low noise"),
        ("highway", "lowway"),
        ("high-low", "low-low"),
    ],
)
def test_pairs_of_files_by_their_names(tmp_path: Path, name: str, other: str) -> None:
    high, low = tmp_path / f"{name}.safetensors", tmp_path / f"{other}.safetensors"
    assert lora_of(high, "low") == high, "no such file"
    for path in (high, low):
        path.touch()
    is_pair = name not in ("highway", "high-low")
    assert lora_of(high, "low") == (low if is_pair else high)
    assert lora_of(high, "high") == high
    assert lora_of(high, "") == high
