// What a run's record says, in words. No DOM here; nothing happens when this is imported.

const STATES = {
  new: ["not started", "waiting"],
  queued: ["starting", "waiting"],
  training: ["training", "live"],
  paused: ["paused", "held"],
  stopped: ["stopped", "held"],
  failed: ["failed", "failed"],
  interrupted: ["interrupted", "failed"],
  done: ["done", "done"],
};

/** [the word for what a run is doing, the tone it is shown in (live, waiting, held, failed, done)]. */
export function stateOf(run) {
  if (run.live && run.request) return [run.request === "stop" ? "stopping" : "pausing", "held"];
  if (isWaiting(run)) return ["waiting", "waiting"];
  if (run.live && run.state === "training" && run.seconds_per_step == null) return ["starting", "live"];
  return STATES[run.state] ?? [run.state, "waiting"];
}

/** Whether it lives but another run has the card. */
export function isWaiting(run) {
  return run.live && run.state === "queued" && Boolean(run.message);
}

/** "1 running, 2 waiting"; "" when no run lives. */
export function countsOf(runs) {
  const waiting = runs.filter(isWaiting).length;
  const running = runs.filter((run) => run.live).length - waiting;
  return [running ? `${running} running` : "", waiting ? `${waiting} waiting` : ""].filter(Boolean).join(", ");
}

/** Steps done, 0 to 1; null when the total is not known yet. */
export function shareOf(run) {
  return run.total_steps ? Math.min(run.step / run.total_steps, 1) : null;
}

/** "340 of 2000 steps (17 %)"; "2000 steps" when none is done yet. */
export function stepsOf(run) {
  const share = shareOf(run);
  if (share === null || !run.step) return counted(run.step || run.total_steps || "?");
  return `${run.step} of ${counted(run.total_steps)} (${Math.floor(100 * share)} %)`;
}

/** "1 step", "2000 steps" */
export function counted(steps) {
  return `${steps} ${steps === 1 ? "step" : "steps"}`;
}

/** "loss 0.0812", or "" before the first step. */
export function lossOf(run) {
  return run.loss == null ? "" : `loss ${number(run.loss)}`;
}

/** "Previews of step 500: flicker 0.3 %, consistency 0.97, sharpness 210, fits the prompt 0.27"; "" when none was measured. */
export function measuresOf(run) {
  const { step, flicker, consistency, sharpness, adherence } = run.measures ?? {};
  const parts = [
    flicker == null ? "" : `flicker ${number(100 * flicker, 2)} %`,
    consistency == null ? "" : `consistency ${number(consistency, 2)}`,
    sharpness == null ? "" : `sharpness ${Math.round(sharpness)}`,
    adherence == null ? "" : `fits the prompt ${number(adherence, 2)}`,
  ].filter(Boolean);
  return parts.length ? `Previews of step ${step}: ${parts.join(", ")}` : "";
}

/** "1.2 s per step" or "8.3 steps per s". */
export function speedOf(run) {
  const seconds = run.seconds_per_step;
  if (!seconds) return "";
  return seconds < 0.5 ? `${number(1 / seconds, 2)} steps per s` : `${number(seconds, 2)} s per step`;
}

/** "about 12 min left", or "" when that is not known or nothing comes any more. */
export function leftOf(run) {
  return run.live && run.eta_seconds != null && run.state === "training" ? `about ${duration(run.eta_seconds)} left` : "";
}

/** The sentence that belongs to a run's state; "" when the state says it all. */
export function noteOf(run) {
  if (run.live && run.request === "stop") return "Stops after the current step; the checkpoint is kept.";
  if (run.live && run.request === "pause") return "Pauses after the current step and frees the card.";
  if (run.state === "interrupted") return "The process stopped unexpectedly. It can be resumed, from its last checkpoint if there is one.";
  return run.message || run.warning;
}

/** How it uses the card's memory, on one line; "" when it has not said, or needs none any more. */
export function memoryOf(run) {
  return run.state === "done" || !run.memory ? "" : `Memory: ${run.memory.split("\n")[0]}`;
}

/** What a person may ask of a run now: some of "pause", "stop", "resume". */
export function choicesOf(run) {
  if (run.live) return { stop: [], pause: ["resume", "stop"] }[run.request] ?? ["pause", "stop"];
  return run.state === "done" ? [] : ["resume"];
}

/** Lines that tell how a run is going, as a node shows them. */
export function reportOf(run) {
  const [word] = stateOf(run);
  const begun = run.step > 0 || run.live;
  return [
    `${run.name}: ${word}`,
    begun ? stepsOf(run) : "",
    [lossOf(run), run.live ? speedOf(run) : "", leftOf(run)].filter(Boolean).join(", "),
    memoryOf(run),
    noteOf(run),
    measuresOf(run),
    run.lora ? `LoRA: ${run.lora}` : "",
    run.log ? `\nThe end of its log:\n${run.log}` : "",
  ]
    .filter(Boolean)
    .join("\n");
}

/** "40 s", "12 min", "1 h 5 min", "2 d 3 h" */
export function duration(seconds) {
  const whole = Math.max(Math.round(seconds), 0);
  if (whole < 90) return `${whole} s`;
  const minutes = Math.round(whole / 60);
  if (minutes < 60) return `${minutes} min`;
  const hours = Math.floor(minutes / 60);
  if (hours < 48) return minutes % 60 ? `${hours} h ${minutes % 60} min` : `${hours} h`;
  return `${Math.floor(hours / 24)} d ${hours % 24} h`;
}

/** "just now", "12 min ago"; `time` is in seconds since 1970. */
export function ago(time, now = Date.now() / 1000) {
  return now - time < 60 ? "just now" : `${duration(now - time)} ago`;
}

function number(value, digits = 3) {
  if (value !== 0 && Math.abs(value) < 1e-3) return value.toExponential(digits - 1);
  return value >= 1000 ? String(Math.round(value)) : String(Number(value.toPrecision(digits)));
}
