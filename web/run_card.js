// One run in the sidebar: an element that is made once and then follows the run's record.

import { curve, steer } from "./runs.js";
import { drawSparkline, makeSparkline } from "./sparkline.js";
import { ago, choicesOf, counted, leftOf, lossOf, measuresOf, memoryOf, noteOf, shareOf, speedOf, stateOf, stepsOf } from "./words.js";

const BUTTONS = {
  pause: ["Pause", "pi-pause", "Stop for now and free the card; goes on where it was"],
  resume: ["Resume", "pi-play", "Go on from the last checkpoint"],
  stop: ["Stop", "pi-stop", "End the training; its checkpoint and LoRA files are kept"],
};

const MEASURES =
  "Means over the newest previews, to compare with those before.\n" +
  "Flicker: jumps of the whole picture's brightness; 0 % is steady.\n" +
  "Consistency: how far each frame is the one before it, moved; 1 is perfect.\n" +
  "Sharpness: more is sharper; noise counts as sharp too.\n" +
  "Fits the prompt: likeness of video and prompt to the CLIP model you gave; more is better.";

/** A new element with the attributes of `properties` and with `children`. */
export function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

/** {root, update(run)}; `tell(severity, sentence)` says what came of a button. */
export function makeCard(tell) {
  const parts = {
    name: element("span", { className: "vt-name" }),
    state: element("span", { className: "vt-state" }),
    bar: element("div", { className: "vt-bar" }, element("div")),
    steps: element("span"),
    left: element("span"),
    loss: element("span"),
    speed: element("span"),
    spark: makeSparkline(),
    memory: element("div", { className: "vt-memory" }),
    note: element("div", { className: "vt-note" }),
    measures: element("div", { className: "vt-note" }),
    lora: element("div", { className: "vt-lora" }),
    log: element("pre"),
    buttons: element("div", { className: "vt-buttons" }),
  };
  parts.spark.classList.add("vt-spark");
  parts.curve = element("div", { className: "vt-line" }, parts.loss, parts.spark, parts.speed);
  parts.details = element("details", { className: "vt-log" }, element("summary", { textContent: "End of the log" }), parts.log);
  parts.details.ontoggle = () => (parts.log.scrollTop = parts.log.scrollHeight); // the last line tells most
  parts.root = element(
    "article",
    { className: "vt-run" },
    element("header", { className: "vt-line" }, parts.name, parts.state),
    parts.memory,
    parts.bar,
    element("div", { className: "vt-line" }, parts.steps, parts.left),
    parts.curve,
    parts.note,
    parts.details,
    parts.measures,
    parts.lora,
    parts.buttons,
  );
  const card = { ...parts, tell, run: null, confirming: false, busy: "", shownChoices: "" };
  whenSeen(card);
  return { root: parts.root, update: (run) => update(card, run) };
}

function update(card, run) {
  const [word, tone] = stateOf(run);
  card.run = run;
  card.root.dataset.tone = tone;
  write(card.name, run.name, run.name);
  write(card.state, word);
  write(card.steps, run.state === "done" ? counted(run.step) : stepsOf(run));
  write(card.left, run.live ? leftOf(run) : ago(run.active));
  write(card.loss, lossOf(run));
  write(card.speed, run.live ? speedOf(run) : "");
  write(card.memory, memoryOf(run), run.memory);
  write(card.note, noteOf(run));
  write(card.measures, measuresOf(run), MEASURES);
  write(card.lora, run.lora ? `LoRA: ${fileName(run.lora)}` : "", run.lora && `In every LoRA list as ${run.lora}`);
  write(card.log, run.log);
  card.details.hidden = !run.log;
  card.curve.hidden = run.loss == null;
  drawBar(card, run);
  drawButtons(card);
  drawCurve(card);
}

function fileName(lora) {
  return lora.split("/").at(-1).replace(/\.safetensors$/, "");
}

function write(target, text, title) {
  if (target.textContent !== text) target.textContent = text;
  if (title) target.title = title;
  target.hidden = !text;
}

function drawBar(card, run) {
  const share = shareOf(run);
  card.bar.hidden = run.state === "done" || run.state === "new";
  card.bar.classList.toggle("vt-unknown", card.state.textContent === "starting");
  card.bar.firstChild.style.width = `${100 * (share ?? 0)}%`;
}

function drawButtons(card) {
  const choices = choicesOf(card.run);
  if (!choices.includes("stop")) card.confirming = false;
  const shown = [card.confirming, card.busy, ...choices].join(" ");
  if (shown === card.shownChoices) return; // a button that is replaced while it is pressed does nothing
  card.shownChoices = shown;
  card.buttons.hidden = !choices.length;
  card.buttons.replaceChildren(...(card.confirming ? confirmation(card) : choices.map((action) => button(card, action))));
}

function button(card, action) {
  const [word, icon, title] = BUTTONS[action];
  const label = action === "resume" && card.run.live ? "Go on" : card.run.state === "new" ? "Start" : word;
  const press = () => (action === "stop" ? confirm(card, true) : ask(card, action));
  const made = labelled(card.busy === action ? `${label} ...` : label, icon, press);
  made.title = title;
  made.disabled = Boolean(card.busy);
  return made;
}

function confirmation(card) {
  const question = element("div", {
    className: "vt-question",
    textContent: "Stop after the current step? Its checkpoint and LoRA files are kept, and you can resume it later.",
  });
  const stop = labelled("Stop training", "pi-stop", () => ask(card, "stop"));
  stop.classList.add("vt-danger");
  return [question, stop, labelled("Keep training", "", () => confirm(card, false))];
}

function labelled(label, icon, onclick) {
  const made = element("button", { type: "button", onclick });
  if (icon) made.append(element("i", { className: `pi ${icon}` }));
  made.append(label);
  return made;
}

function confirm(card, confirming) {
  card.confirming = confirming;
  drawButtons(card);
}

async function ask(card, action) {
  card.confirming = false;
  card.busy = action;
  drawButtons(card);
  try {
    await steer(card.run.name, action);
  } catch (error) {
    card.tell("error", error.message);
  }
  card.busy = "";
  drawButtons(card);
}

/** The curve of a run is fetched when its card is first seen: a folder of many runs must not be read for nothing. */
function whenSeen(card) {
  const observer = new IntersectionObserver((entries) => {
    if (!entries.some((entry) => entry.isIntersecting)) return;
    observer.disconnect();
    card.seen = true;
    drawCurve(card);
  });
  observer.observe(card.root);
}

async function drawCurve(card) {
  if (!card.seen || !card.run || card.run.loss == null) return;
  const name = card.run.name;
  drawSparkline(card.spark, await curve(name));
}
