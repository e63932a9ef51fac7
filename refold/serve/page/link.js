// Settings in the fragment of the page's address, which browsers never send.

/** Returns the settings that an address holds: an object of strings, with `turns` as a list. */
export function readLink(fragment) {
  const found = Object.fromEntries(new URLSearchParams(fragment.replace(/^#/, "")));
  try {
    found.turns = JSON.parse(found.turns ?? "[]").filter(
      (turn) => ["user", "assistant"].includes(turn?.role) && typeof turn.content === "string",
    );
  } catch {
    found.turns = [];
  }
  return found;
}

/** Returns the address of the page with settings; empty ones are left out. */
export function writeLink(settings) {
  const parameters = new URLSearchParams();
  for (const [name, value] of Object.entries(settings)) {
    const text = name === "turns" ? (value.length ? JSON.stringify(value) : "") : String(value ?? "");
    if (text !== "") parameters.set(name, text);
  }
  const address = new URL(location.href);
  address.hash = parameters.toString();
  return address.href;
}

/** Copies a text; returns whether that worked. Browsers offer the clipboard only to pages of this host or of https. */
export async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const box = document.createElement("textarea");
    box.value = text;
    box.setAttribute("aria-label", "Link");
    document.body.append(box);
    const before = document.activeElement;
    box.select();
    const isCopied = document.execCommand("copy");
    box.remove();
    before?.focus();
    return isCopied;
  }
}
