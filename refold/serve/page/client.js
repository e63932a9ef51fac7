// Requests to the server that the page comes from, and its errors in words.

const KEY = "refold-key";
const BUSY = new Set([429, 503]);

/** A fault to be shown: `param` names the field of the request, `status` is 0 where there was no answer. */
export class Trouble extends Error {
  constructor(message, { status = 0, param = null } = {}) {
    super(message);
    this.status = status;
    this.param = param;
  }
}

export function setKey(key) {
  sessionStorage.setItem(KEY, key);
}

function headers() {
  const key = sessionStorage.getItem(KEY);
  return key ? { Authorization: `Bearer ${key}` } : {};
}

/** Returns the response to a GET, or to a POST where there is a body; throws a Trouble unless it is a success. */
export async function ask(path, { body, signal } = {}) {
  const options = { headers: headers(), signal, cache: "no-store" };
  if (body !== undefined) {
    options.method = "POST";
    options.headers["Content-Type"] = "application/json";
    options.body = JSON.stringify(body);
  }
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Trouble("The server cannot be reached. Is it still running?");
  }
  if (!response.ok) throw await troubleOf(response);
  return response;
}

export async function askJson(path, options) {
  return (await ask(path, options)).json();
}

async function troubleOf(response) {
  let fault = {};
  try {
    fault = (await response.json()).error ?? {};
  } catch {
    // A proxy in between may answer with a page of its own.
  }
  let words = fault.message ?? `The server answered ${response.status} ${response.statusText}`.trim();
  const wait = response.headers.get("Retry-After");
  if (BUSY.has(response.status) && wait) words += ` (try again in ${wait} s)`;
  return new Trouble(words, { status: response.status, param: fault.param ?? null });
}

/** Yields the events of a stream; throws a Trouble at an error event, and where the stream ends too early. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) break;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines) {
        if (!line.startsWith("data:")) continue;
        const data = line.slice(5).trim();
        if (data === "[DONE]") return;
        const event = JSON.parse(data);
        if (event.error) throw new Trouble(event.error.message, { status: 500, param: event.error.param ?? null });
        yield event;
      }
    }
  } catch (error) {
    if (error instanceof TypeError) throw new Trouble("The connection was lost while the answer came.");
    throw error;
  } finally {
    reader.cancel().catch(() => {});
  }
  throw new Trouble("The connection was lost while the answer came.");
}
