/** Lines over the last minute, as SVG. Series differ in colour and in dashes. */

import { SPAN } from "./metrics.js";

const NAMESPACE = "http://www.w3.org/2000/svg";
/** How many colours page.css has for lines. */
const COLOURS = 6;
const MARGIN = { left: 64, right: 8, top: 8, bottom: 22 };

export class Plot {
  #svg;
  #format;
  #lines = [];
  #now = 0;

  /** format: a value of the vertical axis as text. */
  constructor(svg, format) {
    this.#svg = svg;
    this.#format = format;
    new ResizeObserver(() => this.#draw()).observe(svg);
  }

  /** lines: [{ series, points: [{ time, value }] }], series a number that chooses colour and dashes, value null a gap. */
  show(lines, now) {
    this.#lines = lines;
    this.#now = now;
    this.#draw();
  }

  #draw() {
    const { clientWidth: width, clientHeight: height } = this.#svg;
    const bottom = height - MARGIN.bottom;
    const x = (time) => width - MARGIN.right - ((this.#now - time) / SPAN) * (width - MARGIN.left - MARGIN.right);
    const step = tick(Math.max(...this.#lines.flatMap(({ points }) => points.map(({ value }) => value ?? 0)), 1) / 2);
    const most = Math.max(...this.#lines.flatMap(({ points }) => points.map(({ value }) => value ?? 0)), 1);
    const y = (value) => bottom - (value / (Math.ceil(most / step) * step)) * (bottom - MARGIN.top);
    const grid = [];
    for (let value = 0; value <= Math.ceil(most / step) * step; value += step) {
      grid.push(make("line", { x1: MARGIN.left, x2: width - MARGIN.right, y1: y(value), y2: y(value) }));
      grid.push(label(this.#format(value), { x: MARGIN.left - 8, y: y(value) + 4, "text-anchor": "end" }));
    }
    grid.push(label(`${SPAN} s ago`, { x: MARGIN.left, y: height - 4 }));
    grid.push(label("now", { x: width - MARGIN.right, y: height - 4, "text-anchor": "end" }));
    const paths = this.#lines.map(({ series, points }) => make("path", { d: path(points, x, y), "data-series": series % COLOURS }));
    this.#svg.replaceChildren(...grid, ...paths);
  }
}

/** A short line as in the plot, for its legend. */
export function swatch(series) {
  const svg = make("svg", { class: "swatch", "aria-hidden": "true" });
  svg.append(make("path", { d: "M1 6H27", "data-series": series % COLOURS }));
  return svg;
}

/** The least of 1, 2 or 5 times a power of ten that is not below the value. */
function tick(least) {
  const power = 10 ** Math.floor(Math.log10(least));
  return power * [1, 2, 5, 10].find((factor) => factor * power >= least);
}

function path(points, x, y) {
  let from = "M";
  return points
    .map(({ time, value }) => {
      if (value === null) {
        from = "M";
        return "";
      }
      // A point between gaps is drawn as a dot.
      const part = `${from}${x(time).toFixed(1)} ${y(value).toFixed(1)}${from === "M" ? "h0" : ""}`;
      from = "L";
      return part;
    })
    .join("");
}

export function label(text, attributes) {
  const element = make("text", attributes);
  element.textContent = text;
  return element;
}

export function make(name, attributes) {
  const element = document.createElementNS(NAMESPACE, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  return element;
}
