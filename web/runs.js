// The runs as the server tells of them: one store for the whole page. Nothing happens until `listen` or `ask`.

import { api } from "../../scripts/api.js";

const EVENT = "video_trainer.runs";
const PATH = "/video_trainer/runs";
const LONGEST_CURVE = 600;

const runs = new Map(); // name -> record
const curves = new Map(); // name -> [[step, loss], ...], or a promise of it
const listeners = new Set();
let loaded = false;
let problem = "";
let asking = false;
let askAgain = false;

/** Calls `listener(before)` after each change; `before` are the runs as they were, null the first time. Returns what ends it. */
export function subscribe(listener) {
  listeners.add(listener);
  return () => listeners.delete(listener);
}

/** {runs, loaded, problem}: the records by name, whether the server has answered yet, and why not. */
export function current() {
  return { runs, loaded, problem };
}

/** Takes the server's news. To be called at once: the page complains of events that nobody listens to. */
export function listen() {
  api.addEventListener(EVENT, ({ detail }) => apply(detail));
  api.addEventListener("reconnected", ask);
}

/** Fetch all runs. News that come meanwhile may be newer than the answer: then it asks once more. */
export async function ask() {
  if (asking) {
    askAgain = true;
    return;
  }
  asking = true;
  do {
    askAgain = false;
    await fetchAll();
  } while (askAgain);
  asking = false;
}

/** Ask a run to "stop", "pause" or "resume". Throws an Error with a sentence when that cannot be. */
export async function steer(name, action) {
  const answer = await json(`${PATH}/${encodeURIComponent(name)}/${action}`, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: "{}",
  });
  apply({ runs: [answer.run], removed: [] });
  return answer.told;
}

/** The loss so far, [[step, loss], ...], ascending; grows by itself while the run trains. */
export async function curve(name) {
  if (!curves.has(name)) {
    curves.set(name, fetchCurve(name));
    curves.set(name, await curves.get(name));
  }
  return curves.get(name);
}

async function fetchAll() {
  try {
    const answer = await json(PATH);
    const before = loaded ? new Map(runs) : null;
    runs.clear();
    for (const run of answer.runs) runs.set(run.name, run);
    loaded = true;
    problem = "";
    tell(before);
  } catch (error) {
    problem = error.message;
    tell(loaded ? new Map(runs) : null);
  }
}

function apply({ runs: changed, removed }) {
  if (asking) askAgain = true;
  if (!loaded) return void ask();
  const before = new Map(runs);
  for (const name of removed) {
    runs.delete(name);
    curves.delete(name);
  }
  for (const run of changed) {
    runs.set(run.name, run);
    extend(run);
  }
  tell(before);
}

function extend(run) {
  const points = curves.get(run.name);
  if (!Array.isArray(points) || run.loss == null) return;
  const last = points.at(-1)?.[0] ?? 0;
  if (run.step < last) curves.delete(run.name); // it went on from an earlier checkpoint
  else if (run.step > last) points.push([run.step, run.loss]);
  if (points.length > LONGEST_CURVE) points.splice(0, points.length, ...points.filter((_, index) => index % 2));
}

async function fetchCurve(name) {
  try {
    const { metrics } = await json(`${PATH}/${encodeURIComponent(name)}`);
    return metrics.filter((line) => line.loss != null).map((line) => [line.step, line.loss]);
  } catch {
    return []; // a run that was just removed
  }
}

async function json(path, options) {
  const response = await api.fetchApi(path, options);
  const answer = await response.json().catch(() => ({}));
  if (!response.ok) throw new Error(answer.error ?? `ComfyUI answered ${response.status} to ${path}.`);
  return answer;
}

function tell(before) {
  for (const listener of [...listeners]) {
    try {
      listener(before);
    } catch (error) {
      console.error("Video Trainer:", error);
    }
  }
}
