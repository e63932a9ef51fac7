// The playground: wires the fields, the answers, the slider and the figures together.

import { Pane } from "./answer.js";
import { setKey } from "./client.js";
import { align, inWords } from "./compare.js";
import { fillFields, readFields, readSampling, say, showFault, showTurns, startTheme } from "./controls.js";
import { ExitSlider, Legend } from "./depth.js";
import { Lane } from "./lane.js";
import { copy, readLink, writeLink } from "./link.js";
import { Live } from "./live.js";
import { bytes, parameters } from "./numbers.js";
import { Tip } from "./tip.js";

const FIRST_PROMPT = "Once upon a time";
const ACT_AFTER = 150;
const SAVE_AFTER = 300;
const TICK = 250;
const CONFIRM = 2000;

const element = (id) => document.getElementById(id);
const tip = new Tip(element("tip"));
const lanes = { model: new Lane(new Pane(element("pane-model"), tip)), source: new Lane(new Pane(element("pane-source"), tip)) };
const legend = new Legend();
const slider = new ExitSlider(() => later("act", act, ACT_AFTER));
const live = new Live(takeState, showConnection);
const timers = {};
let models = [];
let source = null;
let question = null;
let turns = [];
let link = readLink(location.hash);

function later(name, does, wait) {
  clearTimeout(timers[name]);
  timers[name] = setTimeout(does, wait);
}

const mode = () => (element("mode-chat").checked ? "chat" : "completion");
const chosen = () => models.find((each) => each.name === element("model").value) ?? models[0];
const isRunning = () => lanes.model.isRunning || lanes.source.isRunning;
const isComparing = () => source !== null && element("compare").checked;

/** Takes the server's state; the first one, and one with other models, fills the page. */
function takeState(state) {
  const found = state.models.filter((each) => each.role !== "source");
  if (!found.length || JSON.stringify(state.models) === takeState.known) return;
  takeState.known = JSON.stringify(state.models);
  models = found;
  source = state.models.find((each) => each.role === "source") ?? null;
  const wanted = element("model").value || link.model;
  element("model").replaceChildren(...models.map((each) => new Option(each.name)));
  if (models.some((each) => each.name === wanted)) element("model").value = wanted;
  element("key-form").hidden = true;
  element("compare-box").hidden = source === null;
  if (source) lanes.source.pane.show(source);
  showModel(link.exit === undefined ? undefined : Number(link.exit));
  document.body.classList.remove("waiting");
}

function showModel(wanted) {
  const model = chosen();
  const exits = model.exit_depths.length ? `, exits after ${model.exit_depths.join(", ")}` : "";
  element("served").textContent = `${model.name}: ${parameters(model.parameters)} parameters, ${bytes(model.weight_bytes)} of weights, ${model.depths} depths${exits}`;
  element("served").title = model.line;
  element("mode-chat").disabled = !model.has_chat;
  element("chat-note").hidden = model.has_chat;
  if (link.mode === "chat" && model.has_chat) element("mode-chat").checked = true;
  if (!model.has_chat) element("mode-completion").checked = true;
  slider.show(model, wanted);
  legend.show(model);
  live.show(model);
  lanes.model.pane.show(model);
  showMode();
}

function showMode() {
  const isChat = mode() === "chat";
  element("prompt-label").textContent = isChat ? "Your message" : "Text to complete";
  element("forget").hidden = !isChat;
  showTurns(isChat ? turns : []);
  element("pane-source").hidden = !isComparing();
  element("agreement").hidden = !isComparing();
}

/** Answers the prompt with every model at the same time. */
async function run() {
  if (!models.length || isRunning()) return;
  const prompt = element("prompt").value;
  if (mode() === "chat") {
    if (prompt) {
      if (turns.at(-1)?.role === "user") turns.push({ role: "assistant", content: lanes.model.pane.content });
      turns.push({ role: "user", content: prompt });
      element("prompt").value = "";
    }
    showTurns(turns);
  }
  question = { mode: mode(), prompt, turns: [...turns], sampling: readSampling() };
  save();
  await answer(isComparing() ? ["model", "source"] : ["model"]);
}

async function answer(names) {
  showFault(null);
  say("The answer begins.");
  const runs = names.map((name) => lanes[name].run(question, name === "model" ? slider.fields : {}));
  showRunning();
  timers.tick ??= setInterval(tick, TICK);
  const troubles = await Promise.all(runs);
  const trouble = troubles.find(Boolean);
  if (trouble) showFault(trouble);
  if (isRunning()) return;
  clearInterval(timers.tick);
  timers.tick = null;
  tick();
  showRunning();
  if (!trouble) tell();
}

function tell() {
  const { pane } = lanes.model;
  const said = [`The answer has ended: ${pane.tokens.length} tokens, ${pane.rate.toFixed(0)} tokens per second`];
  if (pane.tokens.length) said.push(`mean depth ${pane.meanDepth.toFixed(1)} of ${pane.model.depths}`);
  say(`${said.join(", ")}. ${isComparing() ? element("agreement").textContent : ""}`);
}

function showRunning() {
  element("run").disabled = isRunning();
  element("stop").disabled = !isRunning();
}

function tick() {
  const { pane } = lanes.model;
  legend.count(pane.depths);
  pane.figures();
  if (!isComparing()) return;
  const other = lanes.source.pane;
  other.figures();
  const found = align(pane.tokens.map((each) => each.text), other.tokens.map((each) => each.text));
  pane.mark(found.others[0], found.first);
  other.mark(found.others[1], found.first);
  element("agreement").textContent = inWords(found, !isRunning()) || "\u00a0";
}

function stop() {
  lanes.model.stop();
  lanes.source.stop();
}

/** Makes a move of the slider count at once: an answer that comes goes on from here, an old one is answered anew. */
async function act() {
  save();
  if (!question) return;
  if (!lanes.model.isRunning) {
    await answer(["model"]);
    return;
  }
  try {
    await lanes.model.goOn(slider.fields, slider.words);
  } catch {
    // Without the prompt's tokens there is nothing to go on from.
    lanes.model.stop();
    later("act", act, ACT_AFTER);
  }
}

function showConnection(trouble) {
  element("key-form").hidden = trouble?.status !== 401;
  const words = trouble === null || trouble.status === 401 ? "" : `${trouble.message} This page goes on trying.`;
  if (element("connection").textContent !== words) element("connection").textContent = words;
  element("connection").hidden = !words;
}

function settings() {
  return {
    mode: mode(),
    model: element("model").value,
    prompt: element("prompt").value,
    turns: mode() === "chat" ? turns : [],
    ...readFields(),
    exit: slider.value,
    compare: element("compare").checked ? "" : "no",
  };
}

function save() {
  history.replaceState(null, "", writeLink(settings()));
}

async function copyLink() {
  save();
  const button = element("copy");
  const isCopied = await copy(location.href);
  button.textContent = isCopied ? "Copied ✓" : "Not copied";
  say(isCopied ? "The link is copied. It holds the settings and the prompt." : "The browser did not copy the link. It is in the address bar.");
  later("copied", () => (button.textContent = "Copy link"), CONFIRM);
}

function listen() {
  const fields = [...document.querySelectorAll("#settings input, #settings textarea, #prompt")];
  fields.forEach((each) => each.addEventListener("input", () => later("save", save, SAVE_AFTER)));
  element("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    run();
  });
  element("stop").addEventListener("click", stop);
  document.querySelector(".skip").addEventListener("click", (event) => {
    // The fragment of the address holds the settings.
    event.preventDefault();
    element("prompt").focus();
  });
  element("copy").addEventListener("click", copyLink);
  element("forget").addEventListener("click", () => {
    turns = [];
    question = null;
    stop();
    lanes.model.pane.begin("");
    lanes.model.pane.end("");
    showMode();
    save();
    element("prompt").focus();
  });
  for (const id of ["mode-completion", "mode-chat", "compare"]) {
    element(id).addEventListener("change", () => {
      showMode();
      save();
    });
  }
  element("model").addEventListener("change", () => {
    stop();
    question = null;
    showModel();
    lanes.model.pane.begin("");
    lanes.model.pane.end("");
    save();
  });
  element("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    setKey(element("key").value);
    element("key").value = "";
    live.wake();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      run();
    } else if (event.key === "Escape") {
      if (tip.isShown) tip.hide();
      else stop();
    }
  });
  addEventListener("hashchange", () => restore(readLink(location.hash)));
}

function restore(found) {
  link = found;
  element("prompt").value = found.prompt ?? (found.turns.length ? "" : FIRST_PROMPT);
  turns = found.turns;
  fillFields(found);
  element("compare").checked = found.compare !== "no";
  if (!models.length) return;
  if (models.some((each) => each.name === found.model)) element("model").value = found.model;
  if (found.mode !== "chat") element("mode-completion").checked = true;
  showModel(found.exit === undefined ? undefined : Number(found.exit));
}

startTheme(() => live.draw());
restore(link);
listen();
live.wake();
