"""First frames, frame rate and guidance, from a job to what a family's `prepare` gets: in training, evaluation and previews."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from first_frames import ALWAYS, EVERYTHING, NEVER, SOMETIMES, FirstFrameWan, known
from tiny import TinyShape, random_transformer, tiny_job

from trainers import previews
from trainers.batches import Samples
from trainers.conditions import draws_first_frame, spread_first_frames
from trainers.data.cache import Cache
from trainers.data.encoded import Encoded, EncodedImage
from trainers.demo.demo import VAE
from trainers.errors import JobError
from trainers.evaluate import HeldOut
from trainers.experts import Expert
from trainers.family import FIRST_FRAME, FIRST_FRAME_CLIP, IMAGE_EMBEDS, IMAGE_TEXT, LATENTS, TextRecord, Variant
from trainers.flow import draw_sample
from trainers.job import Job, parse_job
from trainers.preflight import check, check_settings
from trainers.run import Run
from trainers.trainer import train
from trainers.training import lora_path

SHAPE = TinyShape(layers=1)


@pytest.fixture
def family() -> Iterator[FirstFrameWan]:
    with known() as family:
        yield family


def job_for(folder: Path, variant: Variant, **fields: Any) -> Job:
    """A job over tiny data that were encoded for a variant, with all that it requires."""
    job = tiny_job(folder, SHAPE, **fields)
    base = job.base.model_copy(update={"variant": variant.id})
    encoded = Encoded.open(folder / "encoded")
    replace(with_everything(encoded) if variant is ALWAYS else encoded, variant=variant.id).save()
    return job.model_copy(update={"base": base})


def with_everything(encoded: Encoded) -> Encoded:
    """The data with random extras of every clip, and texts of its own for each."""
    items = []
    for number, item in enumerate(encoded.items):
        extras, text = extras_of(encoded.cache, number), f"text{number}"
        encoded.cache.write_text(text, TextRecord(torch.full((2, SHAPE.text_dim), float(number))))
        items.append(replace(item, extras=extras, text_without_caption=text, fps=8.0 + number))
    return replace(encoded, items=tuple(items), prompts={})


def extras_of(cache: Cache, number: int) -> dict[str, str]:
    channels, frames, height, width = SHAPE.latent
    shapes = {FIRST_FRAME: (channels, 1, height, width), FIRST_FRAME_CLIP: (channels, frames, height, width), IMAGE_EMBEDS: (5, 7)}
    for kind, shape in shapes.items():
        cache.write(kind, f"{kind}{number}", torch.full(shape, float(number + 1)))
    return {kind: f"{kind}{number}" for kind in shapes}


def samples_of(job: Job, family: FirstFrameWan, variant: Variant) -> Samples:
    return Samples.of(job, family, variant, Encoded.open(job.encoded), torch.device("cpu"), torch.float32)


def test_every_kind_reaches_prepare_in_the_order_of_the_clips(tmp_path: Path, family: FirstFrameWan):
    job = job_for(tmp_path, ALWAYS, batch_size=2, caption_dropout=1.0)
    samples = samples_of(job, family, ALWAYS)
    (micro,) = samples.order.step(1)
    batch = samples.batch(1, micro)
    numbers = [samples.encoded.items.index(samples.items[clip]) for clip in micro.clips]
    assert set(batch.conditions.tensors) == EVERYTHING - {LATENTS, IMAGE_TEXT}
    for tensor in batch.conditions.tensors.values():
        assert [float(one.mean()) for one in tensor] == [number + 1 for number in numbers]
    assert batch.conditions.tensors[FIRST_FRAME].shape == (2, 16, 1, 4, 4)
    assert batch.conditions.first_frame_B.tolist() == [True, True]  # type: ignore[union-attr]
    assert batch.conditions.fps_B.tolist() == [8.0 + number for number in numbers]  # type: ignore[union-attr]
    assert [float(rows[0, 0]) for rows in batch.text.embeds_BLD] == numbers, "the empty caption comes with the clip's own image"


def test_latent_0_is_the_first_frame_where_the_model_says_so(tmp_path: Path, family: FirstFrameWan):
    samples = samples_of(job_for(tmp_path, SOMETIMES, batch_size=4), family, SOMETIMES)
    drawn = []
    for step in range(1, 30):
        (micro,) = samples.order.step(step)
        batch = samples.batch(step, micro)
        assert torch.equal(batch.conditions.tensors[FIRST_FRAME], batch.clean_BCFHW[:, :, :1])
        keep = batch.conditions.first_frame_B
        assert keep is None or keep.any()
        drawn += [False] * len(micro.clips) if keep is None else keep.tolist()
    assert 0.35 < sum(drawn) / len(drawn) < 0.65


@pytest.mark.parametrize(("probability", "share"), [(0.0, 0.0), (0.25, 0.25), (1.0, 1.0)])
def test_a_draw_is_a_function_of_seed_step_and_sample(probability: float, share: float):
    draws = [draws_first_frame(probability, 7, step, index) for step in range(200) for index in range(5)]
    assert abs(sum(draws) / len(draws) - share) < 0.05
    assert draws == [draws_first_frame(probability, 7, step, index) for step in range(200) for index in range(5)]
    other = [draws_first_frame(0.5, 8, step, 0) for step in range(64)]
    assert other != [draws_first_frame(0.5, 7, step, 0) for step in range(64)]


def test_nothing_else_is_drawn_otherwise(tmp_path: Path, family: FirstFrameWan):
    (tmp_path / "with").mkdir()
    (tmp_path / "without").mkdir()
    first = samples_of(job_for(tmp_path / "with", SOMETIMES, batch_size=2), family, SOMETIMES)
    second = samples_of(job_for(tmp_path / "without", NEVER, batch_size=2), family, NEVER)
    for step in range(1, 5):
        (micro,) = first.order.step(step)
        one, other = first.batch(step, micro), second.batch(step, micro)
        assert torch.equal(one.noise_BCFHW, other.noise_BCFHW)
        assert torch.equal(one.sigma_B, other.sigma_B)
        assert torch.equal(one.text.embeds_BLD, other.text.embeds_BLD)
        expected = draw_sample(first.job.noise, 0.1, first.job.seed, step, micro.first, SHAPE.latent)
        assert torch.equal(one.noise_BCFHW[0], expected.noise_CFHW)
    assert other.conditions.tensors == {}
    assert other.conditions.first_frame_B is None


def test_a_still_keeps_no_first_frame_unless_the_model_knows_nothing_else(tmp_path: Path, family: FirstFrameWan):
    job = job_for(tmp_path, SOMETIMES, conditions=[{"probability": 1.0}])
    samples = samples_of(job, family, SOMETIMES)
    (micro,) = samples.order.step(1)
    assert samples.batch(1, micro).conditions.first_frame_B is not None
    for item in samples.items:
        samples.encoded.cache.write_latents(item.latents, torch.zeros(16, 1, 4, 4))
    assert samples.batch(1, micro).conditions.first_frame_B is None


@pytest.mark.parametrize(
    ("probability", "count", "kept"), [(0.0, 5, []), (1.0, 3, [0, 1, 2]), (0.5, 4, [0, 2]), (0.2, 5, [2]), (0.2, 1, []), (0.5, 1, [0])]
)
def test_held_out_clips_keep_theirs_evenly(probability: float, count: int, kept: list[int]):
    assert [number for number, keep in enumerate(spread_first_frames(probability, count)) if keep] == kept


def test_the_held_out_loss_is_conditioned_the_same_way_every_time(tmp_path: Path, family: FirstFrameWan):
    job = job_for(tmp_path, SOMETIMES, held_out={"every_steps": 1, "sigmas": [0.5]})
    held_out = HeldOut.of(job, family, SOMETIMES, Encoded.open(job.encoded), [Expert("", "")])
    transformer = random_transformer(SHAPE)
    losses = [held_out.loss(lambda _: transformer, torch.device("cpu"), torch.float32) for _ in range(2)]
    assert losses[0] == losses[1]
    kept = [conditions.first_frame_B is not None for conditions in family.seen]
    assert kept == [True, False] * 2, "two held-out clips, half of them"


def test_what_is_given_is_not_learnt_from(tmp_path: Path, family: FirstFrameWan):
    """With the first frame of every clip given, what its velocity would be does not change the LoRA."""
    loras = []
    for name, change in (("one", 0.0), ("other", 5.0)):
        (tmp_path / name).mkdir()
        job = job_for(tmp_path / name, ALWAYS, steps=2)
        encoded = Encoded.open(job.encoded)
        for item in encoded.items:
            latents = encoded.latents_CFHW(item)
            latents[:, :1] += change
            encoded.cache.write_latents(item.latents, latents)
        run = Run.create(job)
        assert train(run) == "done"
        loras.append(lora_path(run, 2).read_bytes())
    assert loras[0] == loras[1]


def test_guidance_is_told_to_the_model(tmp_path: Path, family: FirstFrameWan):
    for guidance in (None, 3.5):
        family.seen.clear()
        (tmp_path / str(guidance)).mkdir()
        train(Run.create(job_for(tmp_path / str(guidance), SOMETIMES, steps=1, guidance=guidance)))
        assert [conditions.guidance for conditions in family.seen] == [guidance]


# Previews


def job_with_previews(folder: Path, variant: Variant, images: list[str], **fields: Any) -> Job:
    """The job with two previews; "start.png" is encoded at their size."""
    job = job_for(folder, variant, steps=2, **fields)
    encoded = Encoded.open(folder / "encoded")
    texts = {}
    for text in ("a preview", "another", ""):
        encoded.cache.write_text(f"shown {text}", TextRecord(torch.randn(3, SHAPE.text_dim)))
        texts[text] = f"shown {text}"
    image = EncodedImage("start.png", 5, 32, 32, extras_of(encoded.cache, 50), texts if variant is ALWAYS else {})
    replace(encoded, prompts={} if variant is ALWAYS else texts, images=(image,)).save()
    size = {"width": 32, "height": 32, "num_frames": 5, "sampling_steps": 2, "cfg": 2.0}
    spec = {"every_steps": 2, "prompts": ["a preview", "another"], "before_training": False, "images": images, **size}
    base = job.base.model_dump() | {"vae": str(VAE)}
    return parse_job(job.model_dump(mode="json") | {"base": base, "previews": spec})


@pytest.mark.parametrize(("variant", "images"), [(ALWAYS, ["start.png"]), (SOMETIMES, ["", "elsewhere/start.png"]), (SOMETIMES, [])])
def test_previews_start_from_their_images(
    tmp_path: Path, family: FirstFrameWan, monkeypatch: pytest.MonkeyPatch, variant: Variant, images: list[str]
):
    sampled: list[torch.Tensor] = []
    sample = previews.sample_latents

    def kept(*arguments: Any, **options: Any) -> torch.Tensor:
        family.seen.clear()
        sampled.append(sample(*arguments, **options))
        assert all(conditions.guidance == 6.0 for conditions in family.seen)
        return sampled[-1]

    monkeypatch.setattr(previews, "sample_latents", kept)
    job = job_with_previews(tmp_path, variant, images)
    run = Run.create(job)
    assert train(run) == "done"
    assert len(list(run.samples_folder.glob("*.mp4"))) == 2
    given = [images[0] if len(images) == 1 else name for name in (images or ["", ""])] * (2 if len(images) == 1 else 1)
    for latents, name in zip(sampled, given, strict=True):
        first = latents[:, :, :1]
        assert bool((first == 51.0).all()) == bool(name), "the first frame is in the video as it was given"
        assert not (latents[:, :, 1:] == 51.0).any()


# What is wrong

AGAIN = 'Encode again with --image "other.png" --preview-size 32x32 --preview-frames 5.'


def problems(job: Job) -> list[str]:
    try:
        check(job)
    except JobError as error:
        return [str(problem) for problem in error.problems]
    return []


@pytest.mark.parametrize(
    ("variant", "conditions", "told"),
    [
        (NEVER, [{"probability": 0.5}], ["Wan 2.1 T2V (other size) starts from text alone. Leave conditions out."]),
        (NEVER, [], []),
        (NEVER, [{"probability": 0.0}], []),
        (SOMETIMES, [{"probability": 0.3}], []),
        (ALWAYS, [{"kind": "first_frame", "probability": 1.0}], []),
        (ALWAYS, [{"probability": 0.5}], ["Stand-in I2V always starts from one. Use 1, or leave conditions out."]),
        (ALWAYS, [], ["Stand-in I2V always starts from one. Use 1, or leave conditions out."]),
    ],
)
def test_what_a_variant_cannot_is_told(tmp_path: Path, family: FirstFrameWan, variant: Variant, conditions: Any, told: list[str]):
    job = job_for(tmp_path, variant, conditions=conditions)
    assert [problem.split("; ")[1] for problem in problems(job)] == told
    if told:
        with pytest.raises(JobError, match="the first frame is to be kept"):
            check_settings(job)


def test_guidance_for_a_model_that_takes_none_is_told(tmp_path: Path, family: FirstFrameWan):
    assert problems(job_for(tmp_path, NEVER, guidance=3.0)) == ["guidance is 3; Wan 2.1 T2V (other size) is told none. Leave it out."]


@pytest.mark.parametrize(("encoded_for", "variant"), [(SOMETIMES, ALWAYS), (ALWAYS, SOMETIMES)])
def test_data_that_lack_what_the_variant_needs_are_told(tmp_path: Path, family: FirstFrameWan, encoded_for: Variant, variant: Variant):
    job = job_for(tmp_path, encoded_for)
    (told,) = problems(job.model_copy(update={"base": job.base.model_copy(update={"variant": variant.id}), "caption_dropout": 0.0}))
    assert told.startswith(f"the data set was encoded for {encoded_for.id}, the base is {variant.id}; ")
    assert told.endswith("Encode it again for this base.")


def test_stills_are_nothing_to_learn_from_for_a_model_that_always_starts_from_an_image(tmp_path: Path, family: FirstFrameWan):
    job = job_for(tmp_path, ALWAYS)
    encoded = Encoded.open(job.encoded)
    replace(encoded, items=(replace(encoded.items[0], num_frames=1), *encoded.items[1:])).save()
    (told,) = problems(job)
    assert told.startswith("1 of 6 clips are stills; Stand-in I2V learns what follows a first frame.")


@pytest.mark.parametrize(
    ("variant", "images", "told"),
    [
        (NEVER, ["start.png"], "previews.images has 1; Wan 2.1 T2V (other size) starts from text alone"),
        (ALWAYS, [], "previews.images has 0 for 2 prompts; Stand-in I2V always starts from one"),
        (ALWAYS, ["start.png", ""], "previews.images has 1 for 2 prompts; Stand-in I2V always starts from one"),
        (SOMETIMES, ["start.png"] * 3, "previews.images has 3 for 2 prompts; each prompt has one"),
        (SOMETIMES, ["start.png", "a/start.png"], "previews.images names two files start.png; images are known by their names"),
        (SOMETIMES, ["other.png"], f"other.png is not encoded at the previews' size; images are encoded with the data set. {AGAIN}"),
    ],
)
def test_images_that_do_not_fit_the_previews_are_told(
    tmp_path: Path, family: FirstFrameWan, variant: Variant, images: list[str], told: str
):
    (problem,) = problems(job_with_previews(tmp_path, variant, images))
    assert problem.startswith(told)


def test_a_prompt_that_was_not_encoded_with_its_image_is_told(tmp_path: Path, family: FirstFrameWan):
    job = job_with_previews(tmp_path, ALWAYS, ["start.png"])
    (told,) = problems(job.model_copy(update={"previews": job.previews.model_copy(update={"prompts": ("a preview", "new")})}))
    assert told.startswith("the preview prompt 'new' is not encoded; prompts are encoded with the data set.")
    assert told.endswith('Encode again with --prompt "new" --image "start.png".')


def test_a_job_without_the_later_fields_keeps_its_hash():
    minimal = {"name": "kitten", "base": {"transformer": "wan.safetensors"}, "encoded": "data", "steps": 10}
    assert parse_job(minimal).hash() == "eeaacdcb73d6f4a5", "as before there were first frames: it is in the LoRA's file"
    for change in ({"conditions": []}, {"conditions": [{"probability": 0.5}]}, {"guidance": 0.0}, {"previews": {"images": ["a.png"]}}):
        assert parse_job(minimal | change).hash() != parse_job(minimal).hash()
    with pytest.raises(JobError):
        parse_job(minimal | {"conditions": [{"probability": 0.5}, {"probability": 0.5}]})


def test_paths_of_images_start_at_the_job_s_file(tmp_path: Path):
    values = {"name": "kitten", "base": {"transformer": "wan.safetensors"}, "encoded": "data", "steps": 10}
    job = parse_job(values | {"previews": {"images": ["a.png", ""]}}).with_absolute_paths(tmp_path)
    assert job.previews.images == (str(tmp_path / "a.png"), "")
