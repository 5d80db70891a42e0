/** Rates out of successive scrapes of /metrics, for the last minute. */

export const SPAN = 60;
/** Seconds without a scrape after which a rate means little. */
const LONGEST = 5;
const SAMPLE = /^(fastblt_\w+)(?:\{\w+="([^"]*)"\})? (\S+)/;
const WANTED = new Set([
  "fastblt_committed_bytes_total",
  "fastblt_stage_read_bytes_total",
  "fastblt_stage_seconds_total",
  "fastblt_running_sequences",
  "fastblt_queued_sequences",
  "fastblt_peak_bandwidth_bytes_per_second",
]);

/** { family: { label value, "" without a label: number } } of the families that the page shows. */
export function parse(text) {
  const families = Object.fromEntries([...WANTED].map((name) => [name, {}]));
  for (const line of text.split("\n")) {
    const [, name, label = "", value] = SAMPLE.exec(line) ?? [];
    if (WANTED.has(name)) families[name][label] = Number(value);
  }
  return families;
}

export class History {
  #last;
  /** { time, throughput: {decoder: bytes/s}, bandwidth: {stage: bytes/s} }; null is a gap. */
  points = [];

  /** Takes a scrape; time in seconds. */
  add(time, families) {
    const last = this.#last;
    this.#last = { time, families };
    const passed = last && time - last.time;
    if (passed >= LONGEST) this.points.push({ time, throughput: {}, bandwidth: {} });
    else if (passed > 0) {
      const grown = (name) => growth(last.families[name], families[name]);
      const [generated, read, busy] = ["committed_bytes", "stage_read_bytes", "stage_seconds"].map((name) => grown(`fastblt_${name}_total`));
      this.points.push({
        time,
        throughput: mapped(generated, (bytes) => bytes / passed),
        bandwidth: mapped(read, (bytes, stage) => (busy[stage] > 0 ? bytes / busy[stage] : null)),
      });
    }
    this.points = this.points.filter((point) => point.time > time - SPAN);
  }
}

/** By how much counters grew; null for one that was reset. */
function growth(before, now) {
  return mapped(now, (value, label) => (value >= (before[label] ?? 0) ? value - (before[label] ?? 0) : null));
}

function mapped(record, change) {
  return Object.fromEntries(Object.entries(record).map(([label, value]) => [label, value === null ? null : change(value, label)]));
}
