// Loads the folder `model`, which `refold export --to onnx` wrote, and streams text from it.
// `?model=NAME` takes another folder beside this page.
import {
  AutoModelForCausalLM,
  AutoTokenizer,
  InterruptableStoppingCriteria,
  TextStreamer,
  env,
} from "./node_modules/@huggingface/transformers/dist/transformers.min.js";

env.allowRemoteModels = false;
env.allowLocalModels = true;
env.localModelPath = "./";
// The browser's own cache serves files again; a second copy of the weights is not needed.
env.useBrowserCache = false;
env.useWasmCache = false;
env.backends.onnx.wasm.wasmPaths = new URL("./node_modules/onnxruntime-web/dist/", import.meta.url).href;
// The runtime computes in a worker, so that the page stays responsive.
env.backends.onnx.wasm.proxy = true;

const find = (id) => document.getElementById(id);
const [prompt, generate, stop, length, answer, status] = ["prompt", "generate", "stop", "length", "answer", "status"].map(find);
const stopping = new InterruptableStoppingCriteria();
let tokenizer, model;

function say(text, failed = false) {
  status.textContent = text;
  status.classList.toggle("failed", failed);
}

function showProgress(event) {
  if (event.status === "progress" && event.total) {
    say(`Loading ${event.file}: ${Math.round((100 * event.loaded) / event.total)} %`);
  }
}

async function load() {
  const folder = new URLSearchParams(location.search).get("model") ?? "model";
  if (!/^[\w.-]+$/.test(folder)) {
    throw new Error(`model: the name of a folder beside this page is required (got ${folder})`);
  }
  const start = performance.now();
  tokenizer = await AutoTokenizer.from_pretrained(folder);
  model = await AutoModelForCausalLM.from_pretrained(folder, { device: "wasm", progress_callback: showProgress });
  say(`Ready after ${((performance.now() - start) / 1000).toFixed(1)} s.`);
  generate.disabled = false;
}

async function run() {
  generate.disabled = true;
  stop.disabled = false;
  stopping.reset();
  const given = document.createElement("span");
  given.className = "prompt";
  given.textContent = prompt.value;
  const found = document.createTextNode("");
  answer.replaceChildren(given, found);
  let count = 0;
  let first;
  const start = performance.now();
  const streamer = new TextStreamer(tokenizer, {
    skip_prompt: true,
    skip_special_tokens: true,
    callback_function: (text) => found.appendData(text),
    token_callback_function: () => {
      first ??= performance.now();
      count += 1;
    },
  });
  try {
    const inputs = tokenizer(prompt.value);
    const max_new_tokens = Math.min(Math.max(Number(length.value) || 64, 1), 512);
    await model.generate({ ...inputs, max_new_tokens, do_sample: false, streamer, stopping_criteria: stopping });
    const seconds = (performance.now() - first) / 1000;
    const speed = count > 1 ? `, ${((count - 1) / seconds).toFixed(1)} tokens/s` : "";
    say(`${count} tokens, first after ${((first - start) / 1000).toFixed(2)} s${speed}.`);
  } catch (error) {
    say(String(error), true);
  }
  generate.disabled = false;
  stop.disabled = true;
}

generate.addEventListener("click", run);
stop.addEventListener("click", () => stopping.interrupt());
load().catch((error) => say(`The model cannot be loaded: ${error.message ?? error}`, true));
