"""ComfyUI's page in a real browser."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from comfy_server import Server

BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "chrome", "msedge")
_LOAD_SECONDS = 60.0


class Pages:
    """Opens pages, each in a browser context of its own."""

    def __init__(self, browser: Any) -> None:
        self._browser = browser

    @contextmanager
    def open(self, server: Server, width: int = 1600, height: int = 900) -> Iterator[Any]:
        """The server's page once the graph can be used. `page.errors` lists what its scripts failed with."""
        server.post("/api/settings/Comfy.TutorialCompleted", True)  # or a dialog of the first start takes the clicks
        context = self._browser.new_context(viewport={"width": width, "height": height})
        page = context.new_page()
        page.errors = []
        page.on("pageerror", lambda error: page.errors.append(str(error)))
        page.goto(server.url)
        page.wait_for_function("window.app?.graph && window.app.extensionManager", timeout=_LOAD_SECONDS * 1000)
        page.wait_for_selector("canvas#graph-canvas", timeout=_LOAD_SECONDS * 1000)
        yield page
        context.close()


@contextmanager
def open_browser() -> Iterator[Pages]:
    """A headless Chromium of this machine; skips the test that asks where there is none."""
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        pytest.skip(f"tests of the page need a browser: none of {', '.join(BROWSERS)} is on PATH")
    playwright = pytest.importorskip("playwright.sync_api", reason="tests of the page need the package playwright")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield Pages(browser)
        browser.close()
