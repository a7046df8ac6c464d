// Now: the batch slot by slot, the queue behind it, and the last ten minutes.

import { h, keyed, text } from "./dom.js";
import { count, percent, plural, rate, seconds } from "./format.js";
import { Plot } from "./plots.js";
import { RequestTable } from "./requests.js";

export const title = "Now";
const MAX_CELLS = 256;

const PLOTS = {
  tokens_per_second: { title: "Tokens per second", of: "generated", format: rate },
  first_token_seconds: { title: "Time to first token", of: "mean over 2 s", format: seconds, dots: true },
  kv_usage: { title: "KV cache", of: "blocks in use", format: percent, max: 1 },
  waiting: { title: "Waiting", of: "requests in the queue", format: count },
  preemptions: { title: "Preemptions", of: "put back for lack of blocks", format: count, bars: true },
  rejections: { title: "Rejections", of: "turned away", format: count, bars: true },
};

export async function show(place, _, live) {
  const lead = h("p.lead");
  const cells = h(".slots", { role: "img" });
  const others = h("p.hint");
  const running = new RequestTable("Running", "Nothing runs. Ask something, and it shows up here.");
  const waiting = new RequestTable("Waiting", "Nobody waits.");
  const plots = Object.entries(PLOTS).map(([name, options]) => [name, new Plot(options)]);
  place.append(
    h("h1", {}, "Now"), lead, cells,
    h("p.hint.key", { "aria-hidden": "true" }, h("i.prefill"), "reading its prompt", h("i.decode"), "writing its answer", h("i.free"), "free"),
    h("section.plots", { "aria-label": "The last ten minutes" }, plots.map(([, plot]) => plot.element)),
    running.element, waiting.element, others,
  );
  let drawn = null;
  const unsubscribe = live.subscribe((event, history) => {
    const { queue } = event;
    text(lead, sentence(event));
    slots(cells, queue, event);
    running.show(queue.running, event.num_running);
    waiting.show(queue.waiting, event.num_waiting);
    const unseen = queue.others_running + queue.others_waiting;
    text(others, unseen ? `${plural(unseen, "request")} of other keys ${unseen === 1 ? "is" : "are"} not shown.` : "");
    const newest = history.at[history.at.length - 1];
    if (newest === drawn) return;
    drawn = newest;
    for (const [name, plot] of plots) plot.show(history.at, history[name]);
  });
  return () => {
    unsubscribe();
    running.close();
    waiting.close();
    for (const [, plot] of plots) plot.remove();
  };
}

function sentence({ engine, queue, num_running, num_waiting }) {
  const busy = num_running + queue.others_running;
  const behind = num_waiting + queue.others_waiting;
  if (engine === "restarting") return `The engine is being started again; ${plural(busy + behind, "request")} wait for it.`;
  if (engine === "stalled") return "The engine has not been heard of for a while and is about to be replaced.";
  const slots = `${count(busy)} of ${plural(queue.slots, "slot")} ${busy === 1 ? "is" : "are"} busy`;
  return `${slots}, ${behind ? `${plural(behind, "request")} ${behind === 1 ? "waits" : "wait"}` : "nobody waits"}.`;
}

/** How far the request in each slot has come: first through its prompt, then through its output. */
function slots(cells, queue, event) {
  const filled = queue.running.slice(0, MAX_CELLS);
  const others = Math.min(queue.others_running, MAX_CELLS - filled.length);
  const free = Math.max(0, Math.min(queue.slots, MAX_CELLS) - filled.length - others);
  const items = [
    ...filled.map((entry) => ({ key: entry.id, entry })),
    ...Array.from({ length: others }, (_, index) => ({ key: `other-${index}` , kind: "other" })),
    ...Array.from({ length: free }, (_, index) => ({ key: `free-${index}`, kind: "free" })),
  ];
  const busy = event.num_running + queue.others_running;
  cells.setAttribute("aria-label", `Slots: ${busy} of ${queue.slots} busy`);
  keyed(cells, items, (item) => item.key, () => h("i"), (cell, { entry, kind }) => {
    if (!entry) {
      cell.className = kind;
      return;
    }
    const { generated, max_tokens, num_computed } = entry.progress;
    const whole = entry.prompt_tokens + entry.virtual_tokens;
    cell.className = generated ? "decode" : "prefill";
    const part = generated ? generated / max_tokens : num_computed / Math.max(1, whole);
    cell.style.setProperty("--part", String(Math.min(1, part)));
    cell.title = `${generated ? "writing" : "reading its prompt"}, ${percent(part)}`;
  });
}
