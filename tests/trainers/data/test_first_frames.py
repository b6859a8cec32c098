"""What is encoded of first frames: by an encoder that costs nothing, and by real classes of tiny size from a folder."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from clip_files import numbered, write_caption, write_image, write_video
from encoder_files import write_models
from first_frames import ALWAYS, EVERYTHING, NEVER, FirstFrameWan
from test_encode import GEOMETRY, SPEC, AverageEncoder
from test_encoded import ITEM, make

from trainers.data.buckets import Geometry, plan_windows
from trainers.data.cache import Cache
from trainers.data.encoded import Encoded, EncodedImage
from trainers.data.scan import scan_folder
from trainers.encoders import (
    EncodeReport,
    FirstFrames,
    all_shots_cached,
    dataset_shots,
    encode_dataset,
    encode_prompts,
    needed_texts,
    preview_shots,
)
from trainers.encoding import IMAGE_KINDS, TEXT_KINDS, VAE_KINDS
from trainers.errors import CheckpointError, DatasetError
from trainers.family import FIRST_FRAME, FIRST_FRAME_CLIP, IMAGE_EMBEDS, IMAGE_TEXT, LATENTS, TextRecord
from trainers.folder_encoder import EncoderFiles, FolderEncoder, needed_parts

CLIPS = 3


class EveryKind(AverageEncoder):
    """Also looks at first frames: rows hold the mean grey, a text its length and the mean grey."""

    required = EVERYTHING

    def __init__(self) -> None:
        super().__init__()
        self.images: list[torch.Tensor] = []
        self.order: list[str] = []

    def encode_video(self, pixels_BCFHW: torch.Tensor) -> torch.Tensor:
        self.order.append("vae")
        return super().encode_video(pixels_BCFHW)

    def encode_image(self, image_HWC: torch.Tensor) -> torch.Tensor:
        self.order.append("image")
        self.images.append(image_HWC)
        return image_HWC.mean().expand(5, 7).clone()

    def encode_text(self, prompts: Any, image_HWC: torch.Tensor | None = None) -> list[TextRecord]:
        self.order.append("text")
        assert image_HWC is not None, "every text comes with an image"
        self.prompts.extend(prompts)
        return [TextRecord(torch.full((len(prompt) + 1, 4), float(image_HWC.mean()))) for prompt in prompts]


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    folder = tmp_path / "clips"
    folder.mkdir()
    for index in range(CLIPS):
        write_caption(write_video(folder / f"{index}.mp4", [numbered(frame + 10 * index) for frame in range(24)], 16), f"clip {index}")
    return folder


def grey(index: int) -> float:
    """The first frame of clip `index`, in 0..1."""
    return (4 * 10 * index + 8) / 255


def encode(clips: Path, encoder: Any = None, **options: Any) -> EncodeReport:
    return encode_dataset(scan_folder(clips), GEOMETRY, encoder or EveryKind(), clips.parent / "out", **options)


def opened(clips: Path) -> Encoded:
    return Encoded.open(clips.parent / "out")


def test_everything_that_is_required_is_made_of_the_first_frame(clips: Path):
    report = encode(clips)
    assert (report.latents_new, report.texts_new, report.first_frames_new) == (CLIPS, 2 * CLIPS, 3 * CLIPS)
    assert "first frames: 9 encoded, 0 already there" in str(report)
    encoded = opened(clips)
    assert encoded == report.encoded
    assert encoded.problems() == []
    assert encoded.prompts == {}, "no text stands alone"
    for index, item in enumerate(encoded.items):
        tensors = {kind: encoded.extra(kind, key) for kind, key in item.extras.items()}
        assert set(tensors) == {FIRST_FRAME, FIRST_FRAME_CLIP, IMAGE_EMBEDS}
        first = torch.full(SPEC.shape(1, 48, 64), 2 * grey(index) - 1)
        assert torch.allclose(tensors[FIRST_FRAME], first, atol=0.01)
        clip = tensors[FIRST_FRAME_CLIP]
        assert clip.shape == encoded.latents_CFHW(item).shape
        assert torch.allclose(clip[:, :1], first, atol=0.01)
        assert not clip[:, 1:].any(), "mid-grey is 0 in -1..1"
        assert torch.allclose(tensors[IMAGE_EMBEDS], torch.full((5, 7), grey(index)), atol=0.005)
        caption, without = encoded.text(item.text), encoded.text(item.text_without_caption or "")
        assert (len(caption.embeds_LD), len(without.embeds_LD)) == (len(item.caption) + 1, 1)
        assert caption.embeds_LD[0, 0] == without.embeds_LD[0, 0] == pytest.approx(grey(index), abs=0.005)


def test_one_kind_of_model_comes_after_the_other(clips: Path):
    encoder = EveryKind()
    encode(clips, encoder)
    assert [name for name, before in zip(encoder.order, ["", *encoder.order], strict=False) if name != before] == ["text", "image", "vae"]


def test_the_grey_clip_is_what_comfyui_s_node_builds(clips: Path):
    encoder = EveryKind()
    encode(clips, encoder)
    first_and_grey = [pixels for pixels in encoder.videos if pixels.shape[2] == 9 and not pixels[:, :, 1:].any()]
    assert len(first_and_grey) == CLIPS
    alone = [pixels for pixels in encoder.videos if pixels.shape[2] == 1]
    assert all(torch.equal(one, clip[:, :, :1]) for one, clip in zip(alone, first_and_grey, strict=True))


@pytest.mark.parametrize(
    ("kind", "folder", "count"), [(LATENTS, "latents", 1), (FIRST_FRAME, "latents", 1), (IMAGE_EMBEDS, "image", 1), (IMAGE_TEXT, "text", 1)]
)
def test_only_what_is_missing_is_encoded(clips: Path, kind: str, folder: str, count: int):
    encode(clips)
    before = (clips.parent / "out/encoded.json").read_bytes()
    item = opened(clips).items[1]
    key = {LATENTS: item.latents, IMAGE_TEXT: item.text}.get(kind) or item.extras[kind]
    (clips.parent / f"out/cache/{folder}/{key[:2]}/{key}.safetensors").unlink()
    encoder = EveryKind()
    encode(clips, encoder)
    assert len(encoder.videos) == (kind in VAE_KINDS)
    assert len(encoder.images) == (kind in IMAGE_KINDS)
    assert encoder.prompts == (["clip 1"] if kind in TEXT_KINDS else [])
    assert (clips.parent / "out/encoded.json").read_bytes() == before


def test_what_lacks_is_known_without_any_model(clips: Path):
    def lacking(**identities: str) -> set[str]:
        encoder = EveryKind()
        for name, identity in identities.items():
            setattr(encoder, name, identity)
        shots, cache = dataset_shots(encoder, plan_windows(scan_folder(clips), GEOMETRY, SPEC)), Cache(clips.parent / "out/cache")
        kinds = {"text": TEXT_KINDS, "image": IMAGE_KINDS, "vae": VAE_KINDS}
        return {name for name, kind in kinds.items() if not all_shots_cached(shots, kind, encoder, cache)}

    assert lacking() == {"text", "image", "vae"}
    encode(clips)
    assert lacking() == set()
    assert lacking(identity_vae="another") == {"vae"}
    assert lacking(identity_text="another") == {"text"}
    assert lacking(identity_image="another") == {"text", "image"}, "captions are read together with the image"
    assert needed_texts(EveryKind(), ("a prompt",)) == ()


def test_a_clip_that_breaks_on_the_way_is_rejected_once_and_the_rest_goes_on(clips: Path):
    class NoNumbers(EveryKind):
        def encode_image(self, image_HWC: torch.Tensor) -> torch.Tensor:
            rows = super().encode_image(image_HWC)
            return rows * float("nan") if abs(float(image_HWC.mean()) - grey(1)) < 0.01 else rows

    report = encode(clips, NoNumbers())
    assert [(item.name, item.problem.value) for item in report.rejected] == [("1.mp4", "its image embeds are not finite")]
    assert report.encoded is not None
    assert [item.source for item in report.encoded.items] == ["0.mp4", "2.mp4"]
    assert report.latents_new == 2, "no clip that is out already goes through the VAE"


def test_a_still_is_its_own_first_frame(clips: Path):
    shutil.rmtree(clips)
    clips.mkdir()
    write_caption(write_image(clips / "still.png", numbered(20)), "still")
    encoder = EveryKind()
    (item,) = encode(clips, encoder).encoded.items  # type: ignore[union-attr]
    assert item.extras[FIRST_FRAME] == item.latents
    assert len(encoder.videos) == 2, "the still, and it as a grey clip of one frame"


def asked(folder: Path, **changes: Any) -> FirstFrames:
    cv2.imwrite(str(folder / "start.png"), np.full((40, 80, 3), 51, np.uint8))
    values = {"prompts": ("one", "two", "three"), "images": (folder / "start.png", None, folder / "start.png"), "negative": "ugly"}
    return FirstFrames(**(values | {"num_frames": 5, "height": 32, "width": 48} | changes))


def test_images_of_previews_are_encoded_at_the_previews_size(clips: Path, tmp_path: Path):
    report = encode(clips, first_frames=asked(tmp_path))
    assert report.encoded is not None
    (image,) = opened(clips).images
    assert (image.name, image.num_frames, image.height, image.width) == ("start.png", 5, 32, 48)
    assert set(image.texts) == {"one", "three", "ugly"}
    shapes = {kind: tuple(report.encoded.extra(kind, key).shape) for kind, key in image.extras.items()}
    assert shapes == {FIRST_FRAME: (16, 1, 4, 6), FIRST_FRAME_CLIP: (16, 2, 4, 6), IMAGE_EMBEDS: (5, 7)}
    assert opened(clips).image(str(tmp_path / "elsewhere/start.png"), 5, 32, 48) == image, "known by its name"
    assert opened(clips).image("start.png", 9, 32, 48) is None


def test_images_alone_for_a_model_that_needs_no_more_than_the_first_frame(tmp_path: Path):
    encoder, cache = AverageEncoder(), Cache(tmp_path)
    encoded = encode_prompts(("one", "two", "three"), encoder, cache, first_frames=asked(tmp_path))
    assert encoded is not None
    texts, (image,) = encoded
    assert set(texts) == {"", "ugly", "one", "two", "three"}
    assert set(image.extras) == {FIRST_FRAME}
    assert image.texts == {}
    again = AverageEncoder()
    assert encode_prompts(("one", "two", "three"), again, cache, first_frames=asked(tmp_path)) == encoded
    assert (again.videos, again.prompts) == ([], [])


def test_every_image_that_cannot_be_read_is_told_before_anything_is_encoded(clips: Path, tmp_path: Path):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    wrong = asked(tmp_path, images=(tmp_path / "gone.png", None, tmp_path / "broken.png"))
    encoder = EveryKind()
    with pytest.raises(DatasetError) as caught:
        encode(clips, encoder, first_frames=wrong)
    assert [problem.value.split("/")[-1].split(":")[0] for problem in caught.value.problems] == ["gone.png", "broken.png"]
    assert encoder.order == []
    assert preview_shots(encoder, None) == []


def test_data_without_first_frames_keep_their_identity_and_are_read(tmp_path: Path):
    old = make(tmp_path)
    assert old.identity == "42a192d9f61a0edac241168222155529bcd9859423459ea7dc46aef247aa7184", "as before there were first frames"
    old.save()
    assert not {"extras", "text_without_caption", "images"} & set(json.loads((tmp_path / "encoded.json").read_text())["items"][0])
    image = EncodedImage("a.png", 5, 64, 96, {FIRST_FRAME: "e" * 64})
    new = old.with_prompts({}, [image])
    assert new.identity != old.identity
    new.save()
    assert Encoded.open(tmp_path) == new
    assert Encoded.open(tmp_path, old.identity) == old


@pytest.mark.parametrize("extras", [["a"], {"first_frame": 3}])
def test_damaged_extras_are_found_on_opening(tmp_path: Path, extras: Any):
    make(tmp_path, (replace(ITEM, extras={FIRST_FRAME: "e" * 64}),)).save()
    values = json.loads((tmp_path / "encoded.json").read_text())
    values["items"][0]["extras"] = extras
    (tmp_path / "encoded.json").write_text(json.dumps(values))
    with pytest.raises(DatasetError, match="damaged"):
        Encoded.open(tmp_path)


# From a diffusers folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModel

    folder = tmp_path_factory.mktemp("everything")
    write_models(folder)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    CLIPTextModel(CLIPTextConfig(vocab_size=8, max_position_embeddings=32, eos_token_id=1, **sizes)).save_pretrained(
        folder / "text_encoder_2"
    )
    CLIPVisionModel(CLIPVisionConfig(image_size=28, patch_size=14, **sizes)).save_pretrained(folder / "image_encoder")
    shutil.copytree(folder / "tokenizer", folder / "tokenizer_2")
    (folder / "image_processor").mkdir()
    processor = {"image_processor_type": "CLIPImageProcessor", "size": {"height": 28, "width": 28}, "do_center_crop": False}
    (folder / "image_processor/preprocessor_config.json").write_text(json.dumps(processor))
    return folder


class Watched(FolderEncoder):
    """Tells which parts it has loaded; there is only one kind of them at a time."""

    def __init__(self, base: Path) -> None:
        family = FirstFrameWan()
        super().__init__(family, ALWAYS, EncoderFiles.find(base, needed_parts(family, ALWAYS)), "cpu")
        self.loads: list[str] = []

    def _load(self, name: str) -> Any:
        self.loads.append(name)
        kinds = [{"vae"}, {"image_encoder"}, {"text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"}]
        both = {name, *self._loaded[1]} - {"image_processor"}
        assert any(both <= kind for kind in kinds), "two kinds of models in memory"
        return super()._load(name)


def test_a_diffusers_folder_gives_every_kind_and_loads_only_what_lacks(clips: Path, models: Path):
    base, geometry = clips.parent / "base", Geometry(48, 32, 5)
    shutil.copytree(models, base)

    def run() -> tuple[tuple[int, int, int], list[str]]:
        encoder = Watched(base)
        report = encode_dataset(scan_folder(clips), geometry, encoder, clips.parent / "out")
        return (report.latents_new, report.texts_new, report.first_frames_new), encoder.loads

    counts, loads = run()
    assert counts == (CLIPS, 2 * CLIPS, 3 * CLIPS)
    text = ["tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2", "image_processor"]
    assert loads == [*text, "image_encoder", "vae"], "each once"
    assert run() == ((0, 0, 0), [])
    encoded = opened(clips)
    item = encoded.items[0]
    assert encoded.extra(IMAGE_EMBEDS, item.extras[IMAGE_EMBEDS]).shape == (5, 16)
    assert encoded.text(item.text).pooled_D.shape == (19,)  # type: ignore[union-attr]
    processor = base / "image_processor/preprocessor_config.json"
    processor.write_text(json.dumps(json.loads(processor.read_text()) | {"image_mean": [0.1, 0.2, 0.3]}))
    counts, loads = run()
    assert counts == (0, 2 * CLIPS, CLIPS), "how an image is prepared counts for what looks at it"
    assert "vae" not in loads


@pytest.mark.parametrize("remove", [("image_encoder",), ("text_encoder_2", "image_processor")])
def test_only_the_parts_that_a_variant_needs_are_looked_for(models: Path, tmp_path: Path, remove: tuple[str, ...]):
    family = FirstFrameWan()
    shutil.copytree(models, tmp_path / "base")
    for name in remove:
        shutil.rmtree(tmp_path / "base" / name)
    EncoderFiles.find(tmp_path / "base", needed_parts(family, NEVER))
    with pytest.raises(CheckpointError) as caught:
        EncoderFiles.find(tmp_path / "base", needed_parts(family, ALWAYS))
    assert [problem.rule for problem in caught.value.problems] == [f"it should be the {name}" for name in remove]
    given = {name: models / name for name in remove}
    found = EncoderFiles.find(tmp_path / "base", needed_parts(family, ALWAYS), **given)
    assert all(getattr(found, name) == path for name, path in given.items())


def test_a_folder_of_another_library_is_told(tmp_path: Path):
    from trainers.folder_encoder import _model_class

    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="is no model of transformers"):
        _model_class(tmp_path)
