from __future__ import annotations

from trainers.data.buckets import Geometry, plan_windows
from trainers.data.report import listing, narrow_listing, report, summary
from trainers.data.scan import Clip, Dataset, Rejected
from trainers.data.video import VideoInfo
from trainers.errors import Problem
from trainers.family import LatentSpec

SPEC = LatentSpec(16, 4, 8, 16, 16.0, (0.0,) * 16, (1.0,) * 16)


def test_the_report_tells_clips_buckets_captions_and_reasons():
    clips = (
        Clip("/a\nb.mp4", "a\nb.mp4", "one two three", VideoInfo("video", 48, 24.0, 1280, 720, 2.0), repeats=3),
        Clip("/small.mp4", "small.mp4", "one", VideoInfo("video", 120, 30.0, 320, 180, 4.0)),
        Clip("/held.mp4", "held.mp4", "one", VideoInfo("video", 120, 30.0, 1280, 720, 4.0), held_out=True),
        Clip("/still.png", "still.png", "one two", VideoInfo("image", 1, 0.0, 640, 640, 0.0)),
        Clip("/short.mp4", "short.mp4", "one", VideoInfo("video", 2, 24.0, 640, 480, 0.1)),
    )
    dataset = Dataset(clips, (Rejected("bad.mp4", Problem("it is bad", "it must be good", "Mend it.")),))
    text = report(dataset, plan_windows(dataset, Geometry(416, 240, 17), SPEC))
    assert "4 videos (10.1 seconds), 1 image\n" in text
    assert "4 windows, 1 of them held out; 5 samples per epoch" in text
    assert "a\\nb.mp4" in text
    lines = text.splitlines()
    assert any(line.split() == ["416x240", "17", "16", "3", "1"] for line in lines)
    assert any(line.split() == ["304x304", "1", "16", "1"] for line in lines)
    assert "captions: 3 different, 1 to 3 words, half of them at least 1" in text
    assert "2 files are not used:" in text
    assert "  bad.mp4: it is bad; it must be good. Mend it." in text
    assert any(line.startswith("  short.mp4: 0.10 seconds are 2 frames") for line in lines)


def test_a_long_list_of_clips_is_cut_and_says_so():
    info = VideoInfo("video", 48, 24.0, 1280, 720, 2.0)
    dataset = Dataset(tuple(Clip(f"/{index}.mp4", f"{index}.mp4", "a", info) for index in range(60)))
    text = report(dataset, plan_windows(dataset, Geometry(416, 240, 17), SPEC))
    assert "... and 10 more" in text
    assert "49.mp4" in text
    assert "50.mp4" not in text


def test_the_summary_counts_what_is_there_without_any_geometry():
    large, small = VideoInfo("video", 48, 24.0, 1280, 720, 2.0), VideoInfo("video", 16, 15.987, 64, 64, 1.0)
    sizes = [VideoInfo("image", 1, 0.0, side, side, 0.0) for side in range(100, 106)]
    clips = (
        Clip("/a.mp4", "a.mp4", "one two", large, repeats=3),
        Clip("/b.mp4", "b.mp4", "one", large, repeats=5, held_out=True),
        Clip("/c.mp4", "c.mp4", "one", small),
        *(Clip(f"/{index}.png", f"{index}.png", "one", info) for index, info in enumerate(sizes)),
    )
    rejected = (Rejected("bad.mp4", Problem("it is bad", "it must be good", "Mend it.")),)
    assert summary(Dataset(clips, rejected)).splitlines() == [
        "3 videos (5.0 seconds), 6 images",
        "10 clips per epoch, 1 held out",
        "sizes: 1280x720 (2), 64x64 (1), 100x100 (1), 101x101 (1), 102x102 (1), 103x103 (1) and 2 more",
        "frames a second: 24 (2), 16 (1)",
        "captions: 2 different, 1 to 2 words, half of them at least 1",
        "",
        "1 file is not used:",
        "  bad.mp4: it is bad; it must be good. Mend it.",
    ]
    assert "frames a second" not in summary(Dataset(clips[3:]))
    assert summary(Dataset(clips[3:])).endswith("captions: 1 different, 1 word each")
    assert summary(Dataset(clips[:1])).endswith("captions: 1 different, 2 words")


def test_the_listing_pages_and_tells_what_a_model_makes_of_each_clip():
    clips = (
        Clip("/a.mp4", "a.mp4", "one\ntwo", VideoInfo("video", 48, 24.0, 1285, 720, 2.0), repeats=3),
        Clip("/b.png", "b.png", "a still", VideoInfo("image", 1, 0.0, 640, 8, 0.0)),
        Clip("/c.mp4", "c.mp4", "three", VideoInfo("video", 6, 24.0, 640, 480, 0.25), held_out=True),
        Clip("/d.mp4", "d.mp4", "four", VideoInfo("video", 120, 24.0, 640, 480, 5.0)),
    )
    dataset = Dataset(clips, (Rejected("bad.mp4", Problem("it is bad", "it must be good", "Mend it.")),))
    lines = listing(dataset, 1, 3, SPEC).splitlines()
    head, rejected = (part.splitlines() for part in summary(dataset).split("\n\n"))
    assert head[0] == "3 videos (7.2 seconds), 1 image"
    assert lines[: len(head) + 1] == [*head, ""]
    assert lines[-3:] == ["", *rejected]
    assert "The model sees 16 frames a second, 4n+1 frames at once, sides in multiples of 16." in lines
    assert "Videos that are long enough fill 29 frames or more, half of them 29 or more, the longest 77." in lines
    rows = [" ".join(line.split()) for line in lines]
    assert "1 a.mp4 1285x720 2.00 48 24 3 32 29 1280x720" in rows
    assert "2 b.png 640x8 image 1 1 1 too small" in rows
    assert "3 c.mp4 640x480 0.25 6 24 held out 4 too short 640x480" in rows
    assert lines[-7:-3] == ["captions", "1. one two", "2. a still", "3. three"]
    page = listing(Dataset(clips), 4, 3)
    assert page.splitlines()[-2:] == ["captions", "4. four"]
    assert "a.mp4" not in page
    assert "model" not in page


def test_the_narrow_listing_fits_into_a_node_and_leaves_out_what_is_told_elsewhere():
    info = VideoInfo("video", 121, 23.976, 1280, 720, 5.05)
    names = [f"holiday/a walk along the river in the evening {number:02}.mp4" for number in range(1, 13)]
    clips = tuple(Clip(f"/{name}", name, "a walk", info) for name in names)
    rejected = (Rejected("bad.mp4", Problem("it is bad", "it must be good", "Mend it.")),)
    plain, fitted = narrow_listing(Dataset(clips, rejected), 11, 2), narrow_listing(Dataset(clips), 11, 2, SPEC)
    assert plain.splitlines()[0].split() == ["clip", "size", "seconds", "frames", "fps"]
    assert plain.splitlines()[3:] == ["", "captions", "11. a walk", "12. a walk"]
    assert plain.splitlines()[2].startswith("12  a walk a... 12.mp4  1280x720")
    rules, table, _ = fitted.split("\n\n")
    assert rules.startswith("The model sees 16 frames a second")
    assert table.splitlines()[0].split() == ["clip", "seconds", "at", "16", "fps", "longest", "largest"]
    for line in (plain.splitlines()[:3], table.splitlines()):
        assert max(map(len, line)) <= 56
    held_out = Clip("/b.mp4", "b.mp4", "b", info, held_out=True)
    assert "held out" in narrow_listing(Dataset((*clips, held_out)), 13, 1)
