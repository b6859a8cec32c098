// The report in a node: what it returned as text, or how its run is going now.

import { shareOf, stateOf } from "./words.js";

const NAME = "video_trainer_report";
const PROSE = "12px Arial, sans-serif";
const MONO = "10.5px Consolas, Menlo, monospace";
const LINE_PIXELS = 17;
const PADDING_PIXELS = 8;
const MARGIN_PIXELS = 10; // what the page leaves free around an element in a node
const MOST_PIXELS = 320;
const COLUMNS = /\S {2,}\S/; // what stands below each other needs letters of one width
const TABLE_ROW = /\S {2,}\S.* {2,}\S/; // a row of three columns or more would be torn by a wrap
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
  report.blocks = text.split("\n\n").map(blockOf);
  report.words.replaceChildren(...report.blocks.map(elementOf));
  report.root.dataset.tone = tone;
  report.root.hidden = !text;
  report.bar.hidden = share === null;
  report.bar.firstChild.style.width = `${100 * (share ?? 0)}%`;
  fit(node);
}

/** A paragraph: its lines wrap at the node's edge, those of a table go on to the right. */
function blockOf(text) {
  const lines = text.split("\n");
  return { lines, font: COLUMNS.test(text) ? MONO : PROSE, wraps: !lines.some((line) => TABLE_ROW.test(line)) };
}

function elementOf({ lines, font, wraps }) {
  const element = document.createElement("div");
  element.className = wraps ? "" : "vt-table";
  element.textContent = lines.join("\n");
  element.style.font = font.replace("px", `px/${LINE_PIXELS}px`);
  element.style.minHeight = `${LINE_PIXELS}px`; // one that is empty
  return element;
}

function addReport(node, app) {
  const bar = document.createElement("div");
  bar.className = "vt-bar";
  bar.append(document.createElement("div"));
  const words = document.createElement("div");
  const root = document.createElement("div");
  root.className = "vt-report";
  root.style.maxHeight = `${MOST_PIXELS}px`;
  words.style.cssText = `display: grid; grid-template-columns: minmax(0, 1fr); gap: ${LINE_PIXELS}px`; // an empty line between paragraphs
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
    report.lines = countLines(report.blocks, nodeWidth - 2 * (MARGIN_PIXELS + PADDING_PIXELS));
  }
  const bar = report.share === null ? 0 : LINE_PIXELS;
  return Math.min(report.lines * LINE_PIXELS + 2 * PADDING_PIXELS + bar, MOST_PIXELS) + 2 * MARGIN_PIXELS;
}

/** How many lines paragraphs take at a width in pixels, with those between them; counted, since the element may not be on the page yet. */
function countLines(blocks, width) {
  pen ??= document.createElement("canvas").getContext("2d");
  const counts = blocks.map(({ lines, font, wraps }) => {
    pen.font = font;
    const widths = lines.map((line) => pen.measureText(line).width);
    if (!wraps) return lines.length + (Math.max(...widths) > width ? 1 : 0); // the bar to scroll it
    return widths.reduce((count, long) => count + Math.max(1, Math.ceil((1.08 * long) / width)), 0);
  });
  return counts.reduce((sum, count) => sum + count, blocks.length - 1);
}

function letThePagePanAndZoom(root, app) {
  root.addEventListener(
    "wheel",
    (event) => {
      const sideways = (event.deltaX || event.shiftKey) && event.target.closest(".vt-table");
      const scrolls = (root.scrollHeight > root.clientHeight || sideways) && !event.ctrlKey;
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
