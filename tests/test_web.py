"""What ComfyUI's page loads: every script in `web/`, whether it is meant to start or to be imported."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

WEB = Path(__file__).parents[1] / "web"
SCRIPTS = sorted(WEB.rglob("*.js"))
ENTRY = "video_trainer.js"


@pytest.mark.parametrize("path", [path for path in SCRIPTS if path.name != ENTRY], ids=lambda path: path.name)
def test_a_script_that_is_imported_does_nothing_by_itself(path):
    declaration = re.compile(r"import |export |const |let |function |async function |[\s})\]]|//|/\*|$")
    assert [line for line in path.read_text("utf-8").splitlines() if not declaration.match(line)] == []


@pytest.mark.parametrize("path", [*SCRIPTS, *sorted(WEB.rglob("*.css"))], ids=lambda path: path.name)
def test_it_is_written_by_hand_and_asks_nobody_else(path):
    text = path.read_text("utf-8")
    assert max(map(len, text.splitlines())) <= 140
    assert text.count("\n") <= 400
    assert set(re.findall(r"https?://[^\"'\s]+", text)) <= {"http://www.w3.org/2000/svg"}
    assert "innerHTML" not in text


def test_the_empty_panel_offers_every_training_graph():
    offered = re.findall(r'^  \["(\w+)", "', (WEB / "panel.js").read_text("utf-8"), re.MULTILINE)
    assert sorted(offered) == sorted(path.stem for path in (WEB.parent / "workflows").glob("*_train*.json"))
