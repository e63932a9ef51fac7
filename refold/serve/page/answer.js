// One pane: an answer as coloured tokens, its figures, and the same tokens as a table.

import { paint, shares } from "./depth.js";
import { bytes, percent, saved } from "./numbers.js";
import { visible } from "./tip.js";

const SHOWN_PROMPT = 400;
const KEYS = { ArrowRight: 1, ArrowLeft: -1 };

export class Pane {
  constructor(root, tip) {
    this.root = root;
    this.tip = tip;
    this.text = root.querySelector(".text");
    this.trouble = root.querySelector(".trouble");
    this.ending = root.querySelector(".end");
    this.table = root.querySelector("details.tokens");
    this.tokens = [];
    this.spans = [];
    this.rest = "";
    this.listen();
  }

  /** Takes the model that answers here. */
  show(model) {
    this.model = model;
    this.share = shares(model);
    this.root.querySelector("h3").textContent = model.role === "source" ? `${model.name} (source)` : model.name;
    this.figure("bytes", bytes(model.weight_bytes));
  }

  /** Starts an answer; `asked` is the text that it goes on from, shown before it. */
  begin(asked) {
    this.tip.hide();
    this.tokens = [];
    this.spans = [];
    this.rest = "";
    this.firstAt = this.lastAt = null;
    const before = document.createElement("span");
    before.className = "asked";
    before.textContent = asked.length > SHOWN_PROMPT ? `…${asked.slice(-SHOWN_PROMPT)}` : asked;
    this.text.replaceChildren(before);
    this.goOn();
    this.figures();
  }

  /** Goes on with an answer whose next tokens come with other settings; `words` says which. */
  goOn(words) {
    this.change = words && this.tokens.length ? words : null;
    this.root.classList.add("busy");
    this.trouble.textContent = "";
    this.trouble.hidden = true;
    this.ending.textContent = "\u00a0";
  }

  /** Adds a token of the stream; one without an id is text that was held back. */
  add(token) {
    if (token.id == null) {
      this.rest += token.text;
      this.text.append(token.text);
      return;
    }
    this.lastAt = performance.now();
    this.firstAt ??= this.lastAt;
    const span = document.createElement("span");
    span.className = "token";
    span.tabIndex = -1;
    span.dataset.place = String(this.tokens.length);
    span.textContent = token.text;
    span.classList.toggle("break", /^\n/.test(token.text));
    span.classList.toggle("part", token.text === "");
    if (this.change) {
      span.classList.add("change");
      span.title = `from here: ${this.change}`;
      this.change = null;
    }
    paint(span, this.share(token.depth));
    this.tokens.push(token);
    this.spans.push(span);
    this.text.append(span);
    this.follow();
  }

  /** Keeps the end in sight, unless the reader has scrolled away from it or looks at a token. */
  follow() {
    if (this.isFollowing || this.tip.isShown) return;
    const { scrollTop, scrollHeight, clientHeight } = this.text;
    if (scrollHeight - scrollTop - clientHeight > 90) return;
    this.isFollowing = true;
    requestAnimationFrame(() => {
      this.isFollowing = false;
      this.text.scrollTop = this.text.scrollHeight;
    });
  }

  /** Drops tokens at the end whose text has not come: they are not whole characters yet. */
  dropUnfinished() {
    while (this.tokens.at(-1)?.text === "") {
      this.tokens.pop();
      this.spans.pop().remove();
    }
  }

  end(words) {
    this.root.classList.remove("busy");
    this.ending.textContent = words;
    this.figures();
    if (this.table.open) this.fillTable();
  }

  fail(words) {
    this.root.classList.remove("busy");
    this.trouble.textContent = words;
    this.trouble.hidden = false;
    this.figures();
  }

  get content() {
    return this.tokens.map((token) => token.text).join("") + this.rest;
  }

  get ids() {
    return this.tokens.map((token) => token.id);
  }

  get depths() {
    return this.tokens.map((token) => token.depth);
  }

  get rate() {
    const seconds = (this.lastAt - this.firstAt) / 1000;
    return seconds > 0 ? (this.tokens.length - 1) / seconds : 0;
  }

  get meanDepth() {
    return this.depths.reduce((sum, depth) => sum + depth, 0) / this.tokens.length;
  }

  figures() {
    const count = this.tokens.length;
    this.figure("tokens", count ? String(count) : "–");
    this.figure("rate", this.rate ? this.rate.toFixed(this.rate < 100 ? 1 : 0) : "–");
    this.figure("depth", count ? `${this.meanDepth.toFixed(1)} / ${this.model.depths}` : "–");
    this.figure("saved", count ? saved(this.meanDepth, this.model.depths) : "–");
  }

  figure(name, text) {
    this.root.querySelector(`[data-figure="${name}"]`).textContent = text;
  }

  /** Marks tokens that differ from the other answer. */
  mark(others, first) {
    this.spans.forEach((span, place) => {
      span.classList.toggle("other", others.has(place));
      span.classList.toggle("first", place === first);
    });
    this.others = others;
    if (this.table.open && !this.root.classList.contains("busy")) this.fillTable();
  }

  fillTable() {
    const rows = this.tokens.map((token, place) => {
      const others = (token.alternatives ?? []).map((each) => `${visible(each.text)} ${percent(each.logprob)}`);
      const differs = this.others?.has(place) ? "differs" : "";
      const share = token.logprob == null ? "" : percent(token.logprob);
      return [String(place + 1), visible(token.text), String(token.depth), share, differs, others.join("  ")];
    });
    const table = document.createElement("table");
    const names = ["number", "token", "depth", "probability", "beside the other model", "likeliest tokens"];
    const head = table.createTHead().insertRow();
    names.forEach((name) => {
      const cell = document.createElement("th");
      cell.scope = "col";
      cell.textContent = name;
      head.append(cell);
    });
    const body = table.createTBody();
    for (const row of rows) {
      const line = body.insertRow();
      row.forEach((text, column) => {
        const cell = line.insertCell();
        cell.textContent = text;
        if (column === 1 || column === 5) cell.className = "word";
      });
    }
    this.table.querySelector(".scroll").replaceChildren(table);
  }

  listen() {
    const placeOf = (event) => event.target.closest?.(".token")?.dataset.place;
    const tell = (place) => this.tip.show(this.spans[place], this.tokens[place], this.model.depths);
    this.text.addEventListener("pointerover", (event) => {
      if (placeOf(event) !== undefined) tell(Number(placeOf(event)));
    });
    this.text.addEventListener("pointerout", () => {
      if (!document.activeElement?.classList.contains("token")) this.tip.leave();
    });
    this.text.addEventListener("focusin", (event) => {
      if (placeOf(event) !== undefined) tell(Number(placeOf(event)));
    });
    this.text.addEventListener("focusout", () => this.tip.hide());
    this.text.addEventListener("scroll", () => this.tip.isShown && this.tip.place(this.tip.target));
    this.text.addEventListener("keydown", (event) => this.move(event, placeOf(event)));
    this.table.addEventListener("toggle", () => this.table.open && this.fillTable());
  }

  /** Moves the focus from token to token. */
  move(event, place) {
    const last = this.spans.length - 1;
    if (last < 0 || event.ctrlKey || event.metaKey || event.altKey) return;
    const here = place === undefined ? -1 : Number(place);
    let next = null;
    if (event.key in KEYS) next = here < 0 ? (event.key === "ArrowRight" ? 0 : last) : here + KEYS[event.key];
    else if (event.key === "Home") next = 0;
    else if (event.key === "End") next = last;
    else if ((event.key === "ArrowDown" || event.key === "ArrowUp") && here >= 0)
      next = this.inNextLine(here, event.key === "ArrowDown" ? 1 : -1);
    if (next === null) return;
    event.preventDefault();
    this.spans[Math.max(0, Math.min(last, next))].focus();
  }

  inNextLine(here, step) {
    const from = this.spans[here].getBoundingClientRect();
    let found = here;
    let line = null;
    for (let place = here + step; place >= 0 && place < this.spans.length; place += step) {
      const at = this.spans[place].getBoundingClientRect();
      if (Math.abs(at.top - from.top) < 4) continue;
      line ??= at.top;
      if (Math.abs(at.top - line) > 4) break;
      const isNearer = Math.abs(at.left - from.left) < Math.abs(this.spans[found].getBoundingClientRect().left - from.left);
      if (found === here || isNearer) found = place;
    }
    return found;
  }
}
