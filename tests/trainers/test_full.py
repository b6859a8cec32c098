"""method = "full": all weights of a tiny model are trained; the base's file stays as it is; what is written is read back."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch
import warm_worker
from ltx_files import CAUSAL, random_ltx, write_ltx
from model_files import entries, fp8_entries, shapes_of, write_header_only
from safetensors.torch import load_file
from tiny import TinyShape, random_transformer, tiny_job, write_transformer
from tiny_families import TINY, write_encoded_of

from trainers.checkpoint import Checkpoint
from trainers.cli import main
from trainers.device import Hardware
from trainers.errors import JobError, RunError
from trainers.experts import Expert
from trainers.family import detect, families
from trainers.full import MOST_PARAMETERS, FullMethod, full_problems
from trainers.inspection import inspect_file
from trainers.job import Job, parse_job
from trainers.load import load_transformer, native_state
from trainers.machine import Card
from trainers.plan import make_plan
from trainers.run import Run
from trainers.trainer import train
from trainers.training import lora_path

WAN, LTX = families()["wan"], families()["ltx"]
SHAPE = TinyShape(layers=1, ffn=128)
KILL_AT_RENAME = Path(__file__).parent / "kill_at_rename.py"


def full_job(folder: Path, shape: TinyShape = SHAPE, **fields: object) -> Job:
    folder.mkdir(exist_ok=True)
    return tiny_job(folder, shape, **({"lora": {}, "method": "full", "optimizer": {"learning_rate": 1e-3}} | fields))


def ltx_job(folder: Path, **fields: object) -> Job:
    """A job over a tiny LTX-Video whose header says how its frames count."""
    variant = LTX.variants[1]
    values = {
        "name": "tiny",
        "method": "full",
        "base": {
            "transformer": str(write_ltx(folder / "base.safetensors", random_ltx(width=64, layers=1, caption_channels=32), CAUSAL)),
            "variant": variant.id,
        },
        "encoded": str(write_encoded_of(folder / "encoded", LTX, variant)),
        "loras_folder": str(folder / "loras"),
        "runs_folder": str(folder / "runs"),
        "device": "cpu",
        "tensorboard": False,
        "optimizer": {"learning_rate": 1e-3},
        "caption_dropout": 0.0,
        "batch_size": 2,
    }
    return parse_job(values | fields)


def losses(run: Run) -> list[float]:
    return [line["loss"] for line in run.read_metrics()]


def state_of(path: Path, variant: str | None = None) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint.open(path)
    return load_transformer(checkpoint, detect(checkpoint, variant), "cpu", torch.float32, keep_stored=False).state_dict()


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


# It learns, and what it writes is a model


def test_wan_learns_from_the_command_line_and_the_base_stays_as_it_is(tmp_path, capsys):
    job = full_job(tmp_path, steps=16, batch_size=2, caption_dropout=0.0, held_out={"every_steps": 15, "sigmas": [0.3, 0.7]})
    base = Path(job.base.transformer)
    before = base.read_bytes()
    (tmp_path / "job.json").write_text(job.canonical_json(), "utf-8")
    assert main(["train", str(tmp_path / "job.json")]) == 0
    run = Run.open(tmp_path / "runs" / "tiny")
    held_out = [line["held_out_loss"] for line in run.read_metrics() if "held_out_loss" in line]
    assert sum(losses(run)[-5:]) < 0.9 * sum(losses(run)[:5])
    assert len(held_out) == 2
    assert base.read_bytes() == before, "the file that the weights were mapped from"

    model = tmp_path / "models" / "tiny" / "tiny-000016.safetensors"
    assert f"model files: {model.parent}" in capsys.readouterr().out
    assert not (tmp_path / "loras").exists()
    assert [event["model"] for event in run.read_events() if event["event"] == "checkpoint"] == [model.name]
    assert inspect_file(model).variants == inspect_file(base).variants
    trained, weights = state_of(model), load_file(run.checkpoint_folder(16) / "weights.safetensors")
    assert equal(trained, weights), "float32, as the base is stored: nothing is rounded"
    moved = [name for name, tensor in state_of(base).items() if not torch.equal(tensor, trained[name])]
    assert set(moved) == set(trained), "every parameter was trained"


def test_ltx_learns_and_its_file_says_what_comfyui_must_know(tmp_path):
    job = ltx_job(tmp_path, steps=16, gradient_checkpointing=True)
    run = Run.create(job)
    assert train(run) == "done"
    assert sum(losses(run)[-5:]) < 0.95 * sum(losses(run)[:5])
    written = Checkpoint.open(lora_path(run, 16))
    assert json.loads(written.metadata["config"]) == CAUSAL
    assert written.metadata["modelspec.architecture"] == written.metadata["video_trainer.variant"] == job.base.variant
    assert written.metadata["video_trainer.base"] == "base.safetensors"
    assert not any(str(tmp_path) in text for text in written.metadata.values())
    assert detect(written, job.base.variant).config == detect(Checkpoint.open(job.base.transformer), job.base.variant).config
    assert equal(state_of(lora_path(run, 16), job.base.variant), load_file(run.checkpoint_folder(16) / "weights.safetensors"))


@pytest.mark.parametrize("layout", ["native", "diffusers"])
def test_the_file_has_native_names_and_the_dtypes_of_the_base(tmp_path, layout):
    """One tensor is stored otherwise than the rest, in both namings; the weights in between are float32."""
    transformer, odd = random_transformer(SHAPE), "blocks.0.scale_shift_table"
    state = {name: tensor.to(torch.float32 if name == odd else torch.bfloat16) for name, tensor in transformer.state_dict().items()}
    path = tmp_path / "wan2.1.safetensors"
    write_plain(path, native_state(state, WAN.keys) if layout == "native" else state)
    checkpoint = Checkpoint.open(path)
    detection = detect(checkpoint)
    method = FullMethod.of(full_job(tmp_path / "job"), checkpoint, detection)
    loaded = load_transformer(checkpoint, detection, "cpu", torch.float32, method.keep_stored)
    parameters = method.inject(loaded, torch.device("cpu"))
    assert {parameter.dtype for parameter in parameters} == {torch.float32}
    method.write(tmp_path / "out.safetensors", loaded, Expert("", str(path)), "out", 1)
    found = load_file(tmp_path / "out.safetensors")
    assert equal(found, native_state(state, WAN.keys))
    assert {name for name, tensor in found.items() if tensor.dtype == torch.float32} == {"blocks.0.modulation"}


def write_plain(path: Path, state: dict[str, torch.Tensor]) -> None:
    from safetensors.torch import save_file

    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)


def test_an_ltx_in_diffusers_layout_gets_the_header_that_a_native_file_needs(tmp_path):
    random_ltx(width=64, layers=1).save_pretrained(tmp_path / "LTX-Video-0.9.5" / "transformer")
    checkpoint = Checkpoint.open(tmp_path / "LTX-Video-0.9.5")
    method = FullMethod.of(full_job(tmp_path / "job"), checkpoint, detect(checkpoint))
    assert json.loads(method.header["config"]) == CAUSAL


# Resuming


@pytest.mark.slow
def test_a_killed_run_is_the_run_that_was_never_touched(tmp_path):
    """Killed when the second checkpoint was written and had not got its name: the run goes on from the first."""
    settings = {
        "steps": 6,
        "batch_size": 2,
        "accumulation": 2,
        "checkpoints": {"every_steps": 2, "keep_last": 1},
        "optimizer": {"learning_rate": 1e-3, "schedule": "cosine"},
        "gradient_checkpointing": True,
    }
    straight, killed = (Run.create(full_job(tmp_path / name, **settings)) for name in ("straight", "killed"))
    assert train(straight) == "done"
    worker = warm_worker.start(killed.folder, killed.log_file, str(KILL_AT_RENAME), "step-000004")
    worker.join()
    assert worker.exitcode == -signal.SIGKILL, killed.log_file.read_text()
    assert killed.checkpoints() == [2]
    killed.tidy()
    assert train(killed) == "done"
    for step in (2, 4, 6):
        assert lora_path(straight, step).read_bytes() == lora_path(killed, step).read_bytes(), f"step {step}"
    assert losses(straight) == losses(killed)
    assert killed.checkpoints() == [6]
    assert not list(lora_path(killed, 6).parent.glob(".*"))


def test_in_bf16_a_stopped_run_goes_on_as_the_straight_one(tmp_path):
    """Weights in bf16, what the class wants otherwise in float32, with the real adamw_kahan."""
    optimizer = {"kind": "adamw_kahan", "learning_rate": 1e-4}
    settings = {"steps": 4, "precision": "bf16", "optimizer": optimizer, "gradient_checkpointing": True}
    straight, stopped = (Run.create(full_job(tmp_path / name, **settings)) for name in ("straight", "stopped"))
    assert train(straight) == "done"
    write = stopped.metrics
    stopped.metrics = lambda **fields: (write(**fields), stopped.request("stop") if fields["step"] == 2 else None)
    assert train(stopped) == "stopped"
    again = Run.open(stopped.folder)
    again.clear("stop")
    assert train(again) == "done"
    weights = load_file(straight.checkpoint_folder(4) / "weights.safetensors")
    assert weights["blocks.0.attn1.to_q.weight"].dtype == torch.bfloat16
    assert weights["blocks.0.scale_shift_table"].dtype == torch.float32
    assert equal(weights, load_file(again.checkpoint_folder(4) / "weights.safetensors"))
    assert lora_path(straight, 4).read_bytes() == lora_path(again, 4).read_bytes()
    assert losses(straight) == losses(again)


def test_extends_goes_on_exactly_and_only_as_the_same_method(tmp_path):
    job = full_job(tmp_path, steps=4, checkpoints={"every_steps": 2})
    first = Run.create(job)
    train(first)
    rest = Run.create(extending(job, "tiny@2"))
    train(rest)
    assert [line["step"] for line in rest.read_metrics()] == [3, 4]
    assert equal(load_file(lora_path(first, 4)), load_file(lora_path(rest, 4)))

    with pytest.raises(JobError) as caught:
        train(Run.create(extending(job, "tiny@2", name="lora", method="lora", precision="bf16")))
    assert [problem.value for problem in caught.value.problems] == ["method is lora, in tiny it is full"]
    with pytest.raises(JobError, match=r"precision is fp32, in tiny it is auto.*or that run's model as base\.transformer"):
        train(Run.create(extending(job, "tiny@2", name="other", precision="fp32")))


def extending(job: Job, run_at_step: str, **fields: object) -> Job:
    return parse_job(job.model_dump(mode="json") | {"name": "rest", "start": {"extends": run_at_step}} | fields)


def test_a_checkpoint_of_another_precision_is_refused(tmp_path):
    """As when a run with precision auto is resumed on another device."""
    job = full_job(tmp_path)
    checkpoint = Checkpoint.open(job.base.transformer)
    method = FullMethod.of(job, checkpoint, detect(checkpoint))
    transformer = load_transformer(checkpoint, detect(checkpoint), "cpu", torch.float32, method.keep_stored)
    method.inject(transformer, torch.device("cpu"))
    stored = {name: tensor.bfloat16() for name, tensor in method.tensors(transformer).items()}
    with pytest.raises(RunError, match=r"as bfloat16 \[.*\], this run as float32 \[.*\]; a run goes on in the same precision"):
        method.load_tensors(transformer, stored)


# What is wrong


def problems_of(path: Path, job: Job) -> list[str]:
    checkpoint = Checkpoint.open(path)
    return [str(problem) for problem in full_problems(job, checkpoint, detect(checkpoint), Hardware.of(torch.device("cpu")))]


@pytest.mark.parametrize(
    ("family", "name"), [(family.id, published) for family in families().values() for published in TINY[family.id].published]
)
def test_small_models_are_trained_and_large_ones_refused(tmp_path, family, name):
    """By the published headers."""
    path = tmp_path / name.file_name
    shapes = shapes_of(name.keys)
    write_header_only(path, entries(shapes, torch.bfloat16), name.metadata)
    found = problems_of(path, full_job(tmp_path / "job"))
    small = name.keys in ("wan2.1_t2v_1.3B", "ltxv_2B")
    assert any("billion parameters" in problem for problem in found) is not small
    assert any("two experts" in problem for problem in found) is ("a14b" in name.variant)
    assert bool(found) is not small


def test_an_fp8_base_is_refused(tmp_path):
    for name, scale in (("plain", None), ("scaled", "scale_weight")):
        path = tmp_path / f"wan2.1_{name}.safetensors"
        write_header_only(path, fp8_entries(shapes_of("wan2.1_t2v_1.3B"), torch.float8_e4m3fn, scale))
        (problem,) = problems_of(path, full_job(tmp_path / "job"))
        assert "which fp8 is too coarse for. Give the bf16 or fp16 file" in problem


def test_everything_that_has_no_meaning_is_said_at_once(tmp_path):
    job = full_job(
        tmp_path,
        lora={"rank": 8, "dropout": 0.1},
        experts={"turn_steps": 5},
        memory={"quantise": "fp8", "stream": "always"},
        start={"initial_lora": "some.safetensors"},
        precision="bf16",
    )
    with pytest.raises(JobError) as caught:
        make_plan(job)
    assert [problem.value for problem in caught.value.problems] == [
        "lora.rank is 8",
        "lora.dropout is 0.1",
        "experts.turn_steps is 5",
        "memory.stream is always",
        "start.initial_lora is some.safetensors",
        "optimizer.kind is adamw, in bf16",
        "memory.quantise is fp8 and method is full",
    ]


@pytest.mark.parametrize(("precision", "told"), [("fp16", "weights in fp16 lose small updates"), ("bf16", "adamw_kahan carries them on")])
def test_a_precision_that_loses_updates_is_refused(tmp_path, precision, told):
    job = full_job(tmp_path, precision=precision)
    (problem,) = problems_of(Path(job.base.transformer), job)
    assert told in problem
    assert '"fp32"' in problem


def test_a_lora_has_none_of_these_problems(tmp_path):
    job = full_job(tmp_path, method="lora", precision="bf16", memory={"quantise": "nf4", "stream": "always"})
    assert problems_of(Path(job.base.transformer), job) == []


def test_plan_says_what_is_trained_and_how_large_it_becomes(tmp_path):
    job = full_job(tmp_path, steps=1000, checkpoints={"every_steps": 300, "keep_last": 2})
    write_transformer(Path(job.base.transformer).with_name("half.safetensors"), SHAPE, torch.bfloat16)
    job = job.model_copy(update={"base": job.base.model_copy(update={"transformer": str(tmp_path / "half.safetensors")})})
    plan = make_plan(job)
    text, parameters = str(plan), plan.parameters
    assert parameters == sum(tensor.numel() for tensor in random_transformer(SHAPE).state_dict().values()) < MOST_PARAMETERS
    assert "tiny: all weights of Wan 2.1 T2V" in text
    assert f"{parameters / 1e6:.2f} million, all of them, in fp32" in text
    assert f"4 models of {2 * parameters / 2**20:.1f} MiB" in text
    assert f"about {12 * parameters / 2**20:.1f} MiB each, {36 * parameters / 2**20:.1f} MiB while the last of 2 is written" in text
    assert f"output   {tmp_path / 'models' / 'tiny'}" in text
    assert "LoRA" not in text
    price = plan.memory.price
    exact, rounded = (4 + 8) * parameters, 3 * 512 * 100  # three tensors for each of at most 100 weights, in pieces of 512 bytes
    assert exact <= price.trained_bytes <= exact + rounded, "weights and AdamW's two averages, in float32"
    assert price.weights_bytes <= 2**20, "all weights are trained; what is frozen are tables of positions"
    assert price.step_bytes >= 4 * parameters, "the gradients of all weights"
    assert "all weights and optimizer" in text


def test_all_weights_in_bf16_are_planned_for_a_card(tmp_path):
    fields = {"optimizer": {"kind": "adamw_kahan"}, "precision": "bf16", "gradient_checkpointing": True}
    job = full_job(tmp_path, **fields)
    card = Card("a card", 24.0, 100, 900, 22).machine(ram_gib=32)
    plan = make_plan(job, card)
    assert plan.memory.fits
    assert not plan.memory.price.placement.streamed
    assert plan.memory.price.trained_bytes < 9 * plan.parameters, "2 bytes of weight and 6 of adamw_kahan; some parts are float32"
