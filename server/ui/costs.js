/** Compares the runs in figures, and tells whether their texts are equal. */

import { count, digits, seconds, size } from "./units.js";

const ROWS = [
  ["Bytes generated", ({ ids }) => ids.length, (n) => n.toLocaleString("en")],
  ["Bytes per round", ({ ids, usage }) => usage && ids.length / usage.rounds, digits],
  ["Drafted bytes accepted", ({ usage, checked }) => checked && usage?.drafted && usage.accepted / usage.drafted, (share) => `${Math.round(100 * share)} %`],
  ["Decoder passes", ({ usage }) => usage?.decoder_calls, (n) => n.toLocaleString("en")],
  ["Encoder and global passes", ({ usage }) => usage?.global_calls, (n) => n.toLocaleString("en")],
  ["Bytes read", ({ usage }) => usage?.bytes_read, (n) => size(n)],
  ["Bytes read, as the paper estimates", ({ usage }) => usage?.estimated_bytes, (n) => size(n)],
  ["Time", (run) => run.seconds, seconds],
  ["Bytes per second", (run) => run.seconds && run.ids.length / run.seconds, digits],
];
const NO_RATIO = "Drafted bytes accepted";

/** Fills the table with a column per run, and for two runs one with the second's share of the first. */
export function showCosts(table, runs) {
  const head = document.createElement("tr");
  head.append(cell("td", ""), ...runs.map((run) => cell("th", run.name, "col")));
  if (runs.length > 1) head.append(cell("th", "ratio", "col"));
  const body = ROWS.map(([label, figure, format]) => {
    const row = document.createElement("tr");
    const figures = runs.map((run) => figure(run) || null);
    row.append(cell("th", label, "row"), ...figures.map((value) => cell("td", value === null ? "–" : format(value))));
    if (runs.length > 1) {
      const known = label !== NO_RATIO && figures.every((value) => value !== null);
      row.append(cell("td", known ? `${digits(figures[1] / figures[0])}×` : ""));
    }
    return row;
  });
  table.replaceChildren(group("thead", [head]), group("tbody", body));
}

/** What a run cost, in a line. */
export function summary({ ids, seconds: time, usage }) {
  const parts = [`${count(ids.length, "byte")} in ${seconds(time)}`];
  if (usage && ids.length) {
    parts.push(`${digits(ids.length / usage.rounds)} a round`);
    parts.push(count(usage.decoder_calls, "decoder pass", "decoder passes"));
    parts.push(count(usage.global_calls, "global pass", "global passes"));
    parts.push(`${size(usage.bytes_read)} read`);
  }
  return parts.join(" · ");
}

/** Tells in a sentence whether two runs gave the same bytes; empty if unknown. */
export function verdict(runs) {
  if (runs.length < 2 || !runs.every((run) => run.complete)) return "";
  const [first, second] = runs.map((run) => run.ids);
  const part = first.findIndex((id, place) => id !== second[place]);
  if (part < 0 && first.length === second.length) return `= The texts are equal: ${count(first.length, "byte")}.`;
  return `≠ The texts differ from byte ${(part < 0 ? Math.min(first.length, second.length) : part) + 1} on.`;
}

export function group(name, rows) {
  const element = document.createElement(name);
  element.append(...rows);
  return element;
}

export function cell(name, text, scope) {
  const element = document.createElement(name);
  element.textContent = text;
  if (scope) element.scope = scope;
  return element;
}
