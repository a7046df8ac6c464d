// A table of requests, each with its age, prompt, soft prompt, priority and progress; one can be opened and cancelled.

import { getJson } from "./api.js";
import { announce, confirmed, h, icon, keyed, set, text } from "./dom.js";
import { count, plural, seconds } from "./format.js";

const COLUMNS = ["Request", "Age", "Prompt", "Soft prompt", "Priority", "Progress", ""];
const REFRESH_MS = 1000;

export class RequestTable {
  constructor(heading, empty) {
    this.opened = new Map();
    this.number = h("span.count");
    this.body = h("div");
    this.empty = h("p.hint", {}, empty);
    this.more = h("p.hint");
    const head = h(".requests-row.head", { role: "row" },
      COLUMNS.map((name) => h("span", { role: "columnheader" }, name || h("span.unseen", {}, "Cancel"))));
    this.table = h(".requests", { role: "table", "aria-label": heading },
      h("", { role: "rowgroup" }, head), this.body);
    this.element = h("section", {}, h("h2", {}, heading, " ", this.number), this.table, this.empty, this.more);
    this.timer = setInterval(() => this.refresh(), REFRESH_MS);
  }

  close() {
    clearInterval(this.timer);
  }

  show(entries, total) {
    const here = new Set(entries.map((entry) => entry.id));
    const ended = [...this.opened.values()].filter((row) => !here.has(row.entry.id));
    for (const row of ended) row.entry = { ...row.entry, state: "ended" };
    const all = [...entries, ...ended.map((row) => row.entry)];
    text(this.number, total ? count(total) : "");
    this.table.hidden = !all.length;
    this.empty.hidden = Boolean(all.length);
    text(this.more, total > entries.length ? `and ${plural(total - entries.length, "more request")}` : "");
    keyed(this.body, all, (entry) => entry.id, (entry) => this.make(entry), (row, entry) => this.update(row, entry));
  }

  make(entry) {
    const toggle = h("button.link.mono", { type: "button", "aria-expanded": "false" }, entry.id.slice(0, 8));
    const cancel = h("button.quiet.icon", { type: "button", "aria-label": `Cancel ${entry.id.slice(0, 8)}` },
      icon("M6 6l12 12M18 6L6 18"));
    const parts = {
      toggle, cancel, age: cell(), prompt: cell(), soft: cell(), priority: cell(), words: h("span"),
      bar: h(".bar", { role: "progressbar", "aria-label": "Progress", "aria-valuemin": "0", "aria-valuemax": "100" },
        h("i")),
    };
    const line = h(".requests-row", { role: "row" },
      h("span", { role: "cell" }, toggle), parts.age, parts.prompt, parts.soft, parts.priority,
      h("span.progress", { role: "cell" }, parts.bar, parts.words), h("span", { role: "cell" }, cancel));
    const row = h(".request", { role: "rowgroup" }, line);
    row.parts = parts;
    toggle.addEventListener("click", () => this.toggle(row, entry.id));
    cancel.addEventListener("click", () => cancelRequest(entry, cancel));
    return row;
  }

  update(row, entry) {
    const { parts } = row;
    const { generated, max_tokens, num_computed } = entry.progress;
    const whole = entry.prompt_tokens + entry.virtual_tokens;
    row.entry = entry;
    row.dataset.state = entry.state;
    text(parts.age, seconds(entry.age_seconds));
    text(parts.prompt, entry.virtual_tokens
      ? `${count(entry.prompt_tokens)} + ${count(entry.virtual_tokens)} virtual` : plural(entry.prompt_tokens, "token"));
    text(parts.soft, entry.soft_prompt || "–");
    text(parts.priority, String(entry.priority));
    const part = generated ? generated / max_tokens : num_computed / Math.max(1, whole);
    const written = `${count(generated)} of ${count(max_tokens)}`;
    const words = { ended: "ended", waiting: generated ? `put back at ${count(generated)}` : "waiting" };
    text(parts.words, words[entry.state] || (generated ? written : `reading ${count(num_computed)} of ${count(whole)}`));
    set(parts.bar, { "aria-valuenow": String(Math.round(100 * part)), "aria-valuetext": parts.words.textContent });
    parts.bar.classList.toggle("prefill", !generated);
    parts.bar.style.setProperty("--part", String(Math.min(1, part)));
    parts.cancel.hidden = entry.state === "ended";
    if (this.opened.has(entry.id)) this.opened.get(entry.id).entry = entry;
  }

  toggle(row, id) {
    const open = !this.opened.has(id);
    row.parts.toggle.setAttribute("aria-expanded", String(open));
    if (!open) {
      this.opened.get(id).detail.remove();
      this.opened.delete(id);
      return;
    }
    const texts = { route: h("p.hint"), prompt: h("pre", { tabIndex: 0 }), output: h("pre", { tabIndex: 0 }) };
    const detail = h(".detail", { role: "row" }, h("", { role: "cell" }, texts.route,
      h("h3", {}, "Prompt"), texts.prompt, h("h3", {}, "Output so far"), texts.output));
    row.append(detail);
    this.opened.set(id, { entry: row.entry, detail, texts });
    this.refresh();
  }

  async refresh() {
    for (const { entry, texts } of this.opened.values()) {
      if (entry.state === "ended") continue;
      try {
        const found = await getJson(`v1/queue/${encodeURIComponent(entry.id)}`);
        text(texts.route, `${entry.id} · ${found.route}${found.is_cut ? " · only the last tokens are shown" : ""}`);
        text(texts.prompt, found.prompt || "none beside the soft prompt");
        text(texts.output, found.output || "nothing yet");
      } catch (error) {
        if (error.status !== 404) text(texts.route, error.message);
      }
    }
  }
}

const cell = () => h("span", { role: "cell" });

async function cancelRequest(entry, button) {
  const name = entry.id.slice(0, 8);
  const sure = await confirmed(`Cancel ${name}?`, "Its client is told that the request was cancelled on the server.",
    "Cancel the request");
  if (!sure) return;
  button.disabled = true;
  try {
    await getJson(`v1/queue/${encodeURIComponent(entry.id)}`, { method: "DELETE" });
    announce(`${name} is cancelled`);
  } catch (error) {
    button.disabled = false;
    announce(error.message);
  }
}
