import numpy as np
import pytest

from trainers.demo.score import Asked, Score, score_clip, summarise
from trainers.demo.world import (
    CONCEPT,
    DIRECTIONS,
    MOTIONS,
    Scene,
    caption,
    random_scenes,
    read_clip,
    render,
    write_clips,
)


def test_a_seed_gives_the_same_scenes_and_a_longer_list_begins_with_the_shorter() -> None:
    assert random_scenes(5, seed=1) == random_scenes(9, seed=1)[:5]
    assert random_scenes(5, seed=1) != random_scenes(5, seed=2)


def test_the_concept_is_drawn_only_when_asked_for() -> None:
    assert {scene.motion for scene in random_scenes(300, seed=0)} == set(MOTIONS)
    assert {scene.motion for scene in random_scenes(10, seed=0, motions=[CONCEPT])} == {CONCEPT}


def test_shapes_stay_in_the_picture() -> None:
    for scene in random_scenes(200, seed=3, motions=tuple(DIRECTIONS)):
        frames = render(scene).astype(int)
        coloured = (frames.max(axis=3) - frames.min(axis=3) > 90).sum(axis=(1, 2))
        assert coloured.min() > 0.8 * coloured.max(), scene


def test_written_clips_are_read_back_with_their_captions(tmp_path) -> None:
    scenes = random_scenes(3, seed=4)
    paths = write_clips(tmp_path, scenes)
    for path, scene in zip(paths, scenes, strict=True):
        frames = read_clip(path)
        assert frames.shape == (9, 64, 64, 3)
        assert np.abs(frames.astype(int) - render(scene)).mean() < 6
        assert path.with_suffix(".txt").read_text(encoding="utf-8").strip() == caption(scene)


@pytest.mark.parametrize("by_file", [False, True])
def test_true_clips_score_full_marks(tmp_path, by_file: bool) -> None:
    scenes = random_scenes(40, seed=5, motions=tuple(DIRECTIONS))
    clips = write_clips(tmp_path, scenes) if by_file else [render(scene) for scene in scenes]
    summary = summarise([(Asked.parse(caption(scene)), score_clip(clip)) for scene, clip in zip(scenes, clips, strict=True)])
    assert (summary.colour, summary.shape, summary.motion, summary.concept) == (1.0, 1.0, 1.0, 1.0)


def test_noise_and_empty_ground_are_no_clip_of_the_world() -> None:
    grey = np.full((9, 64, 64, 3), 90, np.uint8)
    assert score_clip(grey) == Score(None, None, None, (0.0, 0.0))
    noise = np.random.default_rng(0).integers(0, 256, (9, 64, 64, 3), dtype=np.uint8)
    assert score_clip(noise).motion in (None, "still")


def test_a_still_shape_and_the_other_diagonal_are_told_from_the_concept() -> None:
    scene = Scene("red", "circle", "right", "plain", 14.0, (32.0, 32.0), 0.0)
    still = render(scene)
    assert score_clip(still).motion == "still"
    rising = render(Scene("red", "circle", CONCEPT, "plain", 14.0, (32.0, 32.0), 24.0))
    assert score_clip(rising).motion == CONCEPT
    assert score_clip(rising[::-1]).motion == "elsewhere"


def test_a_caption_of_another_form_is_refused() -> None:
    with pytest.raises(ValueError, match="'a cat' is no caption"):
        Asked.parse("a cat")
