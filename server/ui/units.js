/** Figures as people read them. */

const PREFIXES = ["", "k", "M", "G", "T", "P"];

/** Three significant digits: 745, 1.20, 12.3. */
export function digits(value) {
  return value >= 100 ? Math.round(value).toLocaleString("en") : value.toFixed(value < 10 ? 2 : 1);
}

/** A size with a decimal prefix: 11.8 MB. */
export function size(bytes, unit = "B") {
  const [value, prefix] = scaled(bytes);
  return `${prefix ? digits(value) : Math.round(value)} ${prefix}${unit}`;
}

/** A size without idle zeros: 20 MB/s. */
export function round(bytes, unit) {
  const [value, prefix] = scaled(bytes);
  return `${Number(value.toPrecision(3))} ${prefix}${unit}`;
}

function scaled(value) {
  let step = 0;
  while (value >= 999.5 && step < PREFIXES.length - 1) {
    value /= 1000;
    step += 1;
  }
  return [value, PREFIXES[step]];
}

export function count(value, noun, nouns = `${noun}s`) {
  return `${value.toLocaleString("en")} ${value === 1 ? noun : nouns}`;
}

export function seconds(value) {
  return `${value.toFixed(value < 10 ? 2 : 1)} s`;
}

export function percent(share) {
  return `${(100 * share).toFixed(share < 0.1 ? 1 : 0)} %`;
}
