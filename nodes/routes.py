"""What the page asks about runs over HTTP, and what it is told over the websocket.

    GET  /video_trainer/runs                        {"runs": [record, ...]}
    GET  /video_trainer/runs/NAME                   a record with job, events and thinned metrics
    POST /video_trainer/runs/NAME/stop|pause|resume {"told": sentence, "run": record}
    event "video_trainer.runs"                      {"runs": [changed record, ...], "removed": [NAME, ...]}

A record is what `trainers.overview.describe` returns. An error is {"error": sentence}. Runs are given by name only, and a
name counts when it is one of the list: no request names a path.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from aiohttp import web

from ..trainers import steering
from ..trainers.errors import RunError, VideoTrainerError
from ..trainers.journal import Record
from ..trainers.overview import Overview, changes, describe, details
from ..trainers.run import Run
from . import host

EVENT = "video_trainer.runs"
_SECONDS_BETWEEN_LOOKS = 0.5
_SECONDS_AFTER_AN_ERROR = 30.0


@cache
def overview() -> Overview:
    """The one that routes and watcher share."""
    return Overview(host.runs_folder())


@cache
def register() -> None:
    """Adds the routes to ComfyUI's server and starts the watcher, once; without a server nothing happens."""
    routes = host.routes()
    if routes is None:
        return
    routes.get("/video_trainer/runs")(_list)
    routes.get("/video_trainer/runs/{name}")(_details)
    routes.post("/video_trainer/runs/{name}/{action}")(_steer)
    threading.Thread(target=_watch, name="video-trainer-watcher", daemon=True).start()


async def _list(request: web.Request) -> web.Response:
    runs = await _in_thread(lambda: overview().look(thorough=True))
    return web.json_response({"runs": list(runs.values())})


async def _details(request: web.Request) -> web.Response:
    return await _answer(request, details)


async def _steer(request: web.Request) -> web.Response:
    steer = _STEER.get(request.match_info["action"])
    if steer is None:
        return _error(404, f"A run can be asked to {', '.join(_STEER)}; not to {request.match_info['action']!r}.")
    if request.headers.get("Sec-Fetch-Site") == "cross-site":
        return _error(403, "Another site asked for this; only ComfyUI's own page may steer a run. Use the Video Trainer tab.")
    if request.content_type != "application/json":  # which a browser sends to another site only after asking that site
        return _error(415, "The request is no JSON; a run is steered by a POST with JSON, such as {}.")
    return await _answer(request, lambda run: {"told": steer(run), "run": describe(run)})


def _resume(run: Run) -> str:
    was_live = run.live
    told = steering.resume(run)
    if not was_live:  # the new worker needs the card, and takes longer to get ready than ComfyUI to leave it
        host.free_memory_when_idle()
    return told


_STEER: Mapping[str, Callable[[Run], str]] = {"stop": steering.stop, "pause": steering.pause, "resume": _resume}


async def _answer(request: web.Request, work: Callable[[Run], Record]) -> web.Response:
    """What `work` returns for the run that is asked about."""
    name = request.match_info["name"]
    try:
        answer = await _in_thread(lambda: _with_run(name, work))
    except RunError as error:
        return _error(409, str(error))
    except VideoTrainerError as error:
        return _error(422, str(error))
    except OSError as error:
        return _error(500, f"The run's folder cannot be used ({error.strerror or error}). Check the disk and its permissions.")
    if answer is None:
        return _error(404, f"There is no run {name!r}; its folder may have been removed. The Video Trainer tab lists the runs there are.")
    return web.json_response(answer)


def _with_run(name: str, work: Callable[[Run], Record]) -> Record | None:
    run = overview().find(name)
    return None if run is None else work(run)


async def _in_thread(work: Callable[[], Any]) -> Any:
    """Files are read, and workers waited for, while ComfyUI answers others."""
    return await asyncio.get_running_loop().run_in_executor(None, work)


def _error(status: int, sentence: str) -> web.Response:
    return web.json_response({"error": sentence}, status=status)


def _watch() -> None:
    """Tells open pages what changed, for ever. Runs of the command line, or from before a restart, are seen too."""
    told: dict[str, Record] = {}
    while True:
        time.sleep(_SECONDS_BETWEEN_LOOKS)
        try:
            runs = overview().look()
            if news := changes(told, runs):
                host.send(EVENT, news)
            told = runs
        except Exception:  # whatever happens to the disk, the panel lives on
            logging.exception("Video Trainer could not look at its runs; trying again in %.0f s", _SECONDS_AFTER_AN_ERROR)
            time.sleep(_SECONDS_AFTER_AN_ERROR)
