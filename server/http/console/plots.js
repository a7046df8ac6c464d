// Plots that follow the theme and the width of their place. One figure has one series, its last value in large type.

import { h, text } from "./dom.js";

const uPlot = window.uPlot;
const plots = new Set();
const cursors = uPlot.sync("history");

/** After a change of the theme: a canvas does not notice by itself. */
export function redrawAll() {
  for (const plot of plots) plot.build();
}

/** What a variable of the style sheets is now: a canvas knows neither variables nor themes. */
function colour(name) {
  const probe = h("span", { style: { color: `var(${name})` } });
  document.body.append(probe);
  const found = getComputedStyle(probe).color;
  probe.remove();
  return found;
}

const clock = (unix) =>
  new Date(unix * 1000).toLocaleTimeString("en", { hour: "2-digit", minute: "2-digit", hour12: false });

export class Plot {
  /** `format` writes a value, `of` says in words what it is; `bars` for counts, `dots` for what is not always there. */
  constructor({ title, of, format, bars = false, dots = false, max = null, time = true, height = 128 }) {
    Object.assign(this, { title, of, format, bars, dots, max, time, height });
    this.value = h("output.figure");
    this.when = h("span.when");
    this.place = h(".canvas", { role: "img" });
    this.element = h("figure.plot", {},
      h("figcaption", {}, h("span.label", {}, title), this.value, this.when), this.place);
    this.data = [[], []];
    this.observer = new ResizeObserver(() => this.resize());
    this.observer.observe(this.place);
    plots.add(this);
  }

  show(x, y) {
    this.data = [x, y];
    if (this.chart) this.chart.setData(this.data);
    else this.build();
    this.showValue(null);
    const values = y.filter((value) => value !== null);
    const most = values.length ? this.format(Math.max(...values)) : "none yet";
    this.place.setAttribute("aria-label", `${this.title}, ${this.of}: now ${this.value.textContent}, at most ${most}`);
  }

  showValue(index) {
    const [x, y] = this.data;
    const shown = index ?? lastKnown(y);
    text(this.value, shown === null || y[shown] === null || y[shown] === undefined ? "–" : this.format(y[shown]));
    text(this.when, index === null ? this.of : this.time ? `at ${clock(x[index])}` : `after ${Math.round(x[index])} s`);
  }

  resize() {
    const width = this.place.clientWidth;
    if (this.chart && width && width !== this.chart.width) this.chart.setSize({ width, height: this.height });
    else if (!this.chart) this.build();
  }

  build() {
    const width = this.place.clientWidth;
    if (!width || !this.place.isConnected) return;
    this.chart?.destroy();
    this.chart = new uPlot(this.options(width), this.data, this.place);
  }

  options(width) {
    const accent = colour("--accent");
    const axis = {
      stroke: colour("--soft"),
      font: "11px Inter, system-ui, sans-serif",
      grid: { stroke: colour("--line"), width: 1 },
      ticks: { show: false },
    };
    return {
      width,
      height: this.height,
      padding: [8, this.time ? 18 : 10, 0, 0],
      legend: { show: false },
      cursor: {
        y: false,
        drag: { x: false, y: false },
        points: { size: 7 },
        ...(this.time ? { sync: { key: cursors.key } } : {}),
      },
      scales: {
        x: { time: this.time, range: this.time ? lastTenMinutes : undefined },
        y: { range: (_, low, high) => [Math.min(0, low ?? 0), this.max ?? niceTop(high, this.bars)] },
      },
      axes: [
        { ...axis, grid: { show: false }, size: 22, space: 80,
          values: (_, ticks) => ticks.map((tick) => (this.time ? clock(tick) : `${tick} s`)) },
        { ...axis, size: 46, space: 34, gap: 6, values: (_, ticks) => ticks.map((tick) => this.format(tick)) },
      ],
      series: [{}, {
        stroke: accent,
        width: this.bars ? 0 : 1.6,
        fill: this.bars ? accent : colour("--wash"),
        paths: this.bars ? uPlot.paths.bars({ size: [0.7, 6], align: 0 }) : undefined,
        points: { show: this.dots, size: 5, width: 0, fill: accent },
        spanGaps: false,
      }],
      hooks: { setCursor: [(chart) => this.showValue(chart.cursor.idx ?? null)] },
    };
  }

  remove() {
    this.chart?.destroy();
    this.observer.disconnect();
    plots.delete(this);
    this.element.remove();
  }
}

function lastTenMinutes(_, low, high) {
  const end = high ?? Date.now() / 1000;
  return [end - 600, end];
}

function niceTop(high, isCount) {
  if (!high) return isCount ? 4 : 1;
  return isCount ? Math.max(4, Math.ceil(high * 1.15)) : high * 1.15;
}

function lastKnown(values) {
  for (let index = values.length - 1; index >= 0; index -= 1) if (values[index] !== null) return index;
  return null;
}
