/** The live metrics of the server, fetched while the page is visible. */

import { metrics } from "./api.js";
import { cell, group } from "./costs.js";
import { NAMES } from "./decoders.js";
import { History, parse } from "./metrics.js";
import { Plot, swatch } from "./plot.js";
import { count, percent, round, size } from "./units.js";

const INTERVAL = 1000;
const STAGES = ["patcher", "encoder", "global", "decoder"];

export class Live {
  #history = new History();
  #throughput = new Plot(document.getElementById("throughput"), (value) => round(value, "B/s"));
  #bandwidth = new Plot(document.getElementById("bandwidth"), (value) => round(value, "B/s"));
  #timer;
  #asking = false;

  start() {
    document.addEventListener("visibilitychange", () => this.#look());
    this.#look();
  }

  /** Scrapes now and then at intervals, while the page is visible. */
  async #look() {
    clearTimeout(this.#timer);
    if (document.hidden || this.#asking) return;
    this.#asking = true;
    try {
      this.#show(parse(await metrics()), performance.now() / 1000);
    } catch (error) {
      document.getElementById("load").textContent = error.message;
    }
    this.#asking = false;
    if (!document.hidden) this.#timer = setTimeout(() => this.#look(), INTERVAL);
  }

  #show(families, now) {
    this.#history.add(now, families);
    const running = families.fastblt_running_sequences[""] ?? 0;
    const queued = families.fastblt_queued_sequences[""] ?? 0;
    document.getElementById("load").textContent = `${count(running, "sequence")} running, ${queued} queued`;
    const decoders = NAMES.filter((name) => families.fastblt_committed_bytes_total[name] > 0);
    const drawn = this.#draw(this.#throughput, "throughput", decoders, NAMES, now);
    fill("throughput-now", ["Decoder", "now", "in all"], decoders, NAMES, (name) => [
      rate(drawn[name]),
      size(families.fastblt_committed_bytes_total[name]),
    ]);
    // The memory bandwidth of a product with one row.
    const peak = families.fastblt_peak_bandwidth_bytes_per_second.gemv;
    const read = this.#draw(this.#bandwidth, "bandwidth", STAGES, STAGES, now);
    const head = ["Stage", "last", ...(peak ? [`of peak ${size(peak, "B/s")}`] : [])];
    fill("bandwidth-now", head, STAGES, STAGES, (name) => [
      rate(read[name]),
      ...(peak ? [read[name] === undefined ? "–" : percent(read[name] / peak)] : []),
    ]);
  }

  /** Draws the lines and returns the newest value of each that has one. */
  #draw(plot, quantity, names, all, now) {
    const lines = names.map((name) => ({
      series: all.indexOf(name),
      points: this.#history.points.map((point) => ({ time: point.time, value: point[quantity][name] ?? null })),
    }));
    plot.show(lines, now);
    return Object.fromEntries(names.map((name, i) => [name, lines[i].points.findLast(({ value }) => value !== null)?.value]));
  }
}

function rate(value) {
  return value === undefined ? "–" : size(value, "B/s");
}

function fill(id, head, names, all, figures) {
  const first = document.createElement("tr");
  first.append(...head.map((text) => cell("th", text, "col")));
  const rows = names.map((name) => {
    const row = document.createElement("tr");
    const title = cell("th", name, "row");
    title.prepend(swatch(all.indexOf(name)));
    row.append(title, ...figures(name).map((text) => cell("td", text)));
    return row;
  });
  document.getElementById(id).replaceChildren(group("thead", [first]), group("tbody", rows));
}
