// Numbers in words.

/** Writes a probability, given its logarithm. */
export function percent(logprob) {
  const share = 100 * Math.exp(logprob);
  return share >= 99.95 ? "100%" : share >= 10 ? `${share.toFixed(0)}%` : share >= 0.1 ? `${share.toFixed(1)}%` : "<0.1%";
}

/** Writes the share of depths that were not computed. */
export function saved(mean, depths) {
  return `${Math.max(0, Math.round(100 * (1 - mean / depths)))}%`;
}

/** Writes a number of parameters. */
export function parameters(number) {
  return number >= 1e9 ? `${(number / 1e9).toPrecision(3)}B` : `${(number / 1e6).toPrecision(3)}M`;
}

/** Writes a number of bytes. */
export function bytes(number) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let unit = 0;
  while (number >= 1000 && unit < units.length - 1) {
    number /= 1000;
    unit += 1;
  }
  return `${Number(number.toPrecision(3))} ${units[unit]}`;
}
