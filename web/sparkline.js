// A small curve of the loss.

const SVG = "http://www.w3.org/2000/svg";
const WIDTH = 120;
const HEIGHT = 24;

/** An empty <svg>; `drawSparkline` fills it. */
export function makeSparkline() {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", `0 0 ${WIDTH} ${HEIGHT}`);
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("role", "img");
  const line = document.createElementNS(SVG, "polyline");
  line.setAttribute("vector-effect", "non-scaling-stroke");
  svg.append(line);
  return svg;
}

/** Draws [[step, loss], ...]. Single outliers may leave the picture, so that they do not flatten the rest. */
export function drawSparkline(svg, points) {
  const smooth = smoothed(points);
  svg.style.visibility = smooth.length < 2 ? "hidden" : "visible";
  if (smooth.length < 2) return;
  const losses = smooth.map(([, loss]) => loss);
  const [low, high] = [Math.min(...losses), Math.max(...losses)];
  const [first, last] = [smooth[0][0], smooth.at(-1)[0]];
  const x = (step) => (WIDTH * (step - first)) / (last - first);
  const y = (loss) => HEIGHT - 2 - ((HEIGHT - 4) * (loss - low)) / (high - low || 1);
  svg.firstChild.setAttribute("points", smooth.map(([step, loss]) => `${x(step).toFixed(1)},${y(loss).toFixed(1)}`).join(" "));
  svg.setAttribute("aria-label", `Loss from ${losses[0].toPrecision(3)} to ${losses.at(-1).toPrecision(3)}`);
}

/** A running mean over about a tenth of the points; not corrected at the beginning, where it starts at the first loss. */
function smoothed(points) {
  const share = Math.min(1, 10 / Math.max(points.length, 1));
  let mean = points[0]?.[1] ?? 0;
  return points.map(([step, loss]) => [step, (mean += share * (loss - mean))]);
}
