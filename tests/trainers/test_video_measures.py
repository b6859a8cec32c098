"""Videos whose faults are known: each measure tells its own fault, and is what it is said to be."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from trainers import video_measures
from trainers.video_measures import consistency, flicker, luminance_of, measure, sharpness, shrink, warp_pair


def texture(height: int, width: int, seed: int, blur: float = 2.0) -> np.ndarray:
    """A smooth random picture (H, W, 3) between 40 and 215."""
    noise = np.random.default_rng(seed).normal(size=(height, width, 3)).astype(np.float32)
    smooth = cv2.GaussianBlur(noise, (0, 0), blur)
    return 40 + 175 * (smooth - smooth.min()) / np.ptp(smooth)


def as_video(frames) -> np.ndarray:
    return np.stack([np.clip(np.round(frame), 0, 255).astype(np.uint8) for frame in frames])


def moving_square(frames: int = 17, step: int = 2) -> np.ndarray:
    background, square = texture(96, 128, seed=1), texture(40, 40, seed=2)
    video = np.repeat(background[None], frames, 0)
    for i in range(frames):
        video[i, 28:68, 8 + step * i : 48 + step * i] = square
    return as_video(video)


MOVING = moving_square()


def test_a_steady_motion_is_without_fault():
    measures = measure(MOVING)
    assert measures["flicker"] < 1e-3
    assert measures["consistency"] > 0.96
    assert measures["sharpness"] > 0


def test_jumps_of_brightness_are_flicker_and_nothing_else():
    jumps = np.random.default_rng(0).uniform(-20, 20, len(MOVING))
    flickering = as_video(MOVING.astype(np.float32) + jumps[:, None, None, None])
    steady, told = measure(MOVING), measure(flickering)
    middle = (jumps[:-2] + jumps[2:]) / 2
    assert told["flicker"] == pytest.approx(np.abs(jumps[1:-1] - middle).mean() / 255, abs=1e-3)
    assert told["flicker"] > 20 * steady["flicker"]
    assert told["sharpness"] == pytest.approx(steady["sharpness"], rel=0.01)


@pytest.mark.parametrize(
    ("levels", "expected"), [([0, 255] * 3, 1.0), ([100] * 5, 0.0), (range(0, 250, 25), 0.0), ([0, 0, 51, 0, 0], 0.4 / 3)]
)
def test_flicker_has_its_range_and_a_fade_has_none(levels, expected):
    frames = np.stack([np.full((8, 8, 3), level, np.uint8) for level in levels])
    assert flicker(luminance_of(frames)) == pytest.approx(expected, abs=1e-6)


def test_a_blurred_video_is_less_sharp_and_as_steady():
    blurred = as_video([cv2.GaussianBlur(frame, (0, 0), 2) for frame in MOVING])
    sharp, soft = measure(MOVING), measure(blurred)
    assert soft["sharpness"] < 0.1 * sharp["sharpness"]
    assert soft["consistency"] >= sharp["consistency"] - 0.01


def test_sharpness_is_the_variance_of_the_laplacian():
    plane = np.random.default_rng(0).uniform(size=(256, 300)).astype(np.float32)
    padded = np.pad(255 * plane.astype(np.float64), 1, mode="reflect")
    laplacian = padded[:-2, 1:-1] + padded[2:, 1:-1] + padded[1:-1, :-2] + padded[1:-1, 2:] - 4 * padded[1:-1, 1:-1]
    assert sharpness(plane[None]) == pytest.approx(laplacian.var(), rel=1e-5)


def test_the_same_scene_at_half_the_size_has_about_the_same_figures():
    scene = [texture(700, 1000, seed=3, blur=4)[2 * i : 2 * i + 480, 3 * i : 3 * i + 832] for i in range(4)]
    large, half, quarter = (
        measure(as_video([cv2.resize(frame, size, interpolation=cv2.INTER_AREA) for frame in scene]))
        for size in ((832, 480), (416, 240), (208, 120))
    )
    assert half["sharpness"] == pytest.approx(large["sharpness"], rel=0.05)
    assert half["consistency"] == pytest.approx(large["consistency"], abs=0.005)
    assert large["sharpness"] > quarter["sharpness"] > large["sharpness"] / 2, "what 120 lines cannot show is missing"


def test_frames_out_of_order_and_frames_that_have_nothing_in_common_are_inconsistent():
    order = np.random.default_rng(1).permutation(len(MOVING))
    unrelated = as_video([texture(96, 128, seed=10 + i) for i in range(6)])
    steady, shuffled, torn = (consistency(video) for video in (MOVING, MOVING[order], unrelated))
    assert steady > shuffled + 0.03
    assert shuffled > torn + 0.3
    assert torn < 0.5


class _Known:
    """An optical flow that knows the answer: everything moves by `shift` (x, y); back again, the other way (or `back`)."""

    def __init__(self, shift, back=None):
        self.answers = [shift, back or tuple(-part for part in shift)]

    def calc(self, first, second, start):
        return np.full((*first.shape, 2), self.answers.pop(0), np.float32)


def test_the_warping_error_is_that_of_the_pixels_that_can_be_followed():
    first = as_video([texture(40, 50, seed=5)])[0]
    second = np.roll(first, (2, 3), (0, 1))
    second[2:22] = np.clip(second[2:22].astype(int) + 51, 0, 255)
    error, followed = warp_pair(first, second, _Known((3, 2)))
    assert followed == pytest.approx(47 * 38 / (50 * 40)), "what moved out of the picture is not followed"
    there = np.roll(second, (-2, -3), (0, 1))[:38, :47].astype(float)
    assert error == pytest.approx(np.mean(((first[:38, :47] - there) / 255) ** 2), rel=1e-5)
    assert error > 0.01
    assert warp_pair(first, first, _Known((3, 2), back=(3, 2))) == (0.0, 0.0), "there and back is not where it began"


def test_a_still_video_is_consistent_even_when_it_is_small():
    assert consistency(np.repeat(MOVING[:1, :12, :12], 3, 0)) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("shape", "known"),
    [
        ((1, 32, 32), {"sharpness"}),
        ((2, 32, 32), {"sharpness", "consistency"}),
        ((3, 8, 32), {"sharpness", "flicker"}),
        ((3, 32, 32), {"sharpness", "flicker", "consistency"}),
    ],
)
def test_what_a_video_is_too_short_or_too_small_for_is_left_out(shape, known):
    assert measure(np.zeros((*shape, 3), np.uint8)).keys() == known


def test_a_long_or_large_video_takes_no_longer():
    flows = []
    frames = np.zeros((81, 24, 24, 3), np.uint8)
    frames[::2] += 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(video_measures, "warp_pair", lambda first, second, flow: flows.append((first.max(), second.max())) or (0.0, 1.0))
        assert consistency(frames) == 1.0
    assert len(flows) == video_measures.MOST_PAIRS
    assert all(first != second for first, second in flows), "pairs are neighbours"
    assert shrink(np.zeros((1, 480, 832, 3), np.uint8)).shape == (1, 256, 444, 3)
    assert shrink(np.zeros((1, 200, 832, 3), np.uint8)).shape == (1, 200, 832, 3)
