"""What the nodes say in themselves: the text they return, and how their run goes. On both front ends, canvas and Nodes 2.0."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import cycle, pairwise
from typing import Any

import pytest
from some_runs import add_steps, ended_run, live_run

from tests.host.make_workflows import ROOT

TINY = "tiny Wan (built in)"
BASE, TRAIN, WAIT = 1, 3, 4
REPORT = ".vt-report"


_variants: defaultdict[str, Iterator[str]] = defaultdict(lambda: cycle(["read from the file", "wan2.1-t2v"]))


def _another_variant(server) -> str:
    """Another value than in the server's last graph: a node whose output is cached would say nothing."""
    return next(_variants[server.url])


def _graph(run: str | None = None, wait_mode: int = 0, variant: str = "read from the file") -> dict[str, Any]:
    """Base Model with its report wired to a core node (so that it can be queued); Train LoRA, which started `run`, with Wait For Run."""
    values = [TINY, variant, TINY, TINY, "none", "none", "none"]
    outputs = [{"name": "base", "type": "VIDEO_TRAINER_BASE", "links": None}, {"name": "report", "type": "STRING", "links": [1]}]
    link = {"name": "source", "type": "*", "link": 1}
    run_link = {"name": "run", "type": "VIDEO_TRAINER_RUN"}
    nodes: list[dict[str, Any]] = [
        {"id": BASE, "type": "VideoTrainer_BaseModel", "pos": [100, 100], "size": [320, 200], "outputs": outputs, "widgets_values": values},
        {"id": 2, "type": "PreviewAny", "pos": [100, 550], "size": [320, 150], "inputs": [link]},
    ]
    links = [[1, BASE, 1, 2, 0, "STRING"]]
    if run:
        started = {"video_trainer_run": run}
        nodes += [
            {"id": TRAIN, "type": "VideoTrainer_TrainLoRA", "pos": [500, 100], "size": [360, 400], "properties": started},
            {"id": WAIT, "type": "VideoTrainer_WaitForRun", "pos": [920, 100], "size": [300, 120], "mode": wait_mode},
        ]
        nodes[2]["outputs"] = [{**run_link, "links": [2]}]
        nodes[3]["inputs"] = [{**run_link, "link": 2}]
        links += [[2, TRAIN, 0, WAIT, 0, run_link["type"]]]
    return {"last_node_id": 4, "last_link_id": 2, "nodes": nodes, "links": links, "version": 0.4}


@pytest.fixture(scope="module", params=[pytest.param("server", marks=pytest.mark.slow), "newest_server"])
def any_server(request):
    return request.getfixturevalue(request.param)


@contextmanager
def _page(pages, server, nodes_2: bool):
    server.post("/api/settings/Comfy.VueNodes.Enabled", nodes_2)
    with pages.open(server) as page:
        yield page
        assert page.errors == []


@pytest.fixture(scope="module", params=[False, True], ids=["canvas", "nodes-2"])
def page(request, any_server, pages):
    with _page(pages, any_server, request.param) as page:
        yield page


def _load(page, graph):
    page.evaluate("async graph => { await app.loadGraphData(graph) }", graph)


def _report(page, node_id) -> str:
    return page.evaluate("id => app.graph.getNodeById(id).widgets.find(w => w.name === 'video_trainer_report')?.value ?? ''", node_id)


def _wait_for_report(page, node_id, text, timeout_seconds=15):
    found = "app.graph.getNodeById(id)?.widgets?.find(w => w.name === 'video_trainer_report')?.value?.includes(text)"
    page.wait_for_function(f"([id, text]) => {found}", arg=[node_id, text], timeout=timeout_seconds * 1000)
    page.locator(REPORT, has_text=text.splitlines()[0]).first.wait_for()


def _run_graph(page):
    page.evaluate("app.queuePrompt(0, 1)")


def test_a_returned_text_is_shown_below_the_other_widgets(page, any_server):
    _load(page, _graph(variant=_another_variant(any_server)))
    _run_graph(page)
    _wait_for_report(page, BASE, "Wan 2.1 T2V")
    page.wait_for_timeout(500)
    report = page.locator(REPORT).first.bounding_box()
    if page.evaluate("LiteGraph.vueNodesMode"):
        node = page.locator(f'[data-node-id="{BASE}"]').first.bounding_box()
        others = [box.bounding_box() for box in page.locator(f'[data-node-id="{BASE}"] .lg-node-widget').all()]
        others = [box for box in others if box and box["y"] < report["y"]]
        assert max(box["y"] + box["height"] for box in others) <= report["y"] + 1
        assert report["y"] + report["height"] <= node["y"] + node["height"]
    else:
        widgets = page.evaluate("id => app.graph.getNodeById(id).widgets.filter(w => !w.hidden).map(w => [w.y, w.computedHeight])", BASE)
        for (top, height), (following, _) in pairwise(widgets):
            assert top + height <= following
        assert widgets[-1][0] + widgets[-1][1] <= page.evaluate("id => app.graph.getNodeById(id).size[1]", BASE)
    assert report["height"] >= 17 * len(_report(page, BASE).splitlines())
    hidden = page.locator(REPORT).first.evaluate("report => report.scrollHeight - report.clientHeight")
    assert hidden <= 0, "a short text is shown whole"


def test_the_rows_of_a_table_do_not_wrap_and_prose_does(page):
    _load(page, _graph())
    rows = ["    clip       size  seconds", *(f"{number:2}  a.mp4  1280x720     5.06  {60 * 'x'}" for number in range(1, 5))]
    show = "(await import(module)).showReport(app.graph.getNodeById(id), app, text)"
    told = f"{40 * 'prose '}\n\n" + "\n".join(rows)
    page.evaluate(f"async ([module, id, text]) => {{ {show} }}", [_module(page, "report.js"), BASE, told])
    page.locator(f"{REPORT} .vt-table").wait_for()
    prose, table = (page.locator(f"{REPORT} > div:last-child > div").nth(index) for index in (0, 1))
    lines = table.evaluate("table => table.offsetHeight") / 17
    assert len(rows) <= lines < len(rows) + 1.2, "as many lines as rows, and a bar to scroll them"
    assert prose.evaluate("prose => prose.offsetHeight") > 2 * 17
    assert table.evaluate("table => table.scrollWidth > table.clientWidth")
    assert page.locator(REPORT).first.evaluate("report => report.scrollWidth <= report.clientWidth")


def _module(page, name: str) -> str:
    """The address that the page has loaded one of the pack's scripts from."""
    return page.evaluate(
        "name => performance.getEntriesByType('resource').map(entry => entry.name).find(n => n.endsWith('/' + name))", name
    )


def test_a_report_is_neither_saved_nor_part_of_the_prompt(page, any_server):
    graph = _graph(variant=_another_variant(any_server))
    _load(page, graph)
    before = page.evaluate("async () => (await app.graphToPrompt()).output[1].inputs")
    _run_graph(page)
    _wait_for_report(page, BASE, "Wan 2.1 T2V")
    assert page.evaluate("async () => (await app.graphToPrompt()).output[1].inputs") == before
    saved = page.evaluate("app.graph.serialize()")
    node = next(node for node in saved["nodes"] if node["id"] == BASE)
    assert node["widgets_values"] == graph["nodes"][0]["widgets_values"]


def test_a_run_is_followed_in_the_node_that_started_it_and_in_the_one_that_waits(page, any_server, request):
    name = f"followed-{request.node.callspec.id}"
    with live_run(any_server, name, steps=5) as run:
        _load(page, _graph(name))
        for node in (TRAIN, WAIT):
            _wait_for_report(page, node, f"{name}: training\n5 of 100 steps (5 %)\nloss")
        add_steps(run, 6, 50)
        for node in (TRAIN, WAIT):
            _wait_for_report(page, node, "50 of 100 steps (50 %)")
        assert page.locator(f"{REPORT} .vt-bar > div").first.evaluate("bar => bar.style.width") == "50%"
        _load(page, _graph(name, wait_mode=4))
        _wait_for_report(page, TRAIN, "50 of 100 steps (50 %)")
        assert _report(page, WAIT) == "", "a bypassed node waits for nothing"
        run.event("done")
    _wait_for_report(page, TRAIN, f"{name}: done")


def test_a_failure_is_shown_with_the_end_of_the_log(page, any_server, request):
    name = f"failing-{request.node.callspec.id}"
    run = ended_run(any_server, name, "failed", message="num_frames is 80; Wan needs 4n+1. Use 77 or 81.")
    run.log_file.write_text("Traceback\nJobError: num_frames is 80")
    _load(page, _graph(name))
    _wait_for_report(page, TRAIN, "num_frames is 80; Wan needs 4n+1. Use 77 or 81.")
    assert _report(page, TRAIN).endswith("The end of its log:\nTraceback\nJobError: num_frames is 80")


def test_a_run_that_is_not_there_is_no_matter(page):
    """As in a graph that someone else has shared."""
    _load(page, _graph("never-seen-here"))
    page.wait_for_timeout(1000)
    assert _report(page, TRAIN) == ""


def test_a_node_of_a_graph_that_was_replaced_shows_nothing_more(page, any_server):
    """Its timers still run when the next graph's node of the same number has told something."""
    _load(page, _graph("never-seen-here"))
    _load(page, _graph(variant=_another_variant(any_server)))
    _run_graph(page)
    _wait_for_report(page, BASE, "Wan 2.1 T2V")
    page.wait_for_timeout(3500)
    assert page.locator(REPORT).count() == 1


def test_after_a_change_of_tabs_reports_are_there_again(page, any_server):
    _load(page, _graph(variant=_another_variant(any_server)))
    _run_graph(page)
    _wait_for_report(page, BASE, "Wan 2.1 T2V")
    page.evaluate("app.extensionManager.command.execute('Comfy.NewBlankWorkflow')")
    page.wait_for_function("!app.graph.getNodeById(1)?.comfyClass?.startsWith('VideoTrainer')")
    page.evaluate("app.extensionManager.command.execute('Workspace.PreviousOpenedWorkflow')")
    _wait_for_report(page, BASE, "Wan 2.1 T2V")


def test_after_a_reload_of_the_page_a_run_is_followed_again(page, any_server, request):
    name = f"reloaded-{request.node.callspec.id}"
    with live_run(any_server, name, steps=5) as run:
        _load(page, _graph(name))
        _wait_for_report(page, TRAIN, "5 of 100 steps (5 %)")
        page.evaluate("app.extensionManager.workflow.activeWorkflow.changeTracker.checkState()")
        page.wait_for_timeout(1000)  # the page keeps the graph for its next start
        page.reload()
        page.wait_for_function("id => window.app?.graph?.getNodeById(id)?.type === 'VideoTrainer_TrainLoRA'", arg=TRAIN, timeout=60_000)
        add_steps(run, 6, 7)
        _wait_for_report(page, TRAIN, "7 of 100 steps (7 %)")


@pytest.mark.slow
def test_a_training_that_the_page_starts_is_followed_in_its_node(server, pages):
    """Through the queue with a real worker, on the built-in model and clips."""
    workflow = json.loads((ROOT / "workflows" / "tiny_wan_train_and_sample.json").read_text("utf-8"))
    with _page(pages, server, nodes_2=False) as page:
        _load(page, workflow)
        train = page.evaluate(
            """() => {
                const train = app.graph.nodes.find(node => node.type === 'VideoTrainer_TrainLoRA')
                train.widgets.find(widget => widget.name === 'steps').value = 2
                train.widgets.find(widget => widget.name === 'batch_size').value = 1
                const wanted = type => type.startsWith('VideoTrainer_') && !/WaitForRun|ApplyLoRA|LoadTransformer/.test(type)
                for (const node of [...app.graph.nodes]) if (!wanted(node.type)) app.graph.remove(node)
                return train.id
            }"""
        )
        _run_graph(page)
        page.wait_for_function("id => app.graph.getNodeById(id).properties.video_trainer_run", arg=train, timeout=120_000)
        name = page.evaluate("id => app.graph.getNodeById(id).properties.video_trainer_run", train)
        _wait_for_report(page, train, f"{name}: done\n2 of 2 steps (100 %)", timeout_seconds=120)
