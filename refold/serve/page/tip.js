// The box beside a token: its depth, its probability, and the tokens that could have been.

import { percent } from "./numbers.js";

const HIDE_AFTER = 150;

/** Writes a token so that spaces and line breaks are seen. */
export function visible(text) {
  if (text === "") return "(part of a character)";
  return text.replace(/ /g, "␣").replace(/\n/g, "⏎").replace(/\t/g, "⇥");
}

function make(tag, name, text) {
  const made = document.createElement(tag);
  if (name) made.className = name;
  if (text !== undefined) made.textContent = text;
  return made;
}

/** One box for the whole page; it stays as long as the pointer is over its token or over the box. */
export class Tip {
  constructor(box) {
    this.box = box;
    this.target = null;
    box.addEventListener("pointerenter", () => clearTimeout(this.timer));
    box.addEventListener("pointerleave", () => this.leave());
    addEventListener("scroll", () => this.hide(), { passive: true });
    addEventListener("resize", () => this.hide());
  }

  get isShown() {
    return this.target !== null;
  }

  show(target, token, depths) {
    clearTimeout(this.timer);
    this.hide();
    this.target = target;
    target.classList.add("shown");
    target.setAttribute("aria-describedby", this.box.id);
    const head = make("p");
    head.append(make("b", "word", visible(token.text)));
    const told = [`left at depth ${token.depth} of ${depths}`];
    if (token.logprob != null) told.push(`probability ${percent(token.logprob)}`);
    this.box.replaceChildren(head, make("p", "", told.join(", ")));
    if (token.alternatives?.length) {
      const list = make("ol");
      list.setAttribute("aria-label", "Likeliest tokens");
      for (const each of token.alternatives) list.append(this.row(each, each.id === token.id));
      this.box.append(list);
    }
    this.box.hidden = false;
    this.place(target);
  }

  row(each, isTaken) {
    const row = make("li", isTaken ? "taken" : "");
    const bar = make("span", "bar");
    bar.append(make("i"));
    bar.setAttribute("aria-hidden", "true");
    bar.style.setProperty("--p", String(Math.exp(each.logprob)));
    const word = make("span", "word", visible(each.text));
    if (isTaken) word.append(make("span", "unseen", " (taken)"));
    row.append(word, bar, make("span", "number", percent(each.logprob)));
    return row;
  }

  place(target) {
    const at = target.getClientRects()[0] ?? target.getBoundingClientRect();
    const { offsetWidth: width, offsetHeight: height } = this.box;
    const left = Math.max(8, Math.min(at.left, document.documentElement.clientWidth - width - 8));
    const isAbove = at.bottom + height + 12 > innerHeight && at.top > height + 12;
    this.box.style.left = `${left + scrollX}px`;
    this.box.style.top = `${(isAbove ? at.top - height - 6 : at.bottom + 6) + scrollY}px`;
  }

  /** Hides the box soon, unless the pointer comes back. */
  leave() {
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.hide(), HIDE_AFTER);
  }

  hide() {
    clearTimeout(this.timer);
    this.target?.classList.remove("shown");
    this.target?.removeAttribute("aria-describedby");
    this.target = null;
    this.box.hidden = true;
  }
}
