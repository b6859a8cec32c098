"""The tab with all runs, in a real browser, on the front end that this ComfyUI pins and on the newest one."""

from __future__ import annotations

import json
import re
import shutil
import time

import pytest
from some_runs import add_steps, ended_run, live_run, new_run, runs_folder, write_lora

from tests.trainers.tiny import tiny_job
from trainers.launch import launch
from trainers.run import Run

TAB = '[aria-label="Video Trainer"]'
EVENT = "video_trainer.runs"


@pytest.fixture(scope="module", params=[pytest.param("server", marks=pytest.mark.slow), "newest_server"])
def page_of(request, pages):
    """(page, server) for each front end once."""
    server = request.getfixturevalue(request.param)
    runs_folder(server).mkdir(parents=True, exist_ok=True)
    with pages.open(server) as page:
        page.complaints = []
        page.on("console", lambda message: page.complaints.append(message.text))
        yield page, server


@pytest.fixture
def any_server(page_of):
    """The server, with no runs left from other tests."""
    _, server = page_of
    for folder in runs_folder(server).iterdir():
        shutil.rmtree(folder) if folder.is_dir() else folder.unlink()
    return server


@pytest.fixture
def tab(page_of, any_server):
    """The page with the tab open. What its scripts complained of is an error at the end."""
    page, _ = page_of
    if not page.locator(".vt-panel").count():
        page.locator(TAB).first.click()
    page.locator(".vt-welcome").wait_for()
    yield page
    page.keyboard.press("Escape")
    assert page.errors == []
    assert [text for text in page.complaints if "video_trainer" in text or "Video Trainer" in text] == []


def _card(page, name):
    return page.locator(".vt-run", has=page.get_by_text(name, exact=True))


def _buttons(page, name):
    return [text for text in _card(page, name).get_by_role("button").all_inner_texts() if text]


def _shows(page, name, text, timeout_seconds=10):
    _card(page, name).get_by_text(text).first.wait_for(timeout=timeout_seconds * 1000)


def _until(condition, timeout_seconds=20.0):
    give_up = time.monotonic() + timeout_seconds
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.05)


def test_without_runs_it_says_what_to_do_first_and_opens_the_graph(tab):
    assert "Press Run" in tab.locator(".vt-welcome").inner_text()
    graphs = {
        "wan21_train": "Wan 2.1",
        "hunyuan_train_i2v": "HunyuanVideo image to video",
        "tiny_wan_train_and_sample": "Tiny Wan, to try it",
    }
    for name, label in graphs.items():
        tab.get_by_role("button", name=label, exact=True).click()
        tab.get_by_text(name, exact=True).first.wait_for()
        assert tab.evaluate("window.app.graph.nodes.filter(node => node.type === 'VideoTrainer_TrainLoRA').length") == 1
        tab.keyboard.press("Escape")  # the page offers to download models


def test_every_state_has_its_word_its_buttons_and_its_reason(tab, any_server):
    ended_run(any_server, "is-done", "done", steps=100)
    ended_run(any_server, "is-stopped", "stopped")
    ended_run(any_server, "is-paused", "paused")
    killed = ended_run(any_server, "was-killed", None)
    killed.log_file.write_text("Killed")
    failed = ended_run(any_server, "has-failed", "failed", message="num_frames is 80; Wan needs 4n+1. Use 77 or 81.")
    failed.log_file.write_text("Traceback\n<b>not markup</b>")
    with live_run(any_server, "trains", steps=40), live_run(any_server, "loads"), live_run(any_server, "waits") as waits:
        waits.event("queued", message="waiting for cuda:0, which another run uses")
        told = {
            "is-done": ("done", []),
            "is-stopped": ("stopped", ["Resume"]),
            "is-paused": ("paused", ["Resume"]),
            "was-killed": ("interrupted", ["Resume"]),
            "has-failed": ("failed", ["Resume"]),
            "trains": ("training", ["Pause", "Stop"]),
            "loads": ("starting", ["Pause", "Stop"]),
            "waits": ("waiting", ["Pause", "Stop"]),
        }
        for name, (word, buttons) in told.items():
            _card(tab, name).locator(".vt-state", has_text=re.compile(f"^{word}$")).wait_for()
            assert _buttons(tab, name) == buttons, name
        names = tab.locator(".vt-name").all_inner_texts()
        assert names[:3] == ["loads", "trains", "waits"], "what is going on comes first, and what waits after it"
        assert tab.locator(".vt-count").inner_text() == "2 running, 1 waiting"
        _shows(tab, "trains", "40 of 100 steps (40 %)")
        _shows(tab, "trains", "about 2 min left")
        _shows(tab, "waits", "waiting for cuda:0, which another run uses")
        _shows(tab, "has-failed", "num_frames is 80; Wan needs 4n+1. Use 77 or 81.")
        _card(tab, "has-failed").get_by_text("End of the log").click()
        assert _card(tab, "has-failed").locator("pre").inner_text() == "Traceback\n<b>not markup</b>"
        tab.locator(TAB).first.get_by_text("3", exact=True).wait_for()  # the number on the tab's icon
        assert _card(tab, "trains").locator("polyline").get_attribute("points"), "the curve of the loss"
    _card(tab, "trains").locator(".vt-state", has_text="interrupted").wait_for()


def test_a_live_run_moves_at_most_twice_a_second_and_rest_is_silent(tab, any_server):
    heard = []
    tab.on("websocket", lambda socket: socket.on("framereceived", lambda data: heard.append((time.monotonic(), str(data)))))
    tab.evaluate("window.app.api.socket.close()")  # the page opens another, which this test hears
    with live_run(any_server, "moves", steps=1) as run:
        _shows(tab, "moves", "1 of 100 steps (1 %)")
        tab.wait_for_timeout(1000)
        started = time.monotonic()
        for step in range(2, 51):
            add_steps(run, step, step)
            tab.wait_for_timeout(50)
        _shows(tab, "moves", "50 of 100 steps (50 %)", timeout_seconds=2)
        took = time.monotonic() - started
        news = [when for when, data in heard if EVENT in data and when > started]
        assert 2 <= len(news) <= 2 * took + 1
        heard.clear()
        tab.wait_for_timeout(2500)
        assert [data for _, data in heard if EVENT in data] == []


def test_a_run_that_is_removed_leaves_the_list(tab, any_server):
    run = ended_run(any_server, "gone", "done")
    _card(tab, "gone").wait_for()
    shutil.rmtree(run.folder)
    _card(tab, "gone").wait_for(state="detached")
    tab.locator(".vt-welcome").wait_for()


def test_switching_tabs_neither_doubles_nor_loses_the_list(tab, any_server):
    with live_run(any_server, "seen-again", steps=1) as run:
        _card(tab, "seen-again").wait_for()
        for _ in range(3):
            tab.locator(TAB).first.click()
            tab.locator(".vt-panel").wait_for(state="detached")
            tab.locator(TAB).first.click()
            _card(tab, "seen-again").wait_for()
        assert tab.locator(".vt-panel").count() == 1
        assert _card(tab, "seen-again").count() == 1
        add_steps(run, 2, 7)
        _shows(tab, "seen-again", "7 of 100 steps (7 %)")


def test_after_a_lost_connection_everything_is_asked_again(tab, any_server):
    with tab.expect_response("**/video_trainer/runs", timeout=20_000) as answer:
        tab.evaluate("window.app.api.socket.close()")
    assert answer.value.ok


def test_stop_asks_first_and_pause_can_be_taken_back(tab, any_server):
    with live_run(any_server, "steered", steps=3) as run:
        card = _card(tab, "steered")
        card.get_by_role("button", name="Stop").click()
        assert "you can resume it later" in card.locator(".vt-question").inner_text()
        add_steps(run, 4, 4)  # news must not take the question away
        _shows(tab, "steered", "4 of 100 steps")
        card.get_by_role("button", name="Keep training").click()
        assert run.requested() is None
        card.get_by_role("button", name="Pause").click()
        _shows(tab, "steered", "Pauses after the current step and frees the card.")
        assert run.requested() == "pause"
        card.get_by_role("button", name="Go on").click()
        _shows(tab, "steered", "training")
        assert run.requested() is None
        card.get_by_role("button", name="Stop").click()
        card.get_by_role("button", name="Stop training").click()
        _shows(tab, "steered", "stopping")
        assert run.requested() == "stop"
        assert _buttons(tab, "steered") == []


def test_a_real_training_is_paused_resumed_and_stopped_by_the_page(tab, any_server, tmp_path):
    """Resumed by ComfyUI's own Python."""
    folders = {"runs_folder": str(runs_folder(any_server)), "loras_folder": str(any_server.base_directory / "output" / "loras")}
    run = Run.create(tiny_job(tmp_path, name="real", steps=100_000, checkpoints={"every_steps": 50_000}, **folders))
    launch(run)
    try:
        card = _card(tab, "real")
        _shows(tab, "real", "training", timeout_seconds=60)
        card.get_by_role("button", name="Pause").click()
        _shows(tab, "real", "paused", timeout_seconds=60)
        _until(lambda: not run.live)
        paused_at = run.status().step
        assert run.latest_checkpoint() == paused_at
        card.get_by_role("button", name="Resume").click()
        _shows(tab, "real", "training", timeout_seconds=60)
        _until(lambda: run.status().step > paused_at, timeout_seconds=60)
        card.get_by_role("button", name="Stop").click()
        card.get_by_role("button", name="Stop training").click()
        _shows(tab, "real", "stopped", timeout_seconds=30)
        _until(lambda: not run.live)
        assert run.latest_checkpoint() == run.status().step
        assert _buttons(tab, "real") == ["Resume"]
    finally:
        run.request("stop")


def test_what_cannot_be_done_is_told_in_a_sentence(tab, any_server):
    run = new_run(any_server, "unstartable")
    shutil.rmtree(run.folder / "control")
    (run.folder / "control").write_text("a file where a folder must be")
    _card(tab, "unstartable").get_by_role("button", name="Start").click()
    tab.get_by_text("The run's folder cannot be used").first.wait_for()


def test_a_new_lora_is_in_the_lists_and_the_graph_is_left_alone(tab, any_server):
    graph = {
        "last_node_id": 1,
        "last_link_id": 0,
        "nodes": [
            {"id": 1, "type": "LoraLoaderModelOnly", "pos": [500, 100], "size": [300, 100], "widgets_values": ["no such.safetensors", 0.5]}
        ],
        "links": [],
        "version": 0.4,
    }
    tab.evaluate("graph => window.app.loadGraphData(graph)", graph)
    before = tab.evaluate("JSON.stringify(window.app.graph.serialize())")
    options = "window.app.graph.nodes[0].widgets[0].options.values"
    with live_run(any_server, "writes", steps=5) as run:
        _card(tab, "writes").wait_for()
        name = write_lora(run, 5)
        _shows(tab, "writes", "LoRA: writes-000005")
        tab.wait_for_function(f"name => {options}.includes(name)", arg=name, timeout=20_000)
        assert json.loads(tab.evaluate("JSON.stringify(window.app.graph.serialize())")) == json.loads(before)
        tab.wait_for_timeout(300)
        assert tab.get_by_text("Node definitions updated").count() == tab.get_by_text("Update requested").count() == 0
        run.event("done")
        tab.get_by_text("writes is trained").first.wait_for()


def test_how_a_run_uses_memory_stands_below_its_name_until_it_is_done(tab, any_server):
    with live_run(any_server, "remembers", steps=5) as run:
        _card(tab, "remembers").wait_for()
        assert _card(tab, "remembers").locator(".vt-memory").is_hidden()
        run.event("memory", message="9.1 of 11.0 GiB, 12 of 40 blocks are streamed")
        _shows(tab, "remembers", "Memory: 9.1 of 11.0 GiB, 12 of 40 blocks are streamed")
        said = f"memory ran out in step 5: {'more is streamed from here on, ' * 9}\nand <b>the step</b> was done again"
        run.event("of a later version", message="?")
        run.event("memory", message=said)
        _shows(tab, "remembers", "memory ran out in step 5")
        line = _card(tab, "remembers").locator(".vt-memory")
        assert line.bounding_box()["height"] < 45, "two lines at the most"
        assert line.get_attribute("title") == said
        assert _card(tab, "remembers").locator(".vt-state").inner_text() == "training"
        run.event("done")
        line.wait_for(state="hidden")


def test_what_the_newest_previews_measure_is_told(tab, any_server):
    with live_run(any_server, "measures", steps=5) as run:
        _card(tab, "measures").wait_for()
        before = {"step-000000-0.mp4": {"flicker": 0.5, "consistency": 0.1, "sharpness": 9.0}}
        run.event("sample", step=0, files=[*before], measures=before)
        _shows(tab, "measures", "Previews of step 0: flicker 50 %, consistency 0.1, sharpness 9")
        files = {
            "step-000005-0.mp4": {"flicker": 0.004, "consistency": 0.96, "sharpness": 210.4, "adherence": 0.31},
            "step-000005-1.mp4": {"flicker": 0.002, "consistency": 0.98, "sharpness": 220.4},
        }
        run.event("sample", step=5, files=[*files], measures=files)
        told = "Previews of step 5: flicker 0.3 %, consistency 0.97, sharpness 215, fits the prompt 0.31"
        _shows(tab, "measures", told)
        assert "1 is perfect" in _card(tab, "measures").get_by_text(told).get_attribute("title")


def test_a_failure_is_told_wherever_the_user_is(tab, any_server):
    with live_run(any_server, "will-fail", steps=5) as run:
        _card(tab, "will-fail").wait_for()
        tab.locator(TAB).first.click()
        run.event("failed", message="loss is nan in step 5; it must be finite. Lower the learning rate.")
    tab.get_by_text("will-fail failed").first.wait_for()
    tab.get_by_text("loss is nan in step 5").first.wait_for()
