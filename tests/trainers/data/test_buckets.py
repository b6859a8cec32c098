from __future__ import annotations

from dataclasses import replace

import pytest

from trainers.data.buckets import Geometry, Window, plan_windows
from trainers.data.scan import Clip, Dataset
from trainers.data.video import VideoInfo
from trainers.errors import DatasetError
from trainers.family import LatentSpec

SPEC = LatentSpec(16, 4, 8, 16, 16.0, (0.0,) * 16, (1.0,) * 16)


def clip(width: int = 1280, height: int = 720, seconds: float = 6.0, fps: float = 24.0, kind: str = "video", name: str = "a") -> Clip:
    info = VideoInfo("video", round(seconds * fps), fps, width, height, seconds)
    if kind == "image":
        info = VideoInfo("image", 1, 0.0, width, height, 0.0)
    return Clip(f"/{name}", name, "caption", info)


def plan(clips: list[Clip], **geometry: object) -> list[Window]:
    return list(plan_windows(Dataset(tuple(clips)), Geometry(**geometry), SPEC).windows)


def one(clips: Clip, **geometry: object) -> Window:
    (window,) = plan([clips], **geometry)
    return window


def test_all_problems_of_the_geometry_are_found_before_anything_is_read():
    geometry = Geometry(830, 470, 80, fps=0.0, max_tokens=0, clip_mode="last", clips_per_video=0)  # type: ignore[arg-type]
    with pytest.raises(DatasetError) as caught:
        plan_windows(Dataset((clip(),)), geometry, SPEC)
    assert [problem.value.split()[0] for problem in caught.value.problems] == [
        "num_frames",
        "height",
        "width",
        "max_tokens",
        "clips_per_video",
        "fps",
        "clip_mode",
    ]


@pytest.mark.parametrize("num_frames", [2, 3, 4, 8, 79, 80])
def test_lengths_that_the_vae_would_silently_cut_are_refused(num_frames: int):
    with pytest.raises(DatasetError, match=f"num_frames is {num_frames}; this model needs 4n"):
        plan([clip()], num_frames=num_frames)


def test_every_window_keeps_the_models_rules():
    clips = [
        clip(width, height, seconds, name=f"{width}x{height}")
        for width, height in [(1280, 720), (720, 1280), (64, 3000), (3000, 64), (333, 777), (16, 16), (193, 144)]
        for seconds in (0.35, 0.5, 1.0, 3.21, 30.0)
    ]
    for geometry in (
        Geometry(832, 480, 81),
        Geometry(480, 832, 33, max_tokens=2000),
        Geometry(64, 64, 5, clip_mode="all"),
        Geometry(256, 128, 17, fps=8, bucketing=False, clip_mode="spread", max_tokens=300),
    ):
        windows = plan_windows(Dataset(tuple(clips)), geometry, SPEC).windows
        assert windows
        for window in windows:
            assert SPEC.problems(window.num_frames, window.height, window.width) == []
            assert window.height * window.width <= geometry.height * geometry.width
            assert SPEC.tokens(window.num_frames, window.height, window.width) <= (geometry.max_tokens or 10**9)
            last_seconds = window.start_seconds + (window.num_frames - 1) / window.fps
            assert last_seconds < window.clip.info.duration_seconds


@pytest.mark.parametrize(
    ("seconds", "num_frames"), [(6.0, 81), (5.0625, 81), (81 / 16 + 1e-4, 81), (5.0, 77), (4.8, 77), (1.0, 13), (0.32, 5)]
)
def test_a_clip_too_short_gets_the_longest_length_that_it_fills(seconds: float, num_frames: int):
    window = one(clip(seconds=seconds), num_frames=81)
    assert (window.num_frames, window.fps, window.start_seconds) == (num_frames, 16.0, 0.0)


def test_a_video_too_short_for_two_latents_is_refused_and_the_rest_goes_on():
    result = plan_windows(Dataset((clip(seconds=0.2, name="short"), clip())), Geometry(), SPEC)
    assert [window.clip.name for window in result.windows] == ["a"]
    assert [(item.name, item.reason) for item in result.rejected] == [
        ("short", "0.20 seconds are 4 frames at 16 per second; the shortest video has 5. Use a longer clip, or an image for a still.")
    ]
    assert one(clip(seconds=0.2), num_frames=1).num_frames == 1


def test_an_image_is_a_window_of_one_frame():
    window = one(clip(kind="image"), num_frames=81, clip_mode="all")
    assert (window.num_frames, window.start_seconds) == (1, 0.0)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((1280, 720), (832, 480)),
        ((832, 480), (832, 480)),
        ((1920, 1080), (832, 480)),
        ((480, 832), (480, 832)),
        ((500, 500), (624, 624)),
        ((4000, 1000), (1072, 368)),  # at most three times as wide as high
        ((1440, 1080), (720, 544)),
    ],
)
def test_a_clip_keeps_its_shape_at_the_asked_area(size: tuple[int, int], expected: tuple[int, int]):
    window = one(clip(*size))
    assert (window.width, window.height) == expected


def test_without_buckets_everything_is_cropped_to_one_size():
    assert {(window.width, window.height) for window in plan([clip(500, 500), clip(300, 900)], bucketing=False)} == {(832, 480)}
    small = one(clip(300, 900), bucketing=False, max_tokens=21 * 800)
    assert small.width / small.height == pytest.approx(832 / 480, rel=0.03)


def test_a_token_bound_shrinks_the_size_or_refuses_the_clip():
    whole = SPEC.tokens(81, 480, 832)
    window = one(clip(), max_tokens=whole // 2)
    tokens = SPEC.tokens(window.num_frames, window.height, window.width)
    assert whole * 0.45 < tokens <= whole // 2
    assert window.width / window.height == pytest.approx(16 / 9, rel=0.05)
    with pytest.raises(DatasetError, match=r"81 frames of 832 x 480 are 32760 tokens; max_tokens is 5000, less than 25%"):
        plan([clip()], max_tokens=5000)
    assert one(clip(kind="image"), max_tokens=5000).width == 832


def test_the_modes_place_windows():
    ten = clip(seconds=10.0)  # 160 frames at 16 per second

    def starts(**options: object) -> list[float]:
        return [window.start_seconds * 16 for window in plan([ten], num_frames=33, **options)]

    assert starts(clip_mode="first") == [0]
    assert starts(clip_mode="all") == [0, 33, 66, 99]
    assert starts(clip_mode="all", clips_per_video=2) == [0, 33]
    assert starts(clip_mode="spread") == [0, 42, 84, 127]
    assert starts(clip_mode="spread", clips_per_video=2) == [0, 127]
    assert starts(clip_mode="spread", clips_per_video=1) == [0]


def test_the_plan_is_a_function_of_its_arguments_and_fast():
    clips = [replace(clip(640 + index % 700, 480), name=str(index)) for index in range(3000)]
    assert plan(clips) == plan(clips)
