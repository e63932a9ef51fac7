// The fields of the page: what they hold, errors beside them, and the theme.

const element = (id) => document.getElementById(id);
const THEME = "refold-theme";
const NUMBERS = ["max_tokens", "temperature", "top_p", "seed"];
const PLACES = {
  ...Object.fromEntries(NUMBERS.map((name) => [name, name])),
  max_completion_tokens: "max_tokens",
  max_new_tokens: "max_tokens",
  stop: "stops",
  model: "model",
  prompt: "prompt",
  messages: "prompt",
  exit_tolerance: "exit",
  exit_depth: "exit",
};

/** Returns the settings of a request; empty fields are left to the server. */
export function readSampling() {
  const found = {};
  for (const name of NUMBERS) if (element(name).value !== "") found[name] = Number(element(name).value);
  const stops = element("stops").value.split("\n").filter(Boolean);
  if (stops.length) found.stop = stops.map((each) => each.replaceAll("\\n", "\n").replaceAll("\\t", "\t"));
  return found;
}

/** Returns the fields as a link holds them. */
export function readFields() {
  return Object.fromEntries([...NUMBERS, "stops"].map((name) => [name, element(name).value]));
}

/** Fills the fields from a link. */
export function fillFields(link) {
  for (const name of [...NUMBERS, "stops"]) if (link[name] !== undefined) element(name).value = link[name];
}

/** Shows the words of a fault beside the field that it names; without a fault, clears all. */
export function showFault(trouble) {
  for (const id of new Set(Object.values(PLACES))) {
    const isHere = trouble != null && trouble.param !== null && PLACES[trouble.param] === id;
    const note = element(`${id}-error`);
    note.hidden = !isHere;
    note.textContent = isHere ? trouble.message : "";
    if (isHere) element(id).setAttribute("aria-invalid", "true");
    else element(id).removeAttribute("aria-invalid");
  }
}

/** Lets the reader choose light or dark, and remembers it in this browser. */
export function startTheme(changed) {
  const select = element("theme");
  const apply = () => {
    if (select.value) document.documentElement.dataset.theme = select.value;
    else delete document.documentElement.dataset.theme;
    changed();
  };
  try {
    select.value = localStorage.getItem(THEME) ?? "";
  } catch {
    select.value = "";
  }
  select.addEventListener("change", () => {
    try {
      localStorage.setItem(THEME, select.value);
    } catch {
      // Without storage the choice lasts as long as the page.
    }
    apply();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", apply);
  apply();
}

/** Shows the turns of a conversation. */
export function showTurns(turns) {
  const items = turns.map(({ role, content }) => {
    const item = document.createElement("li");
    const who = document.createElement("b");
    item.className = role;
    who.textContent = role === "user" ? "you" : "model";
    item.append(who, content);
    return item;
  });
  const list = element("turns");
  list.replaceChildren(...items);
  list.hidden = !items.length;
  list.scrollTop = list.scrollHeight;
}

/** Says something to screen readers. */
export function say(words) {
  element("say").textContent = words;
}
