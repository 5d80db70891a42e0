/** Draws the entropy before each byte of a text, the patching threshold, and where the output begins. */

import { label, make } from "./plot.js";

const MARGIN = { top: 4, bottom: 4 };

export class Strip {
  #svg;
  #waiting = false;
  #shown = { entropies: [] };
  #place;

  constructor(svg) {
    this.#svg = svg;
    new ResizeObserver(() => this.#ask()).observe(svg);
    this.clear();
  }

  clear() {
    this.show({ entropies: [] });
  }

  /** patches: as a choice has them; the last one that was shown stays marked. */
  show(patches) {
    this.#shown = patches;
    if (!patches.entropies.length) this.#place = undefined;
    this.#svg.toggleAttribute("hidden", !patches.entropies.length);
    this.#ask();
  }

  /** Marks a place of prompt and output. */
  mark(place) {
    this.#place = place;
    this.#ask();
  }

  /** Draws once per animation frame, however many chunks arrive. */
  #ask() {
    if (this.#waiting) return;
    this.#waiting = true;
    requestAnimationFrame(() => {
      this.#waiting = false;
      this.#draw();
    });
  }

  #draw() {
    const { entropies, threshold, output_start: output } = this.#shown;
    this.#svg.replaceChildren();
    if (!entropies.length) return;
    const { clientWidth: width, clientHeight: height } = this.#svg;
    const most = entropies.reduce((highest, nats) => Math.max(highest, nats), Math.max(threshold ?? 0, 1));
    // No entropy precedes the first byte.
    const x = (place) => (place / (entropies.length + 1)) * width;
    const y = (nats) => height - MARGIN.bottom - (nats / most) * (height - MARGIN.top - MARGIN.bottom);
    const line = entropies.map((nats, place) => `${place ? "H" : "M"}${x(place + 1).toFixed(1)}${place ? "V" : " "}${y(nats).toFixed(1)}`);
    const parts = [make("path", { d: `${line.join("")}H${width}`, "data-series": 0 })];
    if (output <= entropies.length) parts.push(upright(x(output), height, "edge"));
    if (threshold !== null) {
      parts.push(make("line", { x1: 0, x2: width, y1: y(threshold), y2: y(threshold), class: "threshold" }));
      parts.push(label(`${threshold.toFixed(2)} nats`, { x: width - 4, y: y(threshold) - 4, "text-anchor": "end" }));
    }
    if (this.#place !== undefined) parts.push(upright(x(this.#place + 0.5), height, "here"));
    this.#svg.append(...parts);
  }
}

function upright(x, height, name) {
  return make("line", { x1: x, x2: x, y1: 0, y2: height, class: name });
}
