// What the engine does now: figures, and a strip of the last half minute, from GET state four times a second.

import { ask } from "./client.js";
import { paint } from "./depth.js";
import { saved } from "./numbers.js";

const EVERY = 250;
const KEPT = 30000;
const RATE_OVER = 2000;
const STILL = 5000;
const LONGEST_WAIT = 4000;
const HEALTH_EVERY = 8;
const element = (id) => document.getElementById(id);
const isStill = matchMedia("(prefers-reduced-motion: reduce)");

export class Live {
  /** `told` takes each new state, `lost` a Trouble or null once the server answers again. */
  constructor(told, lost) {
    this.told = told;
    this.lost = lost;
    this.samples = [];
    this.polls = 0;
    this.failures = 0;
    this.canvas = element("strip");
    this.drawnAt = 0;
    document.addEventListener("visibilitychange", () => !document.hidden && this.wake());
    addEventListener("resize", () => this.draw());
  }

  /** Takes the model whose engine is shown. */
  show(model) {
    this.model = model;
    this.samples = [];
    this.colours = new Map();
    this.segments = [...new Set([0, ...model.exit_depths])].sort((one, two) => one - two);
    this.makeChips();
  }

  /** Polls now, and again until the page is hidden. */
  async wake() {
    clearTimeout(this.timer);
    if (document.hidden || this.isAsking) return;
    this.isAsking = true;
    let wait = EVERY;
    try {
      const state = await (await ask("state")).json();
      // The state of an engine that is lost stays as it was; only its health tells.
      if (this.polls++ % HEALTH_EVERY === 0) await ask("health");
      this.failures = 0;
      this.lost(null);
      this.told(state);
      if (this.model) this.take(state);
    } catch (trouble) {
      this.failures += 1;
      this.polls = 0;
      wait = trouble.status === 401 ? null : Math.min(LONGEST_WAIT, EVERY * 2 ** this.failures);
      this.lost(trouble);
    }
    this.isAsking = false;
    if (wait !== null) this.timer = setTimeout(() => this.wake(), wait);
  }

  take(state) {
    const engine = state.engines[this.model.engine ?? this.model.name];
    if (!engine?.slots) return;
    const now = performance.now();
    const rows = new Map(engine.slots.map((each) => [each.first_depth, each.rows]));
    this.samples.push({ now, rows, tokens: engine.new_tokens, depths: engine.depths, waiting: engine.waiting });
    while (this.samples[0].now < now - KEPT) this.samples.shift();
    const known = this.segments.length;
    this.segments = [...new Set([...this.segments, ...rows.keys()])].sort((one, two) => one - two);
    if (this.segments.length > known) this.makeChips();
    this.figures(engine);
    const pause = isStill.matches ? STILL : 0;
    if (now - this.drawnAt >= pause) {
      this.drawnAt = now;
      this.draw();
    }
  }

  figures(engine) {
    const last = this.samples.at(-1);
    const since = this.samples.find((each) => each.now >= last.now - RATE_OVER);
    const seconds = (last.now - since.now) / 1000;
    const rate = seconds > 0 ? (last.tokens - since.tokens) / seconds : 0;
    element("live-rate").textContent = rate.toFixed(rate < 100 ? 1 : 0);
    element("live-rows").textContent = `${engine.running} / ${engine.waiting}`;
    const pages = engine.used_pages + engine.free_pages;
    element("live-pages").textContent = pages ? `${engine.used_pages} of ${pages}` : "none kept";
    const mean = meanDepth(this.samples[0].depths, last.depths);
    element("live-depth").textContent = mean === null ? "–" : `${mean.toFixed(1)} / ${this.model.depths}`;
    element("live-saved").textContent = mean === null ? "–" : saved(mean, this.model.depths);
    element("live-drafts-box").hidden = !engine.acceptance;
    element("live-drafts").textContent = `${Math.round(100 * (engine.acceptance ?? 0))}%`;
    for (const [depth, target] of this.chips) target.textContent = String(last.rows.get(depth) ?? 0);
  }

  makeChips() {
    const last = Math.max(1, this.segments.length - 1);
    this.chips = new Map();
    const items = this.segments.map((depth, place) => {
      const item = document.createElement("li");
      const count = document.createElement("b");
      count.textContent = "0";
      item.append(`after ${depth}: `, count);
      paint(item, place / last);
      this.chips.set(depth, count);
      return item;
    });
    element("slots").replaceChildren(...items);
    this.colours = new Map();
  }

  /** Colours of the segments as the browser shows them now. */
  readColours() {
    const items = [...element("slots").children];
    this.segments.forEach((depth, place) => {
      this.colours.set(depth, getComputedStyle(items[place]).backgroundColor);
    });
  }

  draw() {
    if (!this.model) return;
    this.readColours();
    const { canvas } = this;
    const scale = devicePixelRatio || 1;
    const width = Math.round(canvas.clientWidth * scale);
    const height = Math.round(canvas.clientHeight * scale);
    if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
    const context = canvas.getContext("2d");
    context.clearRect(0, 0, width, height);
    const style = getComputedStyle(canvas);
    const most = Math.max(4, ...this.samples.map((each) => total(each.rows)));
    const now = this.samples.at(-1)?.now ?? 0;
    const step = Math.max(1, (width * EVERY) / KEPT);
    const label = 14 * scale;
    for (const sample of this.samples) {
      const right = width - ((now - sample.now) / KEPT) * width;
      let bottom = height;
      for (const depth of this.segments) {
        const size = ((sample.rows.get(depth) ?? 0) / most) * (height - label);
        context.fillStyle = this.colours.get(depth);
        context.fillRect(Math.floor(right - step), bottom - size, Math.ceil(step), size);
        bottom -= size;
      }
      context.fillStyle = style.color;
      if (bottom < height) context.fillRect(Math.floor(right - step), bottom, Math.ceil(step), scale);
    }
    context.fillStyle = style.color;
    context.font = `${11 * scale}px system-ui, sans-serif`;
    context.fillText(`${most} rows`, 4 * scale, 11 * scale);
    context.fillRect(0, label, width, Math.max(1, scale / 2));
    canvas.setAttribute("aria-label", `Running sequences of the last 30 seconds: now ${total(this.samples.at(-1)?.rows ?? new Map())}, at most ${Math.max(0, ...this.samples.map((each) => total(each.rows)))}`);
  }
}

function total(rows) {
  return [...rows.values()].reduce((sum, each) => sum + each, 0);
}

/** Mean number of depths of the tokens between two counts; null: there were none. */
function meanDepth(before, after) {
  let tokens = 0;
  let depths = 0;
  for (const [depth, count] of Object.entries(after)) {
    const made = count - (before[depth] ?? 0);
    tokens += made;
    depths += made * Number(depth);
  }
  return tokens > 0 ? depths / tokens : null;
}
