"""A real ComfyUI, its server with the pack in it, and its page in a real browser. Without a ComfyUI every test here is skipped."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from browser import Pages, open_browser
from comfy_server import Server
from installation import ComfyUI, NoComfyUI, find_comfyui

from trainers.run import list_runs

_HERE = Path(__file__).parent


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without a ComfyUI one line says what is missing: the first test is skipped, and stands for all."""
    ours = [item for item in items if item.path.is_relative_to(_HERE)]
    try:
        find_comfyui()
    except NoComfyUI as error:
        for item in ours[:1]:
            item.add_marker(pytest.mark.skip(reason=f"{len(ours)} tests need a ComfyUI: {error}"))
        others = ours[1:]
        items[:] = [item for item in items if item not in others]
        config.hook.pytest_deselected(items=others)


@pytest.fixture(scope="session")
def comfyui() -> Iterator[ComfyUI]:
    found = find_comfyui()
    yield found
    found.end()


@pytest.fixture(scope="session")
def own_temporary_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Workers of these tests wait for no run outside them: there is one lock per device and temporary folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tempfile.tempdir", str(tmp_path_factory.mktemp("temporary")))
        yield


@pytest.fixture(scope="session")
def make_server(comfyui: ComfyUI, own_temporary_folder: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Server]]:
    """Starts one more ComfyUI, with a base directory of its own: `make_server(*flags, packs={folder name: folder})`."""
    with ExitStack() as started:

        def make(*flags: str, packs: dict[str, Path] | None = None) -> Server:
            server = Server(comfyui, tmp_path_factory.mktemp("comfyui"), *flags, packs=packs)
            started.callback(_end, server)
            server.start()
            return server

        yield make


@pytest.fixture(scope="session")
def server(make_server: Callable[..., Server]) -> Server:
    """The running ComfyUI that these tests share."""
    return make_server()


@pytest.fixture(scope="session")
def newest_server(make_server: Callable[..., Server]) -> Server:
    """The same ComfyUI with the front end that requirements-test.txt names: the newest, not the one that it pins."""
    front_end = importlib.util.find_spec("comfyui_frontend_package")
    if front_end is None or front_end.origin is None:
        pytest.skip("tests of the newest page need the package comfyui_frontend_package")
    return make_server("--front-end-root", str(Path(front_end.origin).with_name("static")))


@pytest.fixture(scope="session")
def pages(comfyui: ComfyUI) -> Iterator[Pages]:
    """Opens pages in a headless Chromium: `pages.open(server)`."""
    with open_browser() as pages:
        yield pages


@pytest.fixture
def page(pages: Pages, server: Server) -> Iterator[Any]:
    """The page of the shared server, loaded, in a Playwright page of its own."""
    with pages.open(server) as page:
        yield page


def _end(server: Server) -> None:
    """End a server and the trainings that it started."""
    server.kill()
    runs = list_runs(server.base_directory / "user" / "__video_trainer" / "runs")
    for run in runs:
        if run.live:
            run.request("stop")
    give_up = time.monotonic() + 30
    while any(run.live for run in runs) and time.monotonic() < give_up:
        time.sleep(0.1)
