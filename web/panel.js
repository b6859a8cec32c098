// The tab in the sidebar: all runs, those that train first.

import { element, makeCard } from "./run_card.js";
import { ask, current, subscribe } from "./runs.js";
import { countsOf, isWaiting } from "./words.js";

/** Fills `container` with the list. Doing so again, or after the page has thrown the list away, is harmless. */
export function renderPanel(container, { tell, openGraph }) {
  if (container.querySelector(":scope > .vt-panel")) return;
  const view = {
    tell,
    cards: new Map(), // name -> card
    count: element("span", { className: "vt-count" }),
    list: element("div", { className: "vt-list" }),
    message: element("div", { className: "vt-message" }),
    welcome: makeWelcome(openGraph),
  };
  const title = element("header", { className: "vt-title" }, element("span", { textContent: "Video Trainer" }), view.count);
  view.root = element("section", { className: "vt-panel" }, title, view.message, view.welcome, view.list);
  container.replaceChildren(view.root);
  const redraw = () => (view.root.isConnected ? draw(view) : end()); // the page never says that a tab was closed
  const unsubscribe = subscribe(redraw);
  const timer = setInterval(redraw, 60_000); // "5 min ago"
  const end = () => {
    unsubscribe();
    clearInterval(timer);
  };
  draw(view);
}

function draw(view) {
  const { runs, loaded, problem } = current();
  const ordered = [...runs.values()].sort(byInterest);
  view.count.textContent = countsOf(ordered);
  view.welcome.hidden = !loaded || runs.size > 0;
  drawMessage(view, loaded, problem);
  drawCards(view, ordered);
}

/** Live runs, the waiting ones after those that train, then the others. Live ones by when they were made, so that they
 * keep their places, the others by when they last did something; each time the latest first. */
function byInterest(one, other) {
  if (one.live !== other.live) return one.live ? -1 : 1;
  if (isWaiting(one) !== isWaiting(other)) return isWaiting(one) ? 1 : -1;
  return one.live ? other.created - one.created : other.active - one.active;
}

function drawMessage(view, loaded, problem) {
  view.message.hidden = loaded && !problem;
  if (view.message.hidden) return;
  const text = problem ? `The runs cannot be read: ${problem}` : "Reading the runs ...";
  view.message.replaceChildren(text);
  if (problem) view.message.append(element("button", { type: "button", textContent: "Try again", onclick: ask }));
}

function drawCards(view, ordered) {
  const names = new Set(ordered.map((run) => run.name));
  for (const [name, card] of view.cards) {
    if (names.has(name)) continue;
    card.root.remove();
    view.cards.delete(name);
  }
  let place = view.list.firstElementChild;
  for (const run of ordered) {
    if (!view.cards.has(run.name)) view.cards.set(run.name, makeCard(view.tell));
    const card = view.cards.get(run.name);
    card.update(run);
    if (card.root === place) place = place.nextElementSibling;
    else view.list.insertBefore(card.root, place); // only what moved: a card that is touched loses its focus
  }
}

const YOUR_MODELS = "For a graphics card, with model files that you have or that ComfyUI offers to download";
const GRAPHS = [
  ["wan21_train", "Wan 2.1"],
  ["wan21_train_i2v", "Wan 2.1 image to video"],
  ["wan22_5b_train", "Wan 2.2 5B"],
  ["wan22_a14b_train", "Wan 2.2 A14B"],
  ["wan22_a14b_train_i2v", "Wan 2.2 A14B image to video"],
  ["ltx_train", "LTX-Video"],
  ["hunyuan_train", "HunyuanVideo"],
  ["hunyuan_train_i2v", "HunyuanVideo image to video"],
  ["mochi_train", "Mochi"],
  ["tiny_wan_train_and_sample", "Tiny Wan, to try it", "Everything comes with the pack; runs on any computer in a few minutes"],
];

function makeWelcome(openGraph) {
  const graph = ([name, label, title = YOUR_MODELS]) =>
    element("button", { type: "button", textContent: label, title, onclick: () => openGraph(name) });
  const open = element("div", { className: "vt-buttons" }, ...GRAPHS.map(graph));
  const steps = [
    element("li", {}, "Open a training graph:", open),
    element("li", {}, "Choose your model in Base Model and your clips in Dataset from Folder."),
    element("li", {}, "Press Run. The training appears here and goes on in the background: you can use ComfyUI meanwhile, or close it."),
  ];
  const title = element("p", { textContent: "Nothing has been trained yet. Your first LoRA:" });
  return element("div", { className: "vt-welcome" }, title, element("ol", {}, ...steps));
}
