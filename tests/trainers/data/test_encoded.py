from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from trainers.data.cache import Cache
from trainers.data.encoded import Encoded, EncodedItem
from trainers.errors import DatasetError
from trainers.family import TextRecord

ITEM = EncodedItem("a" * 64, "b" * 64, "a caption, ü", "sub/clip.mp4", 0.5, 5, 64, 96, 16.0, 2, False)


def make(folder: Path, items: tuple[EncodedItem, ...] = (ITEM,), cache: Path | None = None) -> Encoded:
    return Encoded(folder, "wan", "wan2.1-t2v-1.3b", items, {"": "c" * 64, "bad": "d" * 64}, Cache(cache or folder / "cache"))


def test_what_is_saved_is_opened(tmp_path: Path):
    encoded = make(tmp_path / "set", (ITEM, replace(ITEM, held_out=True, source="odd\n\udcff.mp4")))
    encoded.save()
    opened = Encoded.open(tmp_path / "set")
    assert opened == encoded
    assert opened.identity == encoded.identity
    assert opened.cache.folder == tmp_path / "set/cache"


def test_a_save_that_fails_leaves_the_old_content_and_nothing_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    make(tmp_path).save()

    def fail(*_: object) -> None:
        raise OSError("no")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="no"):
        make(tmp_path, ()).save()
    assert Encoded.open(tmp_path).items == (ITEM,)
    names = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*"))
    assert names == ["encoded.json", "versions", f"versions/{make(tmp_path).identity}.json"]


def test_what_was_replaced_is_opened_by_its_identity(tmp_path: Path):
    first, second = make(tmp_path), make(tmp_path, (ITEM, ITEM))
    first.save()
    second.save()
    assert Encoded.open(tmp_path) == second
    assert Encoded.open(tmp_path, first.identity) == first


def test_a_folder_may_move_and_a_shared_cache_stays_where_it_is(tmp_path: Path):
    make(tmp_path / "old").save()
    (tmp_path / "old").rename(tmp_path / "new")
    assert Encoded.open(tmp_path / "new").cache.folder == tmp_path / "new/cache"
    make(tmp_path / "other", cache=tmp_path / "shared").save()
    assert Encoded.open(tmp_path / "other").cache.folder == tmp_path / "shared"


def test_identity_is_of_the_content_not_the_place(tmp_path: Path):
    assert make(tmp_path / "a").identity == make(tmp_path / "b", cache=tmp_path).identity
    assert make(tmp_path / "a").identity != make(tmp_path / "a", (replace(ITEM, repeats=3),)).identity


def test_tensors_are_read_by_key(tmp_path: Path):
    encoded = make(tmp_path)
    assert "4 of 4" in str(encoded.problems()[0])
    latents, embeds = torch.randn(16, 2, 8, 12), torch.randn(3, 8)
    encoded.cache.write_latents(ITEM.latents, latents)
    for key in (ITEM.text, *encoded.prompts.values()):
        encoded.cache.write_text(key, TextRecord(embeds))
    assert encoded.problems() == []
    assert torch.equal(encoded.latents_CFHW(ITEM), latents)
    assert torch.equal(encoded.text(ITEM.text).embeds_LD, embeds)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist.*Run `encode` first"),
        ("{", "cannot be read"),
        ("[]", "schema_version None"),
        ('{"schema_version": 0}', "schema_version 0"),
        ('{"schema_version": 1}', "damaged.*items"),
    ],
)
def test_a_folder_that_cannot_be_opened_says_why(tmp_path: Path, content: str | None, message: str):
    if content is not None:
        (tmp_path / "encoded.json").write_text(content)
    with pytest.raises(DatasetError, match=message):
        Encoded.open(tmp_path)


@pytest.mark.parametrize(("field", "value"), [("num_frames", "5"), ("latents", 3), ("held_out", 0), ("fps", None)])
def test_a_field_of_the_wrong_kind_is_found_on_opening(tmp_path: Path, field: str, value: object):
    make(tmp_path).save()
    values = json.loads((tmp_path / "encoded.json").read_text())
    values["items"][0][field] = value
    (tmp_path / "encoded.json").write_text(json.dumps(values))
    with pytest.raises(DatasetError, match=f"{field} is"):
        Encoded.open(tmp_path)


def test_ten_thousand_items_open_within_a_second(tmp_path: Path):
    make(tmp_path, tuple(replace(ITEM, source=f"{index}.mp4") for index in range(10_000))).save()
    start = time.process_time()
    assert len(Encoded.open(tmp_path).items) == 10_000
    assert time.process_time() - start < 1.0
