"""Every node has a help page, which says what its tooltips say."""

from __future__ import annotations

import urllib.request

from comfy_server import PACK_FOLDER
from make_node_help import DOCS, help_pages


def test_every_node_has_a_help_page_that_repeats_its_tooltips(server):
    pages = help_pages(server.object_info())
    assert {path.name for path in pages} == {path.name for path in DOCS.glob("*.md")}
    for path, text in pages.items():
        assert path.read_text("utf-8") == text, f"{path.name}: run tests/host/make_node_help.py"
        assert len(text.split("## Inputs")[0]) > 150, f"{path.name} says nothing but the tooltips"


def test_the_page_finds_them(server):
    path = f"/extensions/{PACK_FOLDER}/docs/VideoTrainer_TrainLoRA.md"
    with urllib.request.urlopen(server.url + path, timeout=10) as answer:
        assert answer.read().decode("utf-8").startswith("# Train LoRA")
