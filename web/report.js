// The report in a node: what it returned as text, or how its run is going now.

import { shareOf, stateOf } from "./words.js";

const NAME = "video_trainer_report";
const PROSE = "12px Arial, sans-serif";
const TABLE = "10.5px Consolas, Menlo, monospace";
const LINE_PIXELS = 17;
const PADDING_PIXELS = 8;
const MARGIN_PIXELS = 10; // what the page leaves free around an element in a node
const MOST_LINES = 16;
const NARROWEST_PIXELS = 260;

let pen = null;

/** Shows `text` in the node, below its other widgets; with `run` also its progress. An empty text shows nothing. */
export function showReport(node, app, text, run = null) {
  const report = node.widgets?.find((widget) => widget.name === NAME)?.report ?? (text ? addReport(node, app) : null);
  if (!report) return;
  const [, tone] = run ? stateOf(run) : ["", ""];
  const share = run && run.state !== "done" ? shareOf(run) : null;
  if (report.text === text && report.share === share && report.tone === tone) return;
  Object.assign(report, { text, share, tone });
  report.words.textContent = text;
  report.font = /\S {2,}\S/.test(text) ? TABLE : PROSE; // columns stand below each other only where letters have one width
  report.words.style.font = report.font.replace("px", `px/${LINE_PIXELS}px`);
  report.root.dataset.tone = tone;
  report.root.hidden = !text;
  report.bar.hidden = share === null;
  report.bar.firstChild.style.width = `${100 * (share ?? 0)}%`;
  fit(node);
}

function addReport(node, app) {
  const bar = document.createElement("div");
  bar.className = "vt-bar";
  bar.append(document.createElement("div"));
  const words = document.createElement("div");
  const root = document.createElement("div");
  root.className = "vt-report";
  root.append(bar, words);
  letThePagePanAndZoom(root, app);
  const report = { root, bar, words, text: "", share: null, tone: "" };
  const height = () => heightOf(report, node.size[0]);
  const widget = node.addDOMWidget(NAME, NAME, root, {
    serialize: false, // not part of the prompt: it would make the node look changed
    hideOnZoom: false,
    getValue: () => report.text,
    setValue: () => {},
    getMinHeight: height,
    getMaxHeight: height,
  });
  widget.serialize = false; // not part of the saved workflow, whose values are told apart by their place
  widget.report = report;
  return report;
}

/** Makes the node as large as its widgets need; it never becomes smaller than someone made it. */
function fit(node) {
  if (globalThis.LiteGraph?.vueNodesMode) return; // there the page's own layout does it
  const [width, height] = node.computeSize();
  const wanted = [Math.max(node.size[0], width, NARROWEST_PIXELS), Math.max(node.size[1], height)];
  if (wanted[0] !== node.size[0] || wanted[1] !== node.size[1]) node.setSize(wanted);
  node.setDirtyCanvas?.(true, true);
}

function heightOf(report, nodeWidth) {
  if (!report.text) return 0;
  const key = `${nodeWidth} ${report.text}`;
  if (report.measured !== key) {
    report.measured = key;
    report.lines = Math.min(countLines(report, nodeWidth - 2 * (MARGIN_PIXELS + PADDING_PIXELS)), MOST_LINES);
  }
  const bar = report.share === null ? 0 : LINE_PIXELS;
  return report.lines * LINE_PIXELS + 2 * (MARGIN_PIXELS + PADDING_PIXELS) + bar;
}

/** How many lines a text takes when it wraps at a width in pixels; counted, since the element may not be on the page yet. */
function countLines({ text, font }, width) {
  pen ??= document.createElement("canvas").getContext("2d");
  pen.font = font;
  return text.split("\n").reduce((lines, line) => lines + Math.max(1, Math.ceil((1.08 * pen.measureText(line).width) / width)), 0);
}

function letThePagePanAndZoom(root, app) {
  root.addEventListener(
    "wheel",
    (event) => {
      const scrolls = root.scrollHeight > root.clientHeight && !event.ctrlKey;
      event.stopPropagation();
      if (scrolls) return;
      event.preventDefault();
      app.canvas.processMouseWheel(event);
    },
    { passive: false },
  );
  for (const [type, handler] of [
    ["pointerdown", "processMouseDown"],
    ["pointermove", "processMouseMove"],
    ["pointerup", "processMouseUp"],
  ]) {
    root.addEventListener(type, (event) => {
      if (event.button === 1 || event.buttons & 4) app.canvas[handler](event);
    });
  }
}
