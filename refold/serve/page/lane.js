// One model's way to answer: a request, and further ones where the settings change while the text comes.

import { ask, askJson, events, Trouble } from "./client.js";

const ALTERNATIVES = 5;
const REASONS = { stop: "the model ended it", length: "all its tokens are there" };

export class Lane {
  constructor(pane) {
    this.pane = pane;
    this.controller = null;
  }

  get isRunning() {
    return this.controller !== null;
  }

  /**
   * Answers a question into the pane; returns null, or the Trouble that ended it.
   *
   * A question has `mode`, `prompt` or `turns`, and `sampling`; `fields` say how early tokens may leave.
   */
  async run(question, fields) {
    this.question = question;
    this.promptIds = null;
    this.pane.begin(question.mode === "chat" ? "" : question.prompt);
    const { model } = this.pane;
    const body = { model: model.name, stream: true, return_tokens: true, ...question.sampling, ...fields };
    this.next =
      question.mode === "chat"
        ? ["v1/chat/completions", { ...body, messages: question.turns, logprobs: true, top_logprobs: ALTERNATIVES }]
        : ["v1/completions", { ...body, prompt: question.prompt, logprobs: ALTERNATIVES }];
    try {
      while (this.next) {
        const [path, request] = this.next;
        this.next = null;
        await this.stream(path, request);
      }
    } catch (error) {
      const trouble = error instanceof Trouble ? error : new Trouble(`This page has a fault: ${error.message}`);
      const { length } = this.pane.tokens;
      this.pane.fail(length ? `${trouble.message} (after ${length} tokens)` : trouble.message);
      return trouble;
    } finally {
      this.controller = null;
    }
    this.pane.end(this.ending);
    return null;
  }

  async stream(path, body) {
    const controller = new AbortController();
    this.controller = controller;
    this.ending = "Stopped.";
    try {
      for await (const event of events(await ask(path, { body, signal: controller.signal }))) {
        if (controller.signal.aborted) return;
        const choice = event.choices?.[0];
        if (!choice) continue;
        for (const token of choice.refold_tokens ?? []) this.pane.add(token);
        if (choice.finish_reason) this.ending = `Ended: ${REASONS[choice.finish_reason] ?? choice.finish_reason}.`;
      }
    } catch (error) {
      if (error.name !== "AbortError") throw error;
    }
  }

  stop() {
    this.next = null;
    this.controller?.abort();
  }

  /** Goes on from the text so far with other fields; `words` say which. Returns whether there was something to go on. */
  async goOn(fields, words) {
    const turn = (this.turn = {});
    this.promptIds ??= await this.readPrompt();
    if (!this.isRunning || this.turn !== turn) return this.isRunning;
    this.pane.dropUnfinished();
    const left = (this.question.sampling.max_tokens ?? Infinity) - this.pane.tokens.length;
    if (left < 1) return true;
    const sampling = { ...this.question.sampling, ...(Number.isFinite(left) ? { max_tokens: left } : {}) };
    const prompt = [...this.promptIds, ...this.pane.ids];
    const body = { model: this.pane.model.name, stream: true, return_tokens: true, ...sampling, ...fields };
    this.next = ["v1/completions", { ...body, prompt, logprobs: ALTERNATIVES }];
    this.pane.goOn(words);
    this.controller.abort();
    return true;
  }

  async readPrompt() {
    const { mode, prompt, turns } = this.question;
    const asked = mode === "chat" ? { messages: turns } : { prompt };
    return (await askJson("tokenize", { body: { model: this.pane.model.name, ...asked } })).tokens;
  }
}
