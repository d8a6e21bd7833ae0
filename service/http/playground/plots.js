// Small plots of the last two minutes, from differences and values of /metrics.

const SAMPLES = 120;
const SVG = "http://www.w3.org/2000/svg";

const PLOTS = [
  { label: "waiting", value: (now) => now.nemoserve_requests_queued },
  { label: "running", value: (now) => now.nemoserve_requests_running },
  { label: "KV cache", value: (now) => 100 * now.nemoserve_kv_cache_usage_ratio, unit: " %", most: 100 },
  { label: "tokens/s", value: (now, rate) => rate("nemoserve_generation_tokens_total") },
];

/** Draws into `place`; feed it one scrape after another. */
export class Plots {
  #last = null;
  #drawn;

  constructor(place) {
    this.#drawn = PLOTS.map((plot) => ({ ...plot, ...draw(place, plot.label), values: [] }));
  }

  add(samples, seconds) {
    const last = this.#last;
    this.#last = { samples, seconds };
    const rate = (name) =>
      last ? Math.max(0, samples[name] - last.samples[name]) / (seconds - last.seconds) : 0;
    for (const plot of this.#drawn) {
      const value = plot.value(samples, rate);
      plot.values = [...plot.values, Number.isFinite(value) ? value : 0].slice(-SAMPLES);
      plot.output.value = (plot.values.at(-1) ?? 0).toFixed(0) + (plot.unit ?? "");
      const most = plot.most ?? Math.max(1, ...plot.values);
      const points = plot.values.map((each, at) => `${at + SAMPLES - plot.values.length},${40 - (38 * each) / most}`);
      plot.line.setAttribute("points", points.join(" "));
    }
  }
}

function draw(place, label) {
  const figure = document.createElement("figure");
  figure.className = "plot";
  const output = document.createElement("output");
  output.value = "–";
  output.setAttribute("aria-label", label);
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", `0 0 ${SAMPLES} 41`);
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("aria-hidden", "true");
  const line = document.createElementNS(SVG, "polyline");
  svg.append(line);
  figure.append(label, output, svg);
  place.append(figure);
  return { output, line };
}
