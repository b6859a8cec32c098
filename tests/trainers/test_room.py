"""A device that is too small: the run goes on with more of the model in host memory, and learns what it would have learnt."""

from __future__ import annotations

import dataclasses

import pytest
import tiny_families
import torch
from tiny_families import tiny_job_of

from trainers import room, trainer
from trainers.checkpoint import Checkpoint
from trainers.errors import JobError, RunError
from trainers.family import IMAGE_TEXT, detect, families
from trainers.job import MemorySpec
from trainers.job_memory import plan_memory
from trainers.machine import GIB, Machine
from trainers.offload.placement import place
from trainers.residency import Residency
from trainers.room import Meter, is_out_of_memory, largest, probe, with_room
from trainers.run import Run
from trainers.trainer import train
from trainers.training import open_training


@pytest.fixture
def wan_run(tmp_path, monkeypatch):
    shallow = tiny_families.tiny_config
    monkeypatch.setattr(tiny_families, "tiny_config", lambda family, variant: {**shallow(family, variant), "num_layers": 6})
    family = families()["wan"]

    def make(name: str, **fields) -> Run:
        # all Linears can be streamed, as they are on a card
        fields = {"memory": {"stream": "always"}, "gradient_checkpointing": True, "steps": 3, **fields}
        return Run.create(tiny_job_of(tmp_path / name, family, family.variants[0], **fields))

    return make


def roomy(training):
    """As on a large card: everything stays."""
    first = training.learners[0].residency
    training.rearrange(dataclasses.replace(first.arrangement, weights_bytes=None))
    return first


def loras(run: Run) -> list[bytes]:
    return [path.read_bytes() for path in sorted((run.folder.parent.parent / "loras").rglob("*.safetensors"))]


class SmallDevice:
    """Raises PyTorch's error within the backward pass of a step while more than so many bytes of blocks are on the device."""

    def __init__(self, monkeypatch, at_step: int, room_for_bytes: int) -> None:
        self.failed = 0
        opened, loss_of = trainer.open_training, trainer.batch_loss

        def open_roomy(run):
            self.training = opened(run)
            roomy(self.training)
            return self.training

        def loss(*args):
            found = loss_of(*args)
            residency = self.training.learners[0].residency
            held = place(residency.block_bytes, residency.arrangement.weights_bytes).device_bytes
            if self.training.step == at_step and (held > room_for_bytes or residency.arrangement.activations == "device"):
                self.failed += 1
                found.register_hook(_out_of_memory)
            return found

        monkeypatch.setattr(trainer, "open_training", open_roomy)
        monkeypatch.setattr(trainer, "batch_loss", loss)


def _out_of_memory(gradient):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def test_a_run_that_meets_a_full_device_learns_the_same(wan_run, monkeypatch):
    straight = wan_run("straight")
    assert train(straight) == "done"
    small = wan_run("small", accumulation=1)
    device = SmallDevice(monkeypatch, at_step=2, room_for_bytes=600_000)
    assert train(small) == "done"
    assert device.failed >= 2
    assert loras(small) == loras(straight) != []
    told = [event["message"] for event in small.read_events() if event["event"] == "memory"]
    assert len(told) == device.failed
    assert "Out of GPU memory at step 2. The step is repeated with less on the GPU: all blocks stay on the GPU, their inputs " in told[0]
    assert "their inputs are in host memory" in told[0]
    assert "of 6 blocks stay on the GPU" in told[-1]
    steps = [line["step"] for line in small.read_metrics()]
    assert steps == [1, 2, 3]


def test_when_nothing_is_left_the_run_says_so(wan_run, monkeypatch):
    """First it waits: another program may need the device for some minutes."""
    run, slept = wan_run("tiny device"), []
    monkeypatch.setattr(room.time, "sleep", slept.append)
    SmallDevice(monkeypatch, at_step=2, room_for_bytes=0)
    with pytest.raises(RunError, match=r"Out of GPU memory at step 2, .* No checkpoint has been saved yet\.") as caught:
        train(run)
    assert "memory.quantise" in str(caught.value)


@pytest.mark.parametrize(("request_", "outcome"), [("pause", "paused"), ("stop", "stopped")])
def test_a_run_that_waits_for_memory_can_be_paused_and_stopped(wan_run, monkeypatch, request_, outcome):
    """A user who pressed Pause or Stop while the GPU was full waited for up to ten minutes, and then the run failed."""
    straight, run, slept = wan_run("straight"), wan_run("asked"), []
    train(straight)

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        run.request(request_)

    with monkeypatch.context() as patched:
        patched.setattr(room.time, "sleep", sleep)
        SmallDevice(patched, at_step=2, room_for_bytes=0)
        assert train(run) == outcome
    assert len(slept) == 1
    assert run.checkpoints() == [1]
    run.clear(request_)
    assert train(run) == "done"
    assert [line["step"] for line in run.follow_metrics()[0]] == [1, 2, 3]
    assert loras(run)[-1] == loras(straight)[-1]


def test_all_blocks_stay_where_the_job_wants_that_and_anything_else_can_be_given_up(wan_run):
    """The probe streamed a block of a job with memory.stream = "never", although the inputs of blocks were still on the GPU."""
    run = wan_run("never")
    training = open_training(run)
    training.job = training.job.model_copy(update={"memory": MemorySpec(stream="never")})
    residency = roomy(training)
    budget = 1_000_000 + sum(residency.block_bytes) - max(residency.block_bytes)
    probe(training, budget, metered(training, 1_000_000))
    assert not residency.placement.streamed
    assert residency.arrangement.activations == "host"
    (message,) = [event["message"] for event in run.read_events() if event["event"] == "memory"]
    assert "could not be kept" not in message


def test_other_errors_are_not_swallowed(wan_run):
    training = open_training(wan_run("other"))

    def fails():
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        with_room(training, fails)


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA error: device-side assert triggered"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_a_full_device_says(error, full):
    assert is_out_of_memory(error) is full


def test_the_errors_tensors_are_free_before_the_step_is_done_again(wan_run, monkeypatch):
    """What the failed attempt held must not be held by its traceback while room is made."""
    import weakref

    training, seen = open_training(wan_run("refs")), []
    roomy(training)

    def attempt():
        tensor = torch.zeros(1000)
        if not seen:
            seen.append(weakref.ref(tensor))
            raise torch.OutOfMemoryError("CUDA out of memory")
        return "done"

    made = room._make_room
    monkeypatch.setattr(room, "_make_room", lambda *given: seen.append(seen[0]() is None) or made(*given))
    assert with_room(training, attempt) == "done"
    assert seen[1] is True


def test_room_is_made_again_when_making_it_finds_none(wan_run, monkeypatch):
    training, attempts = open_training(wan_run("again")), []
    roomy(training)
    rearranged = training.rearrange

    def rearrange(arrangement):
        attempts.append(arrangement)
        if len(attempts) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        rearranged(arrangement)

    monkeypatch.setattr(training, "rearrange", rearrange)
    outcomes = iter([torch.OutOfMemoryError("CUDA out of memory"), "done"])

    def work():
        outcome = next(outcomes)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    assert with_room(training, work) == "done"
    assert len(attempts) == 2


def metered(training, fixed_bytes: int) -> Meter:
    residency = training.learners[0].residency
    return Meter(lambda: None, lambda: fixed_bytes + residency.placement.device_bytes)


@pytest.mark.parametrize("surprise", [0.5, 1.0, 1.6])
def test_the_probe_corrects_the_plan(wan_run, surprise):
    """Whatever the plan took the rest for, afterwards the budget is used to within a block, and kept."""
    run = wan_run("probed")
    training = open_training(run)
    # On a CPU only "always" streams, and such a job is never corrected: the probe is asked as for "auto".
    training.job = training.job.model_copy(update={"memory": MemorySpec()})
    residency = training.learners[0].residency
    block, planned_rest = max(residency.block_bytes), 1_000_000
    budget = planned_rest + 4 * block
    training.rearrange(dataclasses.replace(residency.arrangement, weights_bytes=budget - planned_rest))
    meter = metered(training, int(surprise * planned_rest))
    probe(training, budget, meter)
    peak = meter.peak_bytes()
    everything = len(residency.placement.resident) == 6
    assert peak <= budget
    assert everything or peak > budget * 0.97 - 2 * block
    (event,) = [event for event in run.read_events() if event["event"] == "memory"]
    assert "the largest sample takes" in event["message"]
    assert all(parameter.grad is None for parameter in training.learners[0].parameters)


def test_the_probe_leaves_room_for_an_optimizer_that_has_made_no_step(wan_run):
    """A plan that is exactly right is not changed by it, and holds when the optimizer has its state."""
    training = open_training(wan_run("exact", optimizer={"learning_rate": 1e-3, "kind": "adamw"}))
    residency = training.learners[0].residency
    state = 8 * sum(parameter.numel() for parameter in training.learners[0].parameters)
    assert room.unmade_bytes(training) == state > 0
    rest, block = 1_000_000, max(residency.block_bytes)
    budget = int((rest + state + 4 * block) / 0.97) + 1
    training.rearrange(dataclasses.replace(residency.arrangement, weights_bytes=4 * block))
    made = residency.placement

    def peak_bytes() -> int:
        return rest + residency.placement.device_bytes + (state if training.learners[0].optimizer.state else 0)

    probe(training, budget, Meter(lambda: None, peak_bytes))
    assert residency.placement == made
    training.step = 1
    trainer.optimize(training)
    assert room.unmade_bytes(training) == 0
    assert peak_bytes() <= budget
    probe(training, budget, Meter(lambda: None, peak_bytes))
    assert residency.placement == made


def test_the_meter_starts_again_with_each_attempt(wan_run, monkeypatch):
    training, started = open_training(wan_run("attempts")), []
    roomy(training)
    tried = room.batch_loss

    def loss(*args):
        if len(started) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return tried(*args)

    monkeypatch.setattr(room, "batch_loss", loss)
    probe(training, None, Meter(lambda: started.append(1), lambda: 1))
    assert len(started) == 2


def test_a_full_device_in_the_optimizer_s_step_is_told_and_not_done_twice(wan_run, monkeypatch):
    training = open_training(wan_run("optimizer"))
    training.step, steps = 1, []

    def step(*args, **kwargs):
        steps.append(1)
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(training.learners[0].optimizer, "step", step)
    with pytest.raises(RunError, match=r"Out of GPU memory for the optimizer in step 1\. No checkpoint has been saved yet\."):
        trainer.optimize(training)
    with training.run.writing_checkpoint(250):
        pass
    with pytest.raises(RunError, match=r"The checkpoint of step 250 is kept\."):
        trainer.optimize(training)
    assert steps == [1, 1]


def test_the_probe_changes_nothing_that_is_learnt(wan_run, monkeypatch):
    straight, probed = wan_run("straight"), wan_run("probed")
    train(straight)
    monkeypatch.setattr(room, "meter_of", lambda device: Meter(lambda: None, lambda: 10**6))
    train(probed)
    assert loras(probed) == loras(straight) != []
    assert any(event["event"] == "memory" for event in probed.read_events())


def test_the_largest_sample(wan_run):
    training = open_training(wan_run("largest"))
    micro = largest(training)
    assert len(micro.clips) == training.job.batch_size
    lengths = [training.encoded.cache.shapes(IMAGE_TEXT, item.text)["embeds_LD"][0] for item in training.samples.items]
    assert [lengths[clip] for clip in micro.clips] == sorted(lengths, reverse=True)[:2]


def small_card(free_bytes: int) -> Machine:
    rates = {"flops_rate": 1e13, "memory_rate": 1e11, "copy_rate": 1e10}
    return Machine("a small card", "cuda", total_bytes=2 * free_bytes, free_bytes=free_bytes, ram_bytes=64 * GIB, **rates)


def test_a_run_is_kept_as_it_is_planned(wan_run, monkeypatch):
    """A plan for a card that holds a part of the blocks, carried out: fewer are streamed than the job alone would say."""
    plans = []

    def planned(job, detection, samples):
        asked = job.model_copy(update={"gradient_checkpointing": True, "memory": MemorySpec(activations="device", chunks=1)})
        ample = plan_memory(asked, detection, samples, samples.device, torch.float32, small_card(100 * GIB))
        assert not ample.price.placement.streamed
        needed = ample.price.device_bytes + ample.price.reserve_bytes
        card = small_card(needed - 2 * max(ample.model.blocks))
        plans.append(plan_memory(asked, detection, samples, samples.device, torch.float32, card))
        assert 0 < len(plans[0].price.placement.streamed) < 6
        return plans[0]

    straight, run = wan_run("straight"), wan_run("planned")
    train(straight)
    monkeypatch.setattr("trainers.training._planned", planned)
    monkeypatch.setattr(room, "meter_of", lambda device: Meter(lambda: None, lambda: plans[0].machine.free_bytes))
    train(run)
    assert loras(run) == loras(straight) != []
    told = [event["message"] for event in run.read_events() if event["event"] == "memory"]
    assert "GiB are planned." in told[0]
    assert "blocks" in told[0]
    assert "the largest sample takes" in told[1]


def test_a_correction_for_which_there_is_no_room_is_not_the_end(wan_run, monkeypatch):
    """The probe finds that more would fit; while it comes the device is full."""
    run = wan_run("corrected")
    training = open_training(run)
    training.take_turn()
    residency, entered = training.learners[0].residency, Residency.enter
    roomier = dataclasses.replace(residency.arrangement, weights_bytes=None, activations="host")

    def enter(self):
        entered(self)
        if not self.placement.streamed:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(Residency, "enter", enter)
    monkeypatch.setattr(room, "_corrected", lambda *given: roomier)
    probe(training, budget_bytes=GIB, meter=Meter(lambda: None, lambda: 0))
    assert 0 < len(residency.placement.streamed) < len(residency.block_bytes)
    messages = [event["message"] for event in run.read_events() if event["event"] == "memory"]
    assert "Out of GPU memory at step 0" in messages[-2]
    assert "the largest sample takes" in messages[-1]
    training.step = 1
    trainer.optimize(training)


@pytest.mark.slow
@pytest.mark.parametrize("free_bytes", [20 * 2**20])
def test_what_cannot_fit_is_told_before_anything_is_loaded(wan_run, free_bytes):
    training = open_training(wan_run("too small"))
    detection = detect(Checkpoint.open(training.job.base.transformer))
    with pytest.raises(JobError, match="MiB at the least"):
        plan_memory(training.job, detection, training.samples, training.device, torch.float32, small_card(free_bytes))
