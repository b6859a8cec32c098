// Video Trainer in the page: the tab with all runs, and reports in the nodes. The only file here that does something by itself.

import { app } from "../../scripts/app.js";
import { openGraph } from "./graphs.js";
import { foldAdvanced } from "./more_settings.js";
import { newsOf } from "./news.js";
import { renderPanel } from "./panel.js";
import { showReport } from "./report.js";
import { ask, current, listen, subscribe } from "./runs.js";
import { reportOf } from "./words.js";

const TAB = "video-trainer";
const PREFIX = "VideoTrainer_";
const WAIT = `${PREFIX}WaitForRun`;
const ALWAYS = 0; // mode of a node that is neither muted nor bypassed
const RUN = "video_trainer_run"; // property of a node: the name of the run that it started or waited for
// After a change of tabs or an undo, the page gives nodes their outputs back a moment later; a slow one, a second or more.
const GIVEN_BACK_MILLISECONDS = [300, 1000, 3000];

const toldIn = new WeakMap(); // {tab of the page: Map {key of a node: its text}}
let refreshing = false;
let refreshAgain = false;

listen();

app.registerExtension({
  name: "VideoTrainer",

  async setup() {
    addStyles();
    app.extensionManager.registerSidebarTab({
      id: TAB,
      icon: "pi pi-video",
      title: "Video Trainer",
      tooltip: "Video Trainer",
      type: "custom",
      render: (container) => renderPanel(container, { tell, openGraph: open }),
    });
    subscribe((before) => {
      announce(before);
      drawBadge();
      drawReports();
    });
    ask();
  },

  nodeCreated(node) {
    if (!node.comfyClass?.startsWith(PREFIX)) return;
    foldAdvanced(node);
    chain(node, "onExecuted", (output) => executed(node, output));
    chain(node, "onConfigure", () => GIVEN_BACK_MILLISECONDS.forEach((time) => setTimeout(() => recall(node), time)));
  },
});

function addStyles() {
  const link = document.createElement("link");
  link.rel = "stylesheet";
  link.href = new URL("./video_trainer.css", import.meta.url).href;
  document.head.append(link);
}

function announce(before) {
  const { toasts, newLoras } = newsOf(before, current().runs);
  for (const toast of toasts) app.extensionManager.toast.add({ life: 10_000, ...toast });
  if (newLoras) refreshLists();
}

function tell(severity, detail) {
  app.extensionManager.toast.add({ severity, summary: "Video Trainer", detail, life: 10_000 });
}

/** Lets every LoRA list show new files. One at a time: the page fetches all node definitions for it. */
async function refreshLists() {
  refreshAgain = true;
  if (refreshing) return;
  refreshing = true;
  while (refreshAgain) {
    refreshAgain = false;
    try {
      await reloadQuietly();
    } catch (error) {
      console.warn("Video Trainer: the LoRA lists could not be refreshed; press R.", error);
    }
  }
  refreshing = false;
}

/** What the R key does, without its toasts: a training writes many LoRAs. Front ends before `reloadNodeDefs` tell while `vueAppReady`. */
async function reloadQuietly() {
  if (app.reloadNodeDefs) return app.reloadNodeDefs();
  if (!app.updateVueAppNodeDefs) return app.extensionManager.command.execute("Comfy.RefreshNodeDefinitions");
  let definitions = null;
  const getNodeDefs = async () => (definitions = await app.getNodeDefs());
  await Object.create(app, { vueAppReady: { value: false }, getNodeDefs: { value: getNodeDefs } }).refreshComboInNodes();
  app.updateVueAppNodeDefs(definitions);
}

async function open(name) {
  try {
    await openGraph(app, name);
  } catch (error) {
    tell("error", error.message);
  }
}

/** The number of live runs on the tab's icon. It is set on the page's own record of the tab, which the page watches. */
function drawBadge() {
  const live = [...current().runs.values()].filter((run) => run.live).length;
  const tab = app.extensionManager.getSidebarTabs?.().find(({ id }) => id === TAB);
  if (tab) tab.iconBadge = live ? String(live) : null;
}

function executed(node, output) {
  const [name] = output?.[RUN] ?? [];
  if (name) node.properties[RUN] = name;
  told()?.set(keyOf(node), textOf(output));
  drawReport(node, textOf(output));
}

/** The report of a node that was made anew from a saved graph. */
function recall(node) {
  if (node.graph?.getNodeById(node.id) !== node) return; // it was removed meanwhile; a cleared graph leaves its nodes their `graph`
  drawReport(node, textOf(app.nodeOutputs?.[keyOf(node)]) || told()?.get(keyOf(node)));
}

/** What the nodes of the open tab have said. The page keeps their outputs too, but not those that come before the answer to its prompt. */
function told() {
  const tab = app.extensionManager.workflow?.activeWorkflow;
  if (tab && !toldIn.has(tab)) toldIn.set(tab, new Map());
  return toldIn.get(tab);
}

function keyOf(node) {
  return !node.graph.isRootGraph && node.graph.id ? `${node.graph.id}:${node.id}` : String(node.id);
}

function textOf(output) {
  return [output?.text ?? []].flat().join("\n");
}

function drawReports() {
  for (const node of everyNode(app.rootGraph ?? app.graph)) {
    if (runOf(node)) drawReport(node);
  }
}

/** The name of the run that a node started or waits for. */
function runOf(node) {
  if (node.comfyClass === WAIT && node.mode === ALWAYS) {
    const started = node.getInputNode(node.inputs.findIndex(({ name }) => name === "run"));
    return started?.properties?.[RUN] ?? node.properties[RUN];
  }
  return node.properties?.[RUN];
}

/** A run that is known tells by itself how it goes; `text` is what a node says that has none. */
function drawReport(node, text = "") {
  const run = current().runs.get(runOf(node));
  if (run) showReport(node, app, reportOf(run), run);
  else if (text) showReport(node, app, text);
}

function* everyNode(graph) {
  for (const node of graph?.nodes ?? []) {
    yield node;
    if (node.subgraph) yield* everyNode(node.subgraph);
  }
}

function chain(node, name, then) {
  const first = node[name];
  node[name] = function (...values) {
    const result = first?.apply(this, values);
    then(...values);
    return result;
  };
}
