// Numbers as people read them. A value that nobody has measured is a dash.

const NONE = "–";

const missing = (value) => value === null || value === undefined || Number.isNaN(value);

const significant = (value) => (value >= 100 ? value.toFixed(0) : value >= 10 ? value.toFixed(1) : value.toFixed(2));

export function seconds(value) {
  if (missing(value)) return NONE;
  if (value === 0) return "0";
  if (value < 0.001) return `${significant(value * 1e6)} µs`;
  if (value < 1) return `${significant(value * 1e3)} ms`;
  if (value < 120) return `${significant(value)} s`;
  return `${Math.floor(value / 60)} min ${Math.round(value % 60)} s`;
}

function scaled(value, units, step) {
  let power = 0;
  while (value >= step && power < units.length - 1) {
    value /= step;
    power += 1;
  }
  return `${power || value % 1 ? significant(value) : value} ${units[power]}`;
}

export const bytes = (value) => (missing(value) ? NONE : scaled(value, ["B", "KiB", "MiB", "GiB", "TiB"], 1024));

export const bytesPerSecond = (value) =>
  missing(value) ? NONE : value < 1e8 ? scaled(value, ["B/s", "kB/s", "MB/s"], 1000) : `${significant(value / 1e9)} GB/s`;

export const rate = (value) => (missing(value) ? NONE : `${value < 1e3 ? significant(value) : count(Math.round(value))} tokens/s`);

export const count = (value) => (missing(value) ? NONE : value.toLocaleString("en-GB"));

export function percent(part, whole) {
  if (!whole) return NONE;
  const share = (100 * part) / whole;
  return share > 0 && share < 1 ? "<1 %" : `${Math.round(share)} %`;
}

export const plural = (number, word) => `${count(number)} ${word}${number === 1 ? "" : "s"}`;

export function ago(value) {
  if (value < 1.5) return "now";
  if (value < 90) return `${Math.round(value)} s ago`;
  if (value < 5400) return `${Math.round(value / 60)} min ago`;
  return `${Math.round(value / 3600)} h ago`;
}

/** `prefill_queue` as a word to read. */
export const words = (name) => String(name ?? NONE).replaceAll("_", " ");
