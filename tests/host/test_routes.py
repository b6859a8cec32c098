"""What the page asks about runs over HTTP, asked of a real server."""

from __future__ import annotations

import http.client
import json
from typing import Any

import pytest
from comfy_server import Server
from some_runs import ended_run, live_run, runs_folder


def _ask(server: Server, method: str, path: str, body: str | None = None, **headers: str) -> tuple[int, Any]:
    """(status, JSON); the path goes out as it is written here."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
    answer = connection.getresponse()
    text = answer.read()
    connection.close()
    return answer.status, json.loads(text) if text.startswith(b"{") else text


def _steer(server: Server, name: str, action: str) -> tuple[int, Any]:
    return _ask(server, "POST", f"/video_trainer/runs/{name}/{action}", "{}", Content_Type="application/json")


def test_the_list_holds_runs_that_anyone_started(server):
    ended_run(server, "listed-done", "done", steps=100)
    (runs_folder(server) / "no run").mkdir(exist_ok=True)
    status, answer = _ask(server, "GET", "/video_trainer/runs")
    found = {run["name"]: run for run in answer["runs"]}
    assert status == 200
    assert found["listed-done"]["state"] == "done"
    assert "no run" not in found


def test_details_of_a_run(server):
    ended_run(server, "detailed", "failed", message="num_frames is 80")
    status, answer = _ask(server, "GET", "/api/video_trainer/runs/detailed")
    assert status == 200
    assert (answer["message"], answer["job"]["steps"], len(answer["metrics"])) == ("num_frames is 80", 100, 40)


@pytest.mark.parametrize("name", ["nobody", "..", "..%2F..%2Fcomfyui.log", "%2Fetc", "no%20run", ".create.lock", "sub%5Crun"])
def test_only_names_of_runs_count(server, name):
    (runs_folder(server) / "no run").mkdir(parents=True, exist_ok=True)
    assert _ask(server, "GET", f"/video_trainer/runs/{name}")[0] == 404
    assert _steer(server, name, "stop")[0] == 404


def test_an_unknown_run_is_a_sentence(server):
    assert _steer(server, "nobody", "resume")[1] == {
        "error": "There is no run 'nobody'; its folder may have been removed. The Video Trainer tab lists the runs there are."
    }


def test_a_live_run_takes_requests_and_takes_them_back(server):
    with live_run(server, "steered", steps=3) as run:
        status, answer = _steer(server, "steered", "pause")
        assert (status, answer["run"]["request"], run.requested()) == (200, "pause", "pause")
        assert _steer(server, "steered", "resume")[0] == 200
        assert run.requested() is None
        assert _steer(server, "steered", "stop")[1]["run"]["request"] == "stop"
        status, answer = _steer(server, "steered", "resume")
        assert (status, run.requested()) == (409, "stop")
        assert "steered is stopping" in answer["error"]


@pytest.mark.parametrize("action", ["stop", "pause", "resume"])
def test_a_run_that_is_done_takes_none(server, action):
    run = ended_run(server, f"done-{action}", "done")
    status, answer = _steer(server, run.name, action)
    assert status == 409
    assert answer["error"].startswith(f"{run.name} is done; only a run with")
    assert not run.live


def test_other_actions_and_methods_are_refused(server):
    ended_run(server, "kept", "stopped")
    assert _steer(server, "kept", "delete")[0] == 404
    assert _ask(server, "GET", "/video_trainer/runs/kept/resume")[0] in (404, 405)
    assert _ask(server, "DELETE", "/video_trainer/runs/kept")[0] in (404, 405)


@pytest.mark.parametrize(
    ("headers", "refused"),
    [
        ({"Content_Type": "text/plain"}, 415),
        ({"Content_Type": "application/x-www-form-urlencoded"}, 415),
        ({}, 415),
        ({"Content_Type": "application/json", "Sec_Fetch_Site": "cross-site"}, 403),
        ({"Content_Type": "application/json", "Origin": "http://example.com"}, 403),
    ],
)
def test_other_sites_cannot_steer(server, headers, refused, request):
    with live_run(server, f"guarded-{request.node.callspec.id}") as run:
        assert _ask(server, "POST", f"/video_trainer/runs/{run.name}/stop", "{}", **headers)[0] == refused
        assert run.requested() is None
