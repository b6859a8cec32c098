"""A running ComfyUI with the pack in it, and the graphs that are sent to it."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from installation import PACK, ComfyUI

PACK_FOLDER = "video-trainer-test"
"""The pack's folder in custom_nodes: with hyphens, as the registry makes it."""

Graph = Mapping[str, Mapping[str, Any]]
"""API form: {node id: {"class_type", "inputs"}}; an input is a value or a link [node id, output index]."""

_START_SECONDS = 120.0
_POLL_SECONDS = 0.1


class GraphError(AssertionError):
    """ComfyUI refused a graph or could not finish it: `errors` as it tells them."""

    def __init__(self, errors: Any) -> None:
        super().__init__(json.dumps(errors, indent=1, ensure_ascii=False).replace("\\n", "\n"))
        self.errors = errors


class Server:
    """ComfyUI on the CPU, with folders of its own below `base_directory`; the same ones again after `restart()`.

    `flags` are more options of its command line, such as `--front-end-root`.
    """

    def __init__(self, comfyui: ComfyUI, base_directory: Path, *flags: str, packs: Mapping[str, Path] | None = None) -> None:
        self.comfyui = comfyui
        self.base_directory = base_directory
        self.log_file = base_directory / "comfyui.log"
        self._flags = flags
        self._process: subprocess.Popen[bytes] | None = None
        for name in ("custom_nodes", "input", "output", "temp", "user", "models"):
            (base_directory / name).mkdir(parents=True, exist_ok=True)
        for name, folder in ({PACK_FOLDER: PACK} if packs is None else packs).items():
            link_folder(base_directory / "custom_nodes" / name, folder)

    # Its life

    def start(self) -> None:
        """Start it and wait until it answers. The log of earlier starts is kept."""
        self.port = _free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        options = ["--cpu", "--port", str(self.port), "--base-directory", str(self.base_directory)]
        options += ["--database-url", "sqlite:///:memory:", "--disable-api-nodes", "--disable-auto-launch", *self._flags]
        with self.log_file.open("ab") as log:
            self._process = subprocess.Popen(
                [self.comfyui.python, "-u", self.comfyui.root / "main.py", *options],
                cwd=self.comfyui.root,
                env=self.comfyui.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self._wait_until_it_answers()

    def kill(self) -> None:
        """End it without asking, as a power cut would; what it started lives on."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def restart(self) -> None:
        self.kill()
        self.start()

    @property
    def log(self) -> str:
        """What it has printed since its first start."""
        return self.log_file.read_text("utf-8", "replace")

    # Requests

    def get(self, path: str) -> Any:
        """JSON of a GET; raises urllib.error.HTTPError for an error status."""
        return self._request(path)

    def post(self, path: str, body: Any = None) -> Any:
        """JSON of a POST with a JSON body; None when the answer is empty. Raises urllib.error.HTTPError for an error status."""
        return self._request(path, {} if body is None else body)

    def object_info(self, node: str | None = None) -> dict[str, Any]:
        """What is known of each node, or of one."""
        return self.get("/object_info") if node is None else self.get(f"/object_info/{node}")[node]

    def choices(self, node: str, name: str) -> list[str]:
        """What a combo of a node offers now."""
        inputs = self.object_info(node)["input"]
        kind, *options = (inputs.get("required", {}) | inputs.get("optional", {}))[name]
        return kind if isinstance(kind, list) else options[0]["options"]  # nodes of ComfyUI's first and third interface

    def queue(self, graph: Graph, **more: Any) -> str:
        """Send a graph and return its prompt id at once. Raises GraphError when it is refused."""
        try:
            return self.post("/prompt", {"prompt": graph, **more})["prompt_id"]
        except urllib.error.HTTPError as error:
            raise GraphError(json.loads(error.read())) from None

    def wait(self, prompt_id: str, timeout_seconds: float = 300) -> dict[str, Any]:
        """The history entry of a graph once it has ended. Raises GraphError when it failed or was interrupted."""
        give_up = time.monotonic() + timeout_seconds
        while (entry := self.get(f"/history/{prompt_id}").get(prompt_id)) is None:
            assert time.monotonic() < give_up, f"not done in {timeout_seconds:.0f} s; the log ends with\n{self.log[-3000:]}"
            time.sleep(_POLL_SECONDS)
        if entry["status"]["status_str"] != "success":
            raise GraphError([message for message in entry["status"]["messages"] if message[0] != "execution_start"])
        return entry

    def prompt(self, graph: Graph, timeout_seconds: float = 300) -> dict[str, Any]:
        """Send a graph and wait for its history entry. Raises GraphError."""
        return self.wait(self.queue(graph), timeout_seconds)

    def interrupt(self) -> None:
        """Cancel the graph that runs now."""
        self.post("/interrupt")

    def _request(self, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as response:
            content = response.read()
        return json.loads(content) if content else None

    def _wait_until_it_answers(self) -> None:
        assert self._process is not None
        give_up = time.monotonic() + _START_SECONDS
        while True:
            with suppress(OSError):
                self.get("/system_stats")
                return
            assert self._process.poll() is None, f"ComfyUI ended with {self._process.poll()}:\n{self.log[-5000:]}"
            assert time.monotonic() < give_up, f"ComfyUI did not answer within {_START_SECONDS:.0f} s:\n{self.log[-5000:]}"
            time.sleep(_POLL_SECONDS)


def link_folder(link: Path, folder: Path) -> None:
    """`link` becomes another name of `folder`; on Windows a junction, which needs no rights."""
    if sys.platform == "win32":
        import _winapi

        _winapi.CreateJunction(str(folder), str(link))
    else:
        link.symlink_to(folder, target_is_directory=True)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
