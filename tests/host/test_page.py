"""ComfyUI's page with the pack in it, in a real browser, on the front end of this ComfyUI and on the newest one."""

from __future__ import annotations


def test_the_page_knows_the_nodes(page):
    names = page.evaluate("Object.keys(LiteGraph.registered_node_types).filter(name => name.startsWith('VideoTrainer_'))")
    assert "VideoTrainer_BaseModel" in names
    assert page.errors == []


def test_the_newest_page_knows_them_too(pages, newest_server):
    with pages.open(newest_server) as page:
        names = page.evaluate("Object.keys(LiteGraph.registered_node_types).filter(name => name.startsWith('VideoTrainer_'))")
        version = page.evaluate("window.__COMFYUI_FRONTEND_VERSION__")
        assert "VideoTrainer_BaseModel" in names
        assert tuple(int(part) for part in version.split(".")) >= (1, 58)
        assert page.errors == []
