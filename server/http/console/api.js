// The one way to the server: every request carries the key, if one is needed, and every refusal becomes an ApiError.

import { h } from "./dom.js";

const KEY = "softbatch-key";
let asking = null;

export class ApiError extends Error {
  constructor(status, body) {
    super(body.message || `the server answered ${status}`);
    this.status = status;
    this.code = body.code;
    this.param = body.param;
  }
}

/** The JSON of a reply. Raises ApiError. */
export async function getJson(path, options = {}) {
  return (await send(path, options)).json();
}

export function postJson(path, body, options = {}) {
  return getJson(path, { ...options, ...jsonBody(body) });
}

/** The objects of a stream of events, until it ends or `signal` is raised. Raises ApiError. */
export async function* events(path, { body, signal } = {}) {
  const reply = await send(path, { signal, ...(body ? jsonBody(body) : {}) });
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const parts = (rest + value).split("\n\n");
      rest = parts.pop();
      for (const part of parts) {
        if (!part.startsWith("data: ")) continue;
        const data = part.slice(6);
        if (data === "[DONE]") return;
        const event = JSON.parse(data);
        if (event.error && event.error.type) throw new ApiError(200, event.error);
        yield event;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** Hand a file of the server's to the browser, which asks for it without a key of its own. */
export async function download(path, name) {
  const link = h("a", { href: URL.createObjectURL(await (await send(path)).blob()), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

export async function send(path, options = {}) {
  for (;;) {
    const key = sessionStorage.getItem(KEY);
    const headers = { ...options.headers, ...(key ? { Authorization: `Bearer ${key}` } : {}) };
    const reply = await fetch(new URL(path, document.baseURI), { ...options, headers });
    if (reply.ok) return reply;
    if (reply.status === 401) {
      await askForKey(Boolean(key));
      continue;
    }
    const body = await reply.json().catch(() => ({}));
    throw new ApiError(reply.status, typeof body.error === "object" ? body.error : {});
  }
}

/** Why the server does not do it, in its own words; with a way to a key of more rights where that is the reason. */
export function refuse(place, error) {
  place.replaceChildren(error.message);
  if (error.status === 403) place.append(" ", h("button.link", { type: "button", onclick: changeKey }, "Use another key"));
  place.hidden = false;
}

function changeKey() {
  sessionStorage.removeItem(KEY);
  location.reload();
}

const jsonBody = (body) => ({
  method: "POST",
  body: JSON.stringify(body),
  headers: { "Content-Type": "application/json" },
});

/** One dialog, however many requests wait for it. */
function askForKey(wasWrong) {
  asking ??= new Promise((resolve) => {
    const field = h("input", { type: "password", id: "key", autocomplete: "off", required: true });
    const dialog = h("dialog.ask", { "aria-labelledby": "key-title" },
      h("form", { method: "dialog" },
        h("h2", { id: "key-title" }, "This server wants a key"),
        h("p", {}, wasWrong ? "That key is not one of the server's. Try another." :
          "It is kept in this tab until you close it, and sent to this server alone."),
        h("label", { htmlFor: "key" }, "API key"),
        field,
        h(".row.end", {}, h("button.primary", { type: "submit" }, "Open the console"))));
    dialog.addEventListener("cancel", (event) => event.preventDefault());
    dialog.addEventListener("submit", (event) => {
      event.preventDefault();
      sessionStorage.setItem(KEY, field.value.trim());
      dialog.close();
      dialog.remove();
      asking = null;
      resolve();
    });
    document.body.append(dialog);
    dialog.showModal();
  });
  return asking;
}
