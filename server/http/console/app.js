// The frame: which tab is shown, the live stream all of them share, the theme.

import { ApiError, events, getJson } from "./api.js";
import { announce, h, text } from "./dom.js";
import { count } from "./format.js";
import { redrawAll } from "./plots.js";

const TABS = {
  now: () => import("./now.js"),
  prompts: () => import("./prompts.js"),
  compress: () => import("./compress.js"),
  ask: () => import("./ask.js"),
};
const WORDS = {
  ready: "serving",
  restarting: "engine restarting",
  stalled: "engine stalled",
  draining: "shutting down",
  lost: "no connection",
};
const main = document.getElementById("main");
let leave = () => {};
let shown = 0;

/** `#prompts/manual` shows the tab `prompts` with the argument `manual`. */
async function route() {
  const [name, ...rest] = location.hash.slice(1).split("/");
  if (name === "main") return;
  const tab = name in TABS ? name : "now";
  for (const link of document.querySelectorAll("nav a"))
    if (link.dataset.tab === tab) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  const turn = (shown += 1);
  leave();
  leave = () => {};
  const place = h("section");
  try {
    const { show, title } = await TABS[tab]();
    if (turn !== shown) return;
    document.title = `${title} · softbatch`;
    main.replaceChildren(place);
    leave = (await show(place, rest.length ? decodeURIComponent(rest.join("/")) : null, live)) || leave;
  } catch (error) {
    main.replaceChildren(h("p.notice.bad", { role: "alert" }, error.message));
  }
}

/** One stream for all tabs of the page. A page that nobody looks at has none, as browsers bound their number. */
class Live {
  constructor() {
    this.listeners = new Set();
    this.history = { at: [] };
    this.last = null;
    document.addEventListener("visibilitychange", () => (document.hidden ? this.stop() : this.start()));
  }

  subscribe(listener) {
    this.listeners.add(listener);
    if (this.last) listener(this.last, this.history);
    return () => this.listeners.delete(listener);
  }

  stop() {
    this.aborting?.abort();
    this.aborting = null;
  }

  async start() {
    if (this.aborting) return;
    const aborting = (this.aborting = new AbortController());
    for (let pause = 500; !aborting.signal.aborted; pause = Math.min(pause * 2, 8000)) {
      try {
        for await (const event of events("v1/queue/events", { signal: aborting.signal })) {
          this.take(event);
          pause = 500;
        }
      } catch (error) {
        if (aborting.signal.aborted) return;
        if (error instanceof ApiError && error.status === 403) return showState("lost", error.message);
      }
      showState("lost");
      await new Promise((resolve) => setTimeout(resolve, pause));
    }
  }

  take(event) {
    const { history } = event;
    const known = this.history.at;
    const from = history.at.findIndex((at) => !known.length || at > known[known.length - 1]);
    if (from >= 0)
      for (const [name, values] of Object.entries(history))
        this.history[name] = [...(this.history[name] || []), ...values.slice(from)].slice(-300);
    this.last = event;
    const running = event.num_running + event.queue.others_running;
    showState(event.engine, running ? `serving ${count(running)}` : "");
    for (const listener of this.listeners) listener(event, this.history);
  }
}

function showState(name, words = "") {
  const state = document.getElementById("state");
  state.dataset.state = name;
  text(state.lastElementChild, (name === "ready" && words) || (name === "ready" ? "idle" : words || WORDS[name]));
}

function theme() {
  const button = document.getElementById("theme");
  const root = document.documentElement;
  const names = { "": "as the system", light: "light", dark: "dark" };
  const label = () => button.setAttribute("aria-label", `Theme: ${names[root.dataset.theme || ""]}`);
  button.addEventListener("click", () => {
    const dark = matchMedia("(prefers-color-scheme: dark)").matches;
    const order = dark ? ["", "light", "dark"] : ["", "dark", "light"];
    const next = order[(order.indexOf(root.dataset.theme || "") + 1) % order.length];
    if (next) root.dataset.theme = next;
    else delete root.dataset.theme;
    localStorage.setItem("softbatch-theme", next);
    label();
    announce(button.getAttribute("aria-label"));
    redrawAll();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redrawAll);
  label();
}

async function about() {
  const info = await getJson("info");
  const size = info.num_parameters >= 1e9 ? `${(info.num_parameters / 1e9).toFixed(1)} B` : `${Math.round(info.num_parameters / 1e6)} M`;
  text(document.getElementById("model"), `${info.model_id} · ${size} parameters · ${info.model_dtype} on ${info.model_device_type}`);
}

const live = new Live();
theme();
window.addEventListener("hashchange", () => {
  route();
  if (location.hash.slice(1) !== "main") main.focus({ preventScroll: true });
});
route();
live.start();
about().catch(() => {});
