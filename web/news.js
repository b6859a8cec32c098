// What happened to runs between two looks: what to say in a toast, and whether there are new LoRA files.

import { stepsOf } from "./words.js";

/** {toasts: [{severity, summary, detail}], newLoras}. `before` is null when the page sees the runs for the first time. */
export function newsOf(before, after) {
  const toasts = [];
  let newLoras = false;
  if (before === null) return { toasts, newLoras };
  for (const run of after.values()) {
    const earlier = before.get(run.name);
    if (run.lora && run.lora !== earlier?.lora) newLoras = true;
    if (earlier && run.state !== earlier.state) toasts.push(...toastsOf(run));
  }
  return { toasts, newLoras };
}

function toastsOf(run) {
  if (run.state === "done") {
    const where = run.lora ? `${run.lora} is in every LoRA list now.` : stepsOf(run);
    return [{ severity: "success", summary: `${run.name} is trained`, detail: where }];
  }
  if (run.state === "failed") {
    return [{ severity: "error", summary: `${run.name} failed`, detail: firstLine(run.message) }];
  }
  if (run.state === "interrupted") {
    return [{ severity: "warn", summary: `${run.name} was interrupted`, detail: "Resume it in the Video Trainer tab." }];
  }
  return [];
}

function firstLine(text) {
  return text.split("\n")[0];
}
