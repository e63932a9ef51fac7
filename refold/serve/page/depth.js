// The depths of a model: their colours, the legend, and the slider that decides how early a token may leave.

const element = (id) => document.getElementById(id);

/** Returns a function from a number of depths to a share of the ramp: 0 for the first exit, 1 for the full depth. */
export function shares(model) {
  const levels = levelsOf(model);
  return (depth) => {
    if (levels.length === 1) return depth >= levels[0] ? 1 : depth / levels[0];
    const next = levels.findIndex((level) => level >= depth);
    if (next === 0) return 0;
    if (next < 0) return 1;
    const within = (depth - levels[next - 1]) / (levels[next] - levels[next - 1]);
    return (next - 1 + within) / (levels.length - 1);
  };
}

/** Returns the numbers of depths that a token of a model may have, smallest first. */
export function levelsOf(model) {
  return [...new Set([...model.exit_depths, model.depths])].sort((one, two) => one - two);
}

/** Colours an element by a share of the ramp. */
export function paint(target, share) {
  target.classList.add("depth");
  target.style.setProperty("--share", share.toFixed(3));
}

/** The legend: one chip for every depth, with the share of the answer's tokens. */
export class Legend {
  show(model) {
    const share = shares(model);
    this.counts = new Map();
    const chips = levelsOf(model).map((level) => {
      const chip = document.createElement("li");
      const count = document.createElement("span");
      count.className = "count";
      count.textContent = "–";
      chip.append(level === model.depths ? `${level} (all) ` : `${level} `, count);
      paint(chip, share(level));
      this.counts.set(level, count);
      return chip;
    });
    element("legend").replaceChildren(...chips);
  }

  /** Takes the depths of the tokens of an answer. */
  count(depths) {
    for (const [level, target] of this.counts) {
      const found = depths.filter((depth) => depth === level).length;
      target.textContent = depths.length ? `${Math.round((100 * found) / depths.length)}%` : "–";
    }
  }
}

/** The slider over what the model offers: tolerances, exit depths, or neither. */
export class ExitSlider {
  constructor(changed) {
    this.input = element("exit");
    this.kind = "none";
    this.values = [];
    this.input.addEventListener("input", () => {
      this.tell();
      changed();
    });
  }

  show(model, wanted) {
    const { tolerances, exit_depths: exits, depths } = model;
    this.model = model;
    this.kind = tolerances.length ? "tolerance" : exits.length ? "depth" : "none";
    this.values = { tolerance: [...new Set([0, ...tolerances])].sort((one, two) => one - two), depth: levelsOf(model).reverse(), none: [] }[this.kind];
    element("exit-box").hidden = this.kind === "none";
    element("exit-label").textContent = this.kind === "depth" ? "Exit depth" : "Exit tolerance";
    element("exit-note").textContent = {
      tolerance: "It acts at once: an answer that is coming goes on from here, one that has ended starts anew.",
      depth: "The exits of this model are not calibrated, so all tokens leave at one depth. Right: fewer depths.",
      none: `This model has no exits: every token runs all ${depths} depths.`,
    }[this.kind];
    this.input.max = String(Math.max(1, this.values.length - 1));
    this.choose(wanted ?? (this.kind === "tolerance" ? (model.tolerance ?? 0) : depths));
  }

  /** Takes the value that is nearest to a wanted one. */
  choose(wanted) {
    const far = this.values.map((value) => Math.abs(value - wanted));
    this.input.value = String(Math.max(0, far.indexOf(Math.min(...far))));
    this.tell();
  }

  get value() {
    return this.values[Number(this.input.value)];
  }

  /** The field of a request. */
  get fields() {
    if (this.kind === "tolerance") return { exit_tolerance: this.value };
    if (this.kind === "depth" && this.value < this.model.depths) return { exit_depth: this.value };
    return {};
  }

  /** The setting in a few words. */
  get words() {
    if (this.kind === "none") return "";
    if (this.kind === "depth") return `${this.value} of ${this.model.depths} depths`;
    if (this.value === 0) return "none: every token runs the full depth";
    return `at most ${Number((100 * this.value).toPrecision(3))}% other tokens than the full depth`;
  }

  tell() {
    element("exit-value").textContent = this.words;
    this.input.setAttribute("aria-valuetext", this.words);
  }
}
